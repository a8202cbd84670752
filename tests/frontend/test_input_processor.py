# SPDX-License-Identifier: Apache-2.0
"""vLLM's front end asks whether the platform can serve a request."""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.processing.processor import BaseMultiModalProcessor
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from tests.frontend.engine_requests import IMAGE, MODEL_CONFIG, WORD, request
from vllm_spyre_mm.frontend import input_processor
from vllm_spyre_mm.upstream.contract import UnsupportedVllmError


@pytest.fixture(autouse=True)
def installed() -> None:
    """As the platform's entry point does it; more than once is harmless."""
    input_processor.install()


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
