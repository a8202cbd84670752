# SPDX-License-Identifier: Apache-2.0
"""A request that the platform cannot serve is refused with a sentence, before it is scheduled."""

import copy
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.multimodal.processing.processor import BaseMultiModalProcessor
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from vllm_spyre_mm.demo import checkpoint_path
from vllm_spyre_mm.frontend import input_processor
from vllm_spyre_mm.frontend.request_validation import (
    validate_engine_request,
    validate_image_embeddings,
    validate_images,
    validate_params,
    validate_tags,
)
from vllm_spyre_mm.upstream.contract import UnsupportedVllmError

MODEL_CONFIG: Any = SimpleNamespace(hf_config=AutoConfig.from_pretrained(checkpoint_path()))
IMAGE = MODEL_CONFIG.hf_config.image_token_id
WORD = IMAGE + 1


@pytest.fixture(autouse=True)
def installed() -> None:
    """As the platform's entry point does it; more than once is harmless."""
    input_processor.install()


def request(tokens: list[int] | None, *places: tuple[int, int], **fields: Any) -> EngineCoreRequest:
    """What vLLM's front end makes of a prompt.

    Args:
        tokens: of the prompt, expanded.
        places: offset and length of each picture's placeholder.
        fields: other fields of the request.
    """
    features = [
        MultiModalFeatureSpec(None, "image", f"hash{i}", PlaceholderRange(*place))
        for i, place in enumerate(places)
    ]
    return EngineCoreRequest(
        request_id="a",
        prompt_token_ids=tokens,
        mm_features=features or None,
        sampling_params=SamplingParams(),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        **fields,
    )


def sentence(tokens: list[int] | None, *places: tuple[int, int], **fields: Any) -> str:
    """With which a request is refused."""
    with pytest.raises(VLLMValidationError) as error:
        validate_engine_request(request(tokens, *places, **fields), MODEL_CONFIG)
    return str(error.value)


# -- image tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "places"),
    [
        ([WORD, WORD], []),
        ([IMAGE], [(0, 1)]),
        ([WORD, IMAGE, IMAGE, WORD, IMAGE], [(1, 2), (4, 1)]),
        ([IMAGE, IMAGE, IMAGE, IMAGE], [(2, 2), (0, 2)]),
        ([IMAGE, WORD, IMAGE], [(0, 3)]),
    ],
    ids=["no picture", "nothing else", "two pictures", "side by side", "with a separator"],
)
def test_image_tokens_inside_placeholders_are_accepted(
    tokens: list[int], places: list[tuple[int, int]]
):
    validate_engine_request(request(tokens, *places), MODEL_CONFIG)


@pytest.mark.parametrize(
    ("tokens", "places", "count", "first"),
    [
        ([WORD, IMAGE], [], 1, 1),
        ([IMAGE, WORD, IMAGE, IMAGE], [], 3, 0),
        ([IMAGE, IMAGE, WORD, IMAGE], [(0, 2)], 1, 3),
        ([IMAGE, IMAGE, WORD, IMAGE], [(1, 1)], 2, 0),
        ([WORD, IMAGE, IMAGE, IMAGE, WORD], [(1, 2)], 1, 3),
        ([IMAGE, IMAGE, IMAGE], [(0, 1), (2, 1)], 1, 1),
    ],
    ids=["typed", "all", "behind", "before and behind", "one too many", "between"],
)
def test_image_tokens_outside_are_counted_and_the_first_is_named(
    tokens: list[int], places: list[tuple[int, int]], count: int, first: int
):
    refusal = sentence(tokens, *places)
    assert f"has {count} image token(s) (id {IMAGE}) that belong to no image" in refusal
    assert f"the first at position {first}:" in refusal


# -- tokens that the model has no embedding for ----------------------------------------------------

NUM_ROWS = MODEL_CONFIG.hf_config.text_config.vocab_size


