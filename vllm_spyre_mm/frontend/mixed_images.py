# SPDX-License-Identifier: Apache-2.0
"""Pictures and ready-made embeddings side by side in one prompt, in any order.

Leans on: ``MultiModalDataParser._parse_image_data`` makes one object of all images of a prompt, for
pictures or for embeddings; ``BaseMultiModalProcessor._cached_apply_hf_processor`` processes that
object into lists with an entry for each image; ``BaseMultiModalItemTracker.add`` sees the images of
a chat in their order, and ``_resolve_items`` groups them by kind. Each kind is given to vLLM by
itself, and the results are put back into the order of the prompt.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch

from vllm_spyre_mm.upstream.contract import require_attributes, require_parameters
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded

PICTURE, EMBEDDING = "image", "image_embeds"
"""vLLM's names of the two kinds among the content parts of a chat."""


def install() -> None:
    """Extend vLLM's parser, processor and chat as soon as they exist."""
    when_loaded("vllm.multimodal.parse", _extend_parser)
    when_loaded("vllm.multimodal.processing.processor", _extend_processor)
    when_loaded("vllm.renderers.chat_utils", _extend_chat)


class Mixture:
    """Which images of a prompt are pictures, and which are embeddings.

    Args:
        is_embedding: for each image, in the order of the prompt.
    """

    def __init__(self, is_embedding: Iterable[bool]) -> None:
        self.is_embedding = tuple(is_embedding)

    def indices(self, *, embeddings: bool) -> list[int]:
        """Where in the prompt the images of one kind are."""
        return self.select(range(len(self.is_embedding)), embeddings=embeddings)

    def select(self, values: Iterable[Any], *, embeddings: bool) -> list[Any]:
        """Those values, one for each image, that belong to one kind."""
        pairs = zip(values, self.is_embedding, strict=True)
        return [value for value, is_embedding in pairs if is_embedding == embeddings]

    def merge(self, pictures: Iterable[Any], embeddings: Iterable[Any]) -> list[Any]:
        """The values of both kinds in the order of the prompt."""
        of_pictures, of_embeddings = iter(pictures), iter(embeddings)
        return [
            next(of_embeddings if is_embedding else of_pictures)
            for is_embedding in self.is_embedding
        ]


def mixture_of(images: object) -> Mixture | None:
    """The mixture that a prompt's images are; None where all are of one kind.

    A matrix is an embedding; vLLM looks at the first image alone.
    """
    if not isinstance(images, (list, tuple)):
        return None
    is_embedding = [isinstance(image, torch.Tensor) and image.ndim == 2 for image in images]
    return Mixture(is_embedding) if any(is_embedding) and not all(is_embedding) else None


def _extend_parser(module: ModuleType) -> None:
    require_attributes(module, ("MultiModalDataParser", "ModalityDataItems"))
    parser = module.MultiModalDataParser
    require_attributes(parser, ("_parse_image_data",))
    original = parser._parse_image_data
    if is_extended(original, __name__):
        return
    require_parameters(original, ("data",))

    class MixedImageItems(module.ModalityDataItems):  # type: ignore[name-defined]
        """Images of both kinds.

        Attributes:
            mixture: which are which.
            pictures: vLLM's items of the pictures.
            embeddings: vLLM's items of the embeddings.
        """

        def __init__(self, mixture: Mixture, pictures: Any, embeddings: Any) -> None:
            super().__init__(mixture.merge(pictures.get_all(), embeddings.get_all()), "image")
            self.mixture, self.pictures, self.embeddings = mixture, pictures, embeddings

        def get_count(self) -> int:
            return len(self.data)

        def get(self, index: int) -> Any:
            return self.data[index]

        def get_processor_data(self) -> Mapping[str, object]:
            data: Mapping[str, object] = self.pictures.get_processor_data()
            return data

        def get_passthrough_data(self) -> Mapping[str, object]:
            data: Mapping[str, object] = self.embeddings.get_passthrough_data()
            return data

    @extending(original, __name__)
    def _parse_image_data(self: Any, data: Any) -> Any:
        mixture = mixture_of(data)
        if mixture is None:
            return original(self, data)
        return MixedImageItems(
            mixture,
            original(self, mixture.select(data, embeddings=False)),
            original(self, mixture.select(data, embeddings=True)),
        )

    parser._parse_image_data = _parse_image_data
    parser.mixed_items = MixedImageItems


