# SPDX-License-Identifier: Apache-2.0
"""The platform's part in how vLLM processes the images of a prompt.

For the class of the model that is served a processor is registered once more: vLLM's own, and its
processing information, with the classes below in front of theirs.

Leans on: ``BaseProcessingInfo.parse_mm_data`` gets the images of every prompt as the client gave
them; ``BaseMultiModalProcessor.apply`` gets them parsed, ``_cached_apply_hf_processor`` makes lists
with an entry for each of them, and ``_matched_updates_from_result`` gets, for each, the tag that
was found, or None (where vLLM would fail an assertion that does not say what is wrong). The class
of a model has its factories as ``_processor_factory``. An exception from any of these fails that
request alone (HTTP 400).
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import BaseMultiModalProcessor, BaseProcessingInfo
from vllm.multimodal.processing.processor import MultiModalProcessingResult

from vllm_spyre_mm.frontend.image_validation import (
    validate_image_embeddings,
    validate_images,
    validate_mixture,
    validate_tags,
)
from vllm_spyre_mm.frontend.mixed_chat import unwrapped
from vllm_spyre_mm.frontend.mixed_images import MixedImageItems, Mixture, mixture_of
from vllm_spyre_mm.upstream.contract import require_attributes, require_methods
from vllm_spyre_mm.upstream.marks import is_extended, mark
from vllm_spyre_mm.vllm_fixes import array_pictures

if TYPE_CHECKING:
    from vllm.config import ModelConfig


class ImageProcessingInfo(BaseProcessingInfo):
    """Prepares the images of a prompt, and tells pictures from embeddings."""

    def parse_mm_data(self, mm_data: Any, *, validate: bool = True) -> MultiModalDataItems:
        """vLLM's items of the images of a prompt.

        Raises:
            ValueError: one is damaged, or there are too many.
        """
        images = mm_data.get("image")
        if isinstance(images, list):
            mm_data = {**mm_data, "image": [unwrapped(image) for image in images]}
        if array_pictures.FAULT.applies() and mm_data.get("image") is not None:
            mm_data = {**mm_data, "image": array_pictures.prepare_pictures(mm_data["image"])}
        mixture = mixture_of(mm_data.get("image"))
        if mixture is None:
            return super().parse_mm_data(mm_data, validate=validate)
        validate_mixture(self.ctx.get_mm_config())
        items, others = (
            super(ImageProcessingInfo, self).parse_mm_data(each, validate=validate)
            for each in (
                {**mm_data, "image": mixture.select(mm_data["image"], embeddings=False)},
                {"image": mixture.select(mm_data["image"], embeddings=True)},
            )
        )
        items["image"] = MixedImageItems(mixture, items["image"], others["image"])
        if validate:
            self.validate_num_items("image", len(mixture.is_embedding))
        return items


class ImageProcessor(BaseMultiModalProcessor[BaseProcessingInfo]):
    """Checks the images of a prompt, and processes mixed ones kind by kind."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process a prompt with its images.

        Raises:
            VLLMValidationError: says which image cannot be used, and why.
        """
        images = inputs.mm_data_items.get("image")
        if isinstance(images, MixedImageItems):
            mixture = images.mixture
            self._check(images.pictures, mixture.indices(embeddings=False))
            self._check(images.embeddings, mixture.indices(embeddings=True))
        else:
            self._check(images)
        return super().apply(inputs, timing_ctx)

    def _check(self, items: Any, indices: list[int] | None = None) -> None:
        """Check images of one kind, which stand at ``indices`` of the prompt, or are all of it."""
        if isinstance(items, ImageProcessorItems):
            validate_images(items.get_all(), indices)
        elif isinstance(items, ImageEmbeddingItems):
            hidden_size = self.info.ctx.model_config.get_hidden_size()
            validate_image_embeddings(items.get_all(), hidden_size, indices)

    def _cached_apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        images = inputs.mm_data_items.get("image")
        if not isinstance(images, MixedImageItems):
            return super()._cached_apply_hf_processor(inputs, timing_ctx)
        mixture = images.mixture
        pictures, embeddings = (
            super(ImageProcessor, self)._cached_apply_hf_processor(
                _select(inputs, mixture, embeddings=embeddings), timing_ctx
            )
            for embeddings in (False, True)
        )

        def merged(name: str) -> Any:
            both = (getattr(result, name)["image"] for result in (pictures, embeddings))
            return mixture.merge(*both)

        updates = [
            [self._recompute_cached_prompt_update(update, index) for update in of_image]
            for index, of_image in enumerate(merged("prompt_updates"))
        ]
        return MultiModalProcessingResult(
            prompt_ids=pictures.prompt_ids,
            kwargs=type(pictures.kwargs)({"image": merged("kwargs")}),
            hashes={"image": merged("hashes")},
            prompt_updates={"image": updates},
        )

    def _matched_updates_from_result(self, mm_prompt_updates: Any, match_result: Any) -> Any:
        for modality, matches in match_result.items():
            validate_tags(modality, len(matches), sum(match is not None for match in matches))
        return super()._matched_updates_from_result(mm_prompt_updates, match_result)


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


# -- registration ---------------------------------------------------------------------------------


def register_image_processor(model_config: "ModelConfig") -> None:
    """Register a processor of the platform's for the class of a model; repeatable.

    Args:
        model_config: of a model that takes images.

    Raises:
        UnsupportedVllmError: vLLM's classes are not as expected.
    """
    from vllm.model_executor.model_loader import get_model_cls

    check_bases()
    register_processor_of(get_model_cls(model_config))


def check_bases(info: type = BaseProcessingInfo, processor: type = BaseMultiModalProcessor) -> None:
    """Check that vLLM's bases have the methods that are overridden above.

    Raises:
        UnsupportedVllmError: one is missing, or its parameters have other names.
    """
    require_methods(info, {"parse_mm_data": ("mm_data", "validate"), "validate_num_items": ()})
    require_methods(
        processor,
        {
            "apply": ("inputs", "timing_ctx"),
            "_cached_apply_hf_processor": ("inputs", "timing_ctx"),
            "_matched_updates_from_result": ("mm_prompt_updates", "match_result"),
            "_recompute_cached_prompt_update": ("cached_update", "new_item_idx"),
        },
    )


def register_processor_of(model_cls: Any) -> None:
    """Register the platform's processor for a class of vLLM's that has one of vLLM's.

    Raises:
        UnsupportedVllmError: it has none.
    """
    require_attributes(model_cls, ("_processor_factory",))
    factories = model_cls._processor_factory
    require_attributes(factories, ("info", "processor", "dummy_inputs"))
    if is_extended(factories.processor, __name__):
        return

    def info(ctx: Any) -> Any:
        return _with_mixin(factories.info(ctx), ImageProcessingInfo)

    def processor(info: Any, dummy_inputs: Any) -> Any:
        return _with_mixin(factories.processor(info, dummy_inputs), ImageProcessor)

    if "_processor_factory" in vars(model_cls):
        del model_cls._processor_factory  # of one that is there vLLM warns, and this is meant
    MULTIMODAL_REGISTRY.register_processor(
        mark(processor, __name__), info=info, dummy_inputs=factories.dummy_inputs
    )(model_cls)


def _with_mixin(instance: Any, mixin: type) -> Any:
    """An object of vLLM's whose methods are looked up in ``mixin`` first."""
    cls: Any = type(instance)
    instance.__class__ = _combined(mixin, cls)
    return instance


@functools.cache  # vLLM makes a processor for each chat
def _combined(mixin: type, cls: Any) -> type:
    return type(cls)(cls.__name__, (mixin, cls), {"__module__": __name__})