def with_image_token(image_token_id: int) -> Any:
    config = copy.deepcopy(MODEL_CONFIG.hf_config)
    config.image_token_index = config.image_token_id = image_token_id
    return SimpleNamespace(hf_config=config)


@pytest.mark.parametrize("token", [NUM_ROWS, NUM_ROWS + 1, 2**31])
def test_a_token_without_a_row_is_named(token: int):
    refusal = sentence([WORD, IMAGE, IMAGE, token, token], (1, 2))
    assert f"has token {token} at position 3, for which" in refusal
    assert f"embedding of {NUM_ROWS} rows has none" in refusal


def test_an_image_token_needs_no_row():
    config = with_image_token(NUM_ROWS + 3)
    validate_engine_request(request([WORD, NUM_ROWS + 3, NUM_ROWS - 1], (1, 1)), config)


def test_text_between_the_features_of_an_image_needs_one():
    config = with_image_token(NUM_ROWS)
    given = request([NUM_ROWS, NUM_ROWS + 1, NUM_ROWS], (0, 3))
    assert given.mm_features is not None
    mask = torch.tensor([True, False, True])
    given.mm_features[0].mm_position = PlaceholderRange(0, 3, is_embed=mask)
    with pytest.raises(VLLMValidationError, match=f"has token {NUM_ROWS + 1} at position 1,"):
        validate_engine_request(given, config)


def test_what_cannot_be_generated_is_no_stop_token_and_no_bad_word():
    """vLLM would look for their logits."""
    given = request([WORD])
    params = given.sampling_params
    assert params is not None
    params.update_from_generation_config({"eos_token_id": [3, NUM_ROWS]}, NUM_ROWS + 9)
    params._bad_words_token_ids = [[7, NUM_ROWS], [7], [NUM_ROWS]]
    validate_engine_request(given, MODEL_CONFIG)
    assert params.all_stop_token_ids == {3}
    assert params.bad_words_token_ids == [[7]]


@given(
    tokens=st.lists(st.sampled_from([IMAGE, WORD, 0]), min_size=1, max_size=30),
    covered=st.lists(st.tuples(st.integers(0, 29), st.integers(1, 8)), max_size=3),
)
def test_a_request_is_refused_exactly_when_a_token_is_uncovered(
    tokens: list[int], covered: list[tuple[int, int]]
):
    inside = {i for offset, length in covered for i in range(offset, offset + length)}
    stray = [i for i, token in enumerate(tokens) if token == IMAGE and i not in inside]
    if not stray:
        validate_engine_request(request(tokens, *covered), MODEL_CONFIG)
        return
    refusal = sentence(tokens, *covered)
    assert f"has {len(stray)} image token(s)" in refusal
    assert f"the first at position {stray[0]}:" in refusal


def test_the_prompt_is_not_written_to():
    """It may be an array that vLLM goes on using."""
    tokens = np.array([IMAGE, WORD, IMAGE])
    validate_engine_request(request(tokens, (0, 1), (2, 1)), MODEL_CONFIG)
    assert tokens.tolist() == [IMAGE, WORD, IMAGE]


# -- kinds of requests -----------------------------------------------------------------------------


def test_streaming_input_is_refused():
    assert "streaming input is not supported" in sentence([WORD], resumable=True)


def test_a_prompt_of_embeddings_is_refused():
    refusal = sentence(None, prompt_embeds=torch.zeros(2, 4))
    assert "a prompt given as embeddings is not supported" in refusal


EMBEDDINGS = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill, dtype=torch.float32).to(dtype),
    st.lists(st.integers(0, 5), max_size=4),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32,
                     torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]),
    st.sampled_from([0.0, 1.0, -3.5, float("inf"), float("nan"), 1e38]),
)  # fmt: skip


