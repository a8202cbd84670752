# SPDX-License-Identifier: Apache-2.0
"""The platform's part in how vLLM processes the images and videos of a prompt.

:mod:`processor_registration` puts the classes below in front of vLLM's processor of the model and
of its processing information.

Leans on: ``BaseProcessingInfo.parse_mm_data`` gets the items of every prompt as the client gave
them, and its ``data_parser`` says how it takes embeddings and videos;
``BaseMultiModalProcessor.apply`` gets them parsed, ``_cached_apply_hf_processor`` makes lists with
an entry for each of them, and ``_matched_updates_from_result`` gets, for each, the tag that was
found, or None (where vLLM would fail an assertion that does not say what is wrong);
``_get_mm_fields_config`` names the tensors that belong to an item, of which some may be missing.
An exception from any of these fails that request alone (HTTP 400).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import (
    ImageEmbeddingItems,
    ImageProcessorItems,
    MultiModalDataItems,
    VideoEmbeddingItems,
)
from vllm.multimodal.processing import BaseMultiModalProcessor, BaseProcessingInfo, ProcessorInputs
from vllm.multimodal.processing.processor import MultiModalProcessingResult

from vllm_spyre_mm.frontend.grid_embeddings import grid_form
from vllm_spyre_mm.frontend.image_validation import (
    processing_error,
    validate_image_embeddings,
    validate_images,
    validate_laid_out,
    validate_length,
    validate_tags,
    validate_takes_embeddings,
)
from vllm_spyre_mm.frontend.mixed_chat import unwrapped
from vllm_spyre_mm.frontend.mixed_images import (
    MixedItems,
    Mixture,
    are_embeddings,
    by_kind,
    mixture_of,
)
from vllm_spyre_mm.frontend.videos import prepare_videos
from vllm_spyre_mm.multimodal.mm_mappings import get_mm_mapping
from vllm_spyre_mm.vllm_fixes import array_pictures


class ImageProcessingInfo(BaseProcessingInfo):
    """Prepares the images and videos of a prompt, and tells them from embeddings."""

    def _get_expected_hidden_size(self) -> int | None:
        width = super()._get_expected_hidden_size()
        return None if width is None else feature_width(self)

    def parse_mm_data(self, mm_data: Any, *, validate: bool = True) -> MultiModalDataItems:
        """vLLM's items of the images and videos of a prompt.

        Raises:
            ValueError: one is damaged, or is no such thing, or there are too many.
        """
        prepared = {name: self._prepared(name, data) for name, data in mm_data.items()}
        mixtures = {
            name: mixture
            for name, data in prepared.items()
            if (mixture := mixture_of(data)) is not None
        }
        if mixtures:
            validate_takes_embeddings(self.ctx.get_mm_config(), next(iter(mixtures)))
        media, embeddings = dict(prepared), {}
        for name, mixture in mixtures.items():
            media[name] = mixture.select(prepared[name], embeddings=False)
            embeddings[name] = mixture.select(prepared[name], embeddings=True)
        items, others = (
            super(ImageProcessingInfo, self).parse_mm_data(
                {
                    name: self._in_vllms_form(name, data, mixtures.get(name))
                    for name, data in given.items()
                },
                validate=validate,
            )
            for given in (media, embeddings)
        )
        for name, mixture in mixtures.items():
            items[name] = MixedItems(mixture, items[name], others[name])
            if validate:
                self.validate_num_items(name, len(mixture.is_embedding))
        return items

    def _prepared(self, modality: str, data: Any) -> Any:
        """The items of a modality, loaded embeddings and pixels in their usual form."""
        if isinstance(data, list):
            data = [unwrapped(item) for item in data]
        if modality == "image" and data is not None and array_pictures.FAULT.applies():
            return array_pictures.prepare_pictures(data)
        if modality == "video":
            return prepare_videos(data, needs_metadata=self.data_parser.video_needs_metadata)
        return data

    def _in_vllms_form(self, modality: str, data: Any, mixture: Mixture | None) -> Any:
        """Embeddings that come with a grid as one object, checked; other items as they are."""
        if not are_embeddings(data):
            return data
        mapping = get_mm_mapping(self.ctx.model_config.hf_config)
        validate_laid_out(mapping, modality)
        form = grid_form(modality, self, width=mapping.feature_width)
        if form is None:
            return data
        validate_takes_embeddings(self.ctx.get_mm_config(), modality)
        return form.checked(data, None if mixture is None else mixture.indices(embeddings=True))


class DummyInputs(ProcessorInputs):
    """The largest items of a model, which vLLM processes once: they may exceed a prompt."""


class ImageProcessor(BaseMultiModalProcessor[BaseProcessingInfo]):
    """Checks the images and videos of a prompt, and processes mixed ones kind by kind."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process a prompt with its images and videos.

        Raises:
            VLLMValidationError: says which cannot be used, and why.
        """
        for items in inputs.mm_data_items.values():
            if isinstance(items, MixedItems):
                self._check(items.media, items.mixture.indices(embeddings=False))
                self._check(items.embeddings, items.mixture.indices(embeddings=True))
            else:
                self._check(items)
        with processing_error():
            processed = super().apply(inputs, timing_ctx)
        if not isinstance(inputs, DummyInputs):
            max_model_len = self.info.ctx.model_config.max_model_len
            validate_length(processed["mm_placeholders"].get("video", ()), max_model_len)
        return processed

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        inputs = super().get_dummy_inputs(*args, **kwargs)
        fields = dataclasses.fields(inputs)
        return DummyInputs(**{field.name: getattr(inputs, field.name) for field in fields})

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        """The fields, with ready-made features: vLLM's Granite Vision 4 does not name them."""
        fields = super()._get_mm_fields_config(  # type: ignore[safe-super]  # a mixin's
            hf_inputs, hf_processor_mm_kwargs
        )
        return {"image_embeds": MultiModalFieldConfig.batched("image"), **fields}

    def _check(self, items: Any, indices: list[int] | None = None) -> None:
        """Check items of one kind, which stand at ``indices`` of the prompt, or are all of it."""
        if isinstance(items, ImageProcessorItems):
            validate_images(items.get_all(), indices)
        elif isinstance(items, ImageEmbeddingItems | VideoEmbeddingItems):
            width = feature_width(self.info)
            validate_image_embeddings(items.get_all(), width, indices, modality=items.modality)

    def _cached_apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process media and embeddings each by themselves where a prompt has both.

        vLLM would cache neither, and count the embeddings among the media.
        """
        media, embeddings = by_kind(inputs.mm_data_items)
        if not media or not embeddings:
            return super()._cached_apply_hf_processor(inputs, timing_ctx)
        results = [
            super(ImageProcessor, self)._cached_apply_hf_processor(
                _restricted(inputs, items, embeddings=of_embeddings), timing_ctx
            )
            for items, of_embeddings in ((media, False), (embeddings, True))
        ]

        def merged(name: str) -> dict[str, Any]:
            of_media, of_embeddings = (getattr(result, name) for result in results)
            return {
                modality: items.mixture.merge(of_media[modality], of_embeddings[modality])
                if isinstance(items, MixedItems)
                else (of_media if modality in media else of_embeddings)[modality]
                for modality, items in inputs.mm_data_items.items()
            }

        return MultiModalProcessingResult(
            prompt_ids=results[0].prompt_ids,
            kwargs=type(results[0].kwargs)(merged("kwargs")),
            hashes=merged("hashes"),
            prompt_updates={
                modality: [
                    [self._recompute_cached_prompt_update(update, index) for update in of_item]
                    for index, of_item in enumerate(updates)
                ]
                for modality, updates in merged("prompt_updates").items()
            },
        )

    def _matched_updates_from_result(self, mm_prompt_updates: Any, match_result: Any) -> Any:
        for modality, matches in match_result.items():
            validate_tags(modality, len(matches), sum(match is not None for match in matches))
        return super()._matched_updates_from_result(mm_prompt_updates, match_result)


def feature_width(info: BaseProcessingInfo) -> int:
    """Elements of a feature of the model, its levels included."""
    return get_mm_mapping(info.ctx.model_config.hf_config).feature_width


def _restricted(inputs: Any, items: MultiModalDataItems, *, embeddings: bool) -> Any:
    """The inputs of vLLM's processor with the items of one kind alone."""
    uuids = {
        modality: all_items.mixture.select(given, embeddings=embeddings)
        if isinstance(all_items := inputs.mm_data_items[modality], MixedItems)
        else given
        for modality, given in (inputs.mm_uuid_items or {}).items()
        if modality in items
    }
    return dataclasses.replace(inputs, mm_data_items=items, mm_uuid_items=uuids)