def _extend_processor(module: ModuleType) -> None:
    require_attributes(module, ("BaseMultiModalProcessor", "MultiModalProcessingResult"))
    processor, result_class = module.BaseMultiModalProcessor, module.MultiModalProcessingResult
    require_attributes(processor, ("_cached_apply_hf_processor", "_recompute_cached_prompt_update"))
    original = processor._cached_apply_hf_processor
    if is_extended(original, __name__):
        return
    require_parameters(original, ("inputs", "timing_ctx"))

    @extending(original, __name__)
    def _cached_apply_hf_processor(self: Any, inputs: Any, timing_ctx: Any) -> Any:
        mixture = getattr(inputs.mm_data_items.get("image"), "mixture", None)
        if mixture is None:
            return original(self, inputs, timing_ctx)
        pictures, embeddings = (
            original(self, _select(inputs, mixture, embeddings=embeddings), timing_ctx)
            for embeddings in (False, True)
        )

        def merged(name: str) -> Any:
            both = (getattr(result, name)["image"] for result in (pictures, embeddings))
            return mixture.merge(*both)

        updates = [
            [self._recompute_cached_prompt_update(update, index) for update in of_image]
            for index, of_image in enumerate(merged("prompt_updates"))
        ]
        return result_class(
            prompt_ids=pictures.prompt_ids,
            kwargs=type(pictures.kwargs)({"image": merged("kwargs")}),
            hashes={"image": merged("hashes")},
            prompt_updates={"image": updates},
        )

    processor._cached_apply_hf_processor = _cached_apply_hf_processor


def _select(inputs: Any, mixture: Mixture, *, embeddings: bool) -> Any:
    """The inputs of vLLM's processor with the images of one kind alone."""
    items = inputs.mm_data_items["image"]
    uuids = dict(inputs.mm_uuid_items or {})
    if "image" in uuids:
        uuids["image"] = mixture.select(uuids["image"], embeddings=embeddings)
    return dataclasses.replace(
        inputs,
        mm_data_items=type(inputs.mm_data_items)(
            {"image": items.embeddings if embeddings else items.pictures}
        ),
        mm_uuid_items=uuids,
    )


def _extend_chat(module: ModuleType) -> None:
    require_attributes(module, ("BaseMultiModalItemTracker", "_resolve_items"))
    tracker = module.BaseMultiModalItemTracker
    if is_extended(tracker.add, __name__):
        return
    require_parameters(tracker.add, ("modality", "item"))
    require_parameters(
        module._resolve_items, ("items_by_modality", "mm_processor", "modality_order")
    )
    tracker.add = _noting_order(tracker.add)
    module._resolve_items = _in_order(module._resolve_items)  # type: ignore[attr-defined]


def _noting_order(original: Callable[..., Any]) -> Callable[..., Any]:
    @extending(original, __name__)
    def add(self: Any, modality: str, item: Any) -> Any:
        placeholder = original(self, modality, item)
        if modality in (PICTURE, EMBEDDING):
            self._modality_order[PICTURE].append(modality)
        return placeholder

    return add


def _in_order(original: Callable[..., Any]) -> Callable[..., Any]:
    @extending(original, __name__)
    def _resolve_items(
        items_by_modality: dict[str, list[Any]],
        mm_processor: Any,
        modality_order: Mapping[str, list[str]],
    ) -> Any:
        if PICTURE not in items_by_modality or EMBEDDING not in items_by_modality:
            return original(items_by_modality, mm_processor, modality_order)
        mixture = Mixture(kind == EMBEDDING for kind in modality_order[PICTURE])

        def resolve(without: str) -> Iterator[dict[str, Any]]:
            others = {kind: each for kind, each in items_by_modality.items() if kind != without}
            return iter(original(others, mm_processor, modality_order))

        for_pictures, for_embeddings = resolve(EMBEDDING), resolve(PICTURE)
        data, uuids = (
            {**theirs, "image": mixture.merge(ours["image"], _rows(theirs["image"]))}
            for ours, theirs in zip(for_pictures, for_embeddings, strict=True)
        )
        return data, uuids

    return _resolve_items


def _rows(embeddings: Any) -> Any:
    """The embeddings of a chat, one for each image.

    Raises:
        VLLMValidationError: they were given as objects with several tensors.
    """
    from vllm.exceptions import VLLMValidationError

    if isinstance(embeddings, Mapping):
        raise VLLMValidationError(
            "image_embeds beside pictures must be one tensor for each image, not an object",
            parameter=EMBEDDING,
        )
    return embeddings