@given(st.lists(EMBEDDINGS, max_size=3))
def test_image_embeddings_fit_the_decoder_or_are_refused(embeddings: list[torch.Tensor]):
    fits = all(
        each.ndim == 2
        and each.shape[1] == 4
        and len(each)
        and each.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        and each.isfinite().all()
        for each in embeddings
    )
    if fits:
        validate_image_embeddings(embeddings, 4)
    else:
        with pytest.raises(VLLMValidationError, match=r"image embedding \d of the prompt"):
            validate_image_embeddings(embeddings, 4)


def test_pooling_is_refused():
    with pytest.raises(VLLMValidationError, match="pooling requests are not supported"):
        validate_params(PoolingParams())


@pytest.mark.parametrize(
    "asked",
    [{"prompt_logprobs": 0}, {"prompt_logprobs": 3}, {"prompt_logprob_token_ids": [1, 2]}],
    ids=str,
)
def test_prompt_logprobs_are_refused_by_their_name(asked: dict[str, Any]):
    """Zero asks for them too: the prompt's own tokens."""
    with pytest.raises(VLLMValidationError, match="prompt_logprobs is not supported") as error:
        validate_params(SamplingParams(**asked))
    assert error.value.parameter == "prompt_logprobs"


@pytest.mark.parametrize(
    "asked",
    [{}, {"logprobs": 5}, {"n": 2, "seed": 1}, {"stop": ["."], "temperature": 0.0}],
    ids=str,
)
def test_other_sampling_parameters_are_accepted(asked: dict[str, Any]):
    validate_params(SamplingParams(**asked))


@pytest.mark.parametrize("asked", [{"top_k": 2**64}, {"stop": ["\ud83d"]}], ids=["number", "text"])
def test_sampling_parameters_that_cannot_be_sent_are_refused(asked: dict[str, Any]):
    """vLLM finds out when it sends them, and answers HTTP 500."""
    with pytest.raises(VLLMValidationError, match="cannot be sent to the engine"):
        validate_params(SamplingParams(**asked))


def test_sampling_parameters_may_hold_objects_where_nothing_is_sent():
    validate_params(SamplingParams(extra_args={"mine": object()}))


@pytest.mark.parametrize(("num_items", "num_tags"), [(1, 0), (3, 2)])
def test_missing_tags_are_refused_with_both_counts(num_items: int, num_tags: int):
    with pytest.raises(VLLMValidationError, match="one tag into the prompt for each") as error:
        validate_tags("image", num_items, num_tags)
    assert f"has {num_tags} image tag(s) for {num_items} image(s)" in str(error.value)
    assert error.value.parameter == "image"


PICTURE = Image.new("RGB", (4, 3))


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        ([Image.new("RGB", (0, 10))], r"image 0 of the prompt is empty: 0x10 pixels"),
        ([PICTURE, Image.new("L", (10, 0))], r"image 1 of the prompt is empty: 10x0 pixels"),
        ([None, np.zeros((0, 5, 3))], r"image 1 .* empty: an array of shape \(0, 5, 3\)"),
        ([torch.zeros(3, 7, 0)], r"image 0 .* empty: an array of shape \(3, 7, 0\)"),
    ],
)
def test_a_picture_without_pixels_is_refused_with_its_size(images: list[Any], sentence: str):
    with pytest.raises(VLLMValidationError, match=sentence) as error:
        validate_images(images)
    assert error.value.parameter == "image"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_picture_of_no_numbers_is_refused(value: float):
    array = np.zeros((2, 3, 3), np.float32)
    array[1, 2, 0] = value
    for image in (array, torch.from_numpy(array)):
        with pytest.raises(VLLMValidationError, match=r"image 1 of the prompt.*NaN or infinity"):
            validate_images([PICTURE, image])
    validate_images([np.zeros((2, 3, 3), np.uint8)])


def test_good_pictures_are_left_to_vllm():
    validate_images([PICTURE, None, np.zeros((1, 1, 3)), torch.zeros(3, 1, 1)])


# -- through vLLM's classes ------------------------------------------------------------------------


