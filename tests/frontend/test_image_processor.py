# SPDX-License-Identifier: Apache-2.0
"""vLLM processes images with the platform's processor in front of its own."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.model_loader import get_model_cls
from vllm.model_executor.models.llava_next import LlavaNextMultiModalProcessor
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems
from vllm.multimodal.processing import BaseMultiModalProcessor

from vllm_spyre_mm.demo import checkpoint_path
from vllm_spyre_mm.frontend.image_processor import ImageProcessingInfo, ImageProcessor
from vllm_spyre_mm.frontend.processor_registration import (
    check_bases,
    register_image_processor,
    register_processor_of,
)
from vllm_spyre_mm.upstream.contract import UnsupportedVllmError

PICTURE = Image.new("RGB", (6, 4))


@pytest.fixture(scope="module")
def model_config() -> ModelConfig:
    """As an engine is configured, which registers the processor."""
    arguments = EngineArgs(
        model=str(checkpoint_path()), enable_mm_embeds=True, limit_mm_per_prompt={"image": 3}
    )
    return arguments.create_engine_config().model_config


@pytest.fixture(scope="module")
def processor(model_config: ModelConfig) -> Any:
    return MULTIMODAL_REGISTRY.create_processor(model_config)


def rows(processor: Any, count: int = 3) -> torch.Tensor:
    return torch.ones(count, processor.info.ctx.model_config.get_hidden_size())


def test_it_is_vllms_with_the_platforms_methods_first(processor: Any) -> None:
    assert isinstance(processor, LlavaNextMultiModalProcessor)
    assert isinstance(processor, ImageProcessor)
    assert isinstance(processor.info, ImageProcessingInfo)
    assert type(processor).apply is ImageProcessor.apply


def test_vllm_makes_many_of_one_class(model_config: ModelConfig, processor: Any) -> None:
    another = MULTIMODAL_REGISTRY.create_processor(model_config)
    assert type(another) is type(processor)
    assert type(another.info) is type(processor.info)


def test_registering_again_changes_nothing(model_config: ModelConfig) -> None:
    factories = get_model_cls(model_config)._processor_factory  # type: ignore[attr-defined]
    register_image_processor(model_config)
    assert get_model_cls(model_config)._processor_factory is factories  # type: ignore[attr-defined]
    processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    assert type(processor).__mro__.count(ImageProcessor) == 1


def test_a_class_that_inherits_its_processor_gets_one_of_its_own(model_config: ModelConfig) -> None:
    """Without a change to what it inherits."""

    class Parent:
        _processor_factory: Any = None

    class Child(Parent):
        pass

    class Factories:
        info = processor = dummy_inputs = staticmethod(lambda *_: None)

    Parent._processor_factory = Factories
    register_processor_of(Child)
    assert Parent._processor_factory is Factories
    assert Child._processor_factory is not Factories


def test_the_images_of_a_prompt_are_parsed_by_kind(processor: Any) -> None:
    items = processor.info.parse_mm_data({"image": [rows(processor), PICTURE, rows(processor, 2)]})
    images = items["image"]
    assert isinstance(images.media, ImageProcessorItems)
    assert isinstance(images.embeddings, ImageEmbeddingItems)
    assert (len(images), len(images.media), len(images.embeddings)) == (3, 1, 2)
    assert torch.equal(images[2], rows(processor, 2))
    with pytest.raises(ValueError, match="hidden dimension"):
        processor.info.parse_mm_data({"image": [PICTURE, rows(processor)[:, :5]]})


def test_there_are_as_many_images_as_are_allowed_of_both_kinds_together(processor: Any) -> None:
    with pytest.raises(VLLMValidationError, match="At most 3 image"):
        processor.info.parse_mm_data(
            {"image": [PICTURE, PICTURE, rows(processor), rows(processor)]}
        )


def test_embeddings_among_pictures_need_the_flag() -> None:
    arguments = EngineArgs(model=str(checkpoint_path()))
    model_config = arguments.create_engine_config().model_config
    info = MULTIMODAL_REGISTRY.create_processor(model_config).info
    hidden_size = model_config.get_hidden_size()
    with pytest.raises(VLLMValidationError, match="start the engine with enable_mm_embeds=True"):
        info.parse_mm_data({"image": [PICTURE, torch.ones(3, hidden_size)]})


def test_arrays_are_pictures(processor: Any) -> None:
    pixels = np.full((4, 6), 9, np.uint8)
    images = [pixels, pixels.tolist(), np.repeat(pixels[:, :, None], 4, axis=2)]
    items = processor.info.parse_mm_data({"image": images})["image"]
    assert [image.size for image in items.get_all()] == [(6, 4)] * 3
    assert all(image.mode == "RGB" for image in items.get_all())


def damaged() -> Image.Image:
    """A picture that ends early, and of which nothing is read yet."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG2000")
    return Image.open(io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2]))


