# SPDX-License-Identifier: Apache-2.0
"""vLLM's front end asks whether the platform can serve a request."""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
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


def test_installing_again_wraps_nothing_twice():
    before = InputProcessor.process_inputs
    input_processor.install()
    assert InputProcessor.process_inputs is before
    assert not hasattr(before.__wrapped__, "__wrapped__")


def test_classes_that_are_not_as_expected_are_refused_before_they_are_changed():
    module = ModuleType("vllm")
    with pytest.raises(UnsupportedVllmError, match="no 'InputProcessor'"):
        input_processor._extend_input_processor(module)

    class Processor:
        def __init__(self, vllm_config: Any) -> None:
            """Like vLLM's."""

        def process_inputs(self, request_id: str, prompt: Any, params: Any) -> None:
            """A vLLM that cannot stream its input."""

    module.InputProcessor, module.BaseRenderer = Processor, Renderer
    original = Processor.process_inputs
    with pytest.raises(UnsupportedVllmError, match="no parameter 'resumable'"):
        input_processor._extend_input_processor(module)
    assert Processor.process_inputs is original