class Renderer:
    """As much of vLLM's as the hook looks at: no cache of processed pictures."""

    mm_processor_cache = None


def processor_returning(made: EngineCoreRequest, renderer: Any = Renderer) -> Any:
    """The hook around a front end that makes one request of everything."""

    class Processor:
        vllm_config = SimpleNamespace(model_config=MODEL_CONFIG, additional_config={})

        def __init__(self, vllm_config: Any = None) -> None:
            self.renderer = renderer
            self.asked: list[Any] = []

        def process_inputs(
            self, request_id: str, prompt: Any, params: Any, resumable: bool = False
        ) -> EngineCoreRequest:
            self.asked.append((request_id, prompt, params, resumable))
            return made

    module = ModuleType("vllm.v1.engine.input_processor")
    module.InputProcessor, module.BaseRenderer = Processor, Renderer
    input_processor._extend_input_processor(module)
    return Processor()


def test_the_front_end_returns_a_good_request_as_it_made_it():
    made = request([IMAGE, WORD], (0, 1))
    processor = processor_returning(made)
    assert processor.process_inputs("a", "prompt", "params", resumable=True) is made
    assert processor.asked == [("a", "prompt", "params", True)]


def test_the_front_end_returns_no_bad_request():
    processor = processor_returning(request([IMAGE, WORD]))
    with pytest.raises(VLLMValidationError, match="belong to no image"):
        processor.process_inputs("a", "prompt", "params")


@pytest.mark.parametrize("found", [[None], [0, None], [None, None]])
def test_a_picture_without_a_tag_is_refused_where_vllm_would_fail_an_assertion(found: list[Any]):
    match = BaseMultiModalProcessor._matched_updates_from_result
    updates = {"image": [["update"] for _ in found]}
    with pytest.raises(AssertionError):
        match.__wrapped__(None, updates, {"image": found})
    tags = sum(tag is not None for tag in found)
    with pytest.raises(VLLMValidationError, match=rf"has {tags} image tag\(s\) for {len(found)}"):
        match(None, updates, {"image": found})


def test_pictures_with_tags_get_what_vllm_matched():
    match = BaseMultiModalProcessor._matched_updates_from_result
    updates = {"image": [["a", "b"], ["c", "d"]]}
    assert match(None, updates, {"image": [1, 0]}) == {"image": [["b"], ["c"]]}
    assert match(None, {}, {}) == {}


def test_installing_again_wraps_nothing_twice():
    def hooked() -> tuple[Any, ...]:
        processor = BaseMultiModalProcessor
        return (
            InputProcessor.process_inputs,
            processor.apply,
            processor._matched_updates_from_result,
        )

    before = hooked()
    input_processor.install()
    after = hooked()
    assert after == before
    assert not any(hasattr(method.__wrapped__, "__wrapped__") for method in after)


def test_classes_that_are_not_as_expected_are_refused_before_they_are_changed():
    module = ModuleType("vllm")
    with pytest.raises(UnsupportedVllmError, match="no 'InputProcessor'"):
        input_processor._extend_input_processor(module)
    with pytest.raises(UnsupportedVllmError, match="no 'BaseMultiModalProcessor'"):
        input_processor._extend_multimodal_processor(module)

    class Processor:
        def __init__(self, vllm_config: Any) -> None:
            """Like vLLM's."""

        def process_inputs(self, request_id: str, prompt: Any, params: Any) -> None:
            """A vLLM that cannot stream its input."""

    module.InputProcessor, module.BaseMultiModalProcessor = Processor, Processor
    module.BaseRenderer = Renderer
    original = Processor.process_inputs
    with pytest.raises(UnsupportedVllmError, match="no parameter 'resumable'"):
        input_processor._extend_input_processor(module)
    assert Processor.process_inputs is original
    with pytest.raises(UnsupportedVllmError, match="no 'apply'"):
        input_processor._extend_multimodal_processor(module)