def test_a_picture_that_ends_early_is_refused(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for images in (damaged(), [PICTURE, damaged()]):
        with pytest.raises(ValueError, match="Failed to load image"):
            processor.info.parse_mm_data({"image": images})
    monkeypatch.setenv("SPYRE_MM_VLLM_FIXES", "0")
    processor.info.parse_mm_data({"image": [damaged()]})  # and vLLM serves it


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (lambda _: [Image.new("RGB", (0, 9))], "image 0 of the prompt is empty"),
        (lambda given: [given, Image.new("RGB", (0, 9))], "image 1 of the prompt is empty"),
        (lambda given: [PICTURE, given * float("nan")], "image embedding 1 of the prompt"),
        (lambda given: [given * float("nan")], "image embedding 0 of the prompt"),
    ],
)
def test_an_image_that_cannot_be_used_is_named_by_its_place(
    processor: Any, images: Callable[[torch.Tensor], Any], sentence: str
) -> None:
    items = processor.info.parse_mm_data({"image": images(rows(processor))})
    with pytest.raises(VLLMValidationError, match=sentence):
        processor([1], items)


def test_mixed_images_are_processed_in_their_order(processor: Any) -> None:
    (token,) = (processor.info.get_hf_config().image_token_index,)
    items = processor.info.parse_mm_data({"image": [rows(processor, 5), PICTURE, rows(processor)]})
    made = processor([token, 9, token, token], items)
    places = made["mm_placeholders"]["image"]
    assert [place.length for place in (places[0], places[2])] == [5, 3]
    assert places[1].length > 5
    assert ["image_embeds" in item for item in made["mm_kwargs"]["image"]] == [True, False, True]
    assert len(set(made["mm_hashes"]["image"])) == 3


def match(updates: Any, found: Any) -> Any:
    return ImageProcessor._matched_updates_from_result(processor_alone(), updates, found)


def vllms_match(updates: Any, found: Any) -> Any:
    own = processor_alone()
    return BaseMultiModalProcessor._matched_updates_from_result(own, updates, found)


def processor_alone() -> Any:
    """One that was not made: what is called needs nothing of it."""
    cls: Any = type("Processor", (ImageProcessor, LlavaNextMultiModalProcessor), {})
    return cls.__new__(cls)


@pytest.mark.parametrize("found", [[None], [0, None], [None, None]])
def test_a_picture_without_a_tag_is_refused_where_vllm_would_fail_an_assertion(found: list[Any]):
    updates = {"image": [["update"] for _ in found]}
    with pytest.raises(AssertionError):
        vllms_match(updates, {"image": found})
    tags = sum(tag is not None for tag in found)
    with pytest.raises(VLLMValidationError, match=rf"has {tags} image tag\(s\) for {len(found)}"):
        match(updates, {"image": found})


def test_pictures_with_tags_get_what_vllm_matched():
    updates = {"image": [["a", "b"], ["c", "d"]]}
    assert match(updates, {"image": [1, 0]}) == {"image": [["b"], ["c"]]}
    assert match({}, {}) == {}


def test_a_vllm_that_is_not_as_expected_is_refused() -> None:
    class Info:
        validate_num_items = None

        def parse_mm_data(self, data: Any) -> None:
            """A vLLM that calls its parameter otherwise."""

    class Processor:
        apply = _cached_apply_hf_processor = get_dummy_inputs = None

    with pytest.raises(UnsupportedVllmError, match="no parameter 'mm_data'"):
        check_bases(info=Info)
    with pytest.raises(UnsupportedVllmError, match="no '_matched_updates_from_result'"):
        check_bases(processor=Processor)
    with pytest.raises(UnsupportedVllmError, match="no '_processor_factory'"):
        register_processor_of(type("Model", (), {}))
