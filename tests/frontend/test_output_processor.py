# SPDX-License-Identifier: Apache-2.0
"""The embedding is shown on the output that ends a completion, however outputs are streamed."""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput as VllmEngineCoreOutput
from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from vllm_spyre_mm.frontend import output_processor
from vllm_spyre_mm.scheduler.outputs import EngineCoreOutput
from vllm_spyre_mm.upstream.contract import UnsupportedVllmError


@pytest.fixture(autouse=True)
def installed() -> None:
    """As the platform's entry point does it; more than once is harmless."""
    output_processor.install()


def completion(index: int = 0, embedding: torch.Tensor | None = None) -> CompletionOutput:
    output = CompletionOutput(index, "text", [1, 2], None, None)
    if embedding is not None:
        output.mm_embedding = embedding
    return output


def request_output(*completions: CompletionOutput, finished: bool = False) -> RequestOutput:
    return RequestOutput("a", "prompt", [1], None, list(completions), finished)


# -- what users see -------------------------------------------------------------------------------


def test_a_completion_has_no_embedding_unless_it_is_given_one():
    """The default is the class's, so that outputs which others construct have it too."""
    one, other = completion(), completion()
    assert CompletionOutput.mm_embedding is None
    assert one.mm_embedding is None
    one.mm_embedding = torch.zeros(1, 1)
    assert other.mm_embedding is None


def test_the_constructor_of_a_completion_is_vllms():
    with pytest.raises(TypeError, match="mm_embedding"):
        CompletionOutput(0, "text", [1], None, None, mm_embedding=torch.zeros(1, 1))


def ended(embedding: torch.Tensor | None = None) -> CompletionOutput:
    """The output of a request that ends with its first token, as the front end makes it."""
    processor = processor_with(RequestOutputKind.FINAL_ONLY)
    (output,) = feed(processor, engine_output(10, embedding=embedding, finished=True))
    return output.outputs[0]


def test_repr_shows_shape_and_dtype_but_no_numbers():
    shown = repr(ended(torch.full((730, 256), 7.25, dtype=torch.bfloat16)))
    assert shown.endswith("mm_embedding=Tensor((730, 256), torch.bfloat16))")
    assert "7.25" not in shown
    assert "text=''" in shown
    assert shown.count("mm_embedding=") == 1
    assert repr(ended()).endswith(", mm_embedding=None)")


# -- streamed outputs that are merged -------------------------------------------------------------


@pytest.mark.parametrize("aggregate", [True, False])
def test_an_embedding_that_comes_later_survives_the_merge(aggregate: bool):
    embedding = torch.randn(2, 3)
    merged = request_output(completion())
    merged.add(request_output(completion(embedding=embedding), finished=True), aggregate)
    assert merged.outputs[0].mm_embedding is embedding
    assert merged.outputs[0].text == ("texttext" if aggregate else "text")
    assert merged.finished


def test_an_embedding_that_is_there_is_not_lost_in_an_aggregate():
    embedding = torch.randn(2, 3)
    merged = request_output(completion(embedding=embedding))
    merged.add(request_output(completion()), aggregate=True)
    assert merged.outputs[0].mm_embedding is embedding


@pytest.mark.parametrize("aggregate", [True, False])
def test_completions_of_one_request_keep_their_own(aggregate: bool):
    """With ``n > 1``; one of them is new to the merged output."""
    embeddings = [torch.randn(2, 3) for _ in range(3)]
    merged = request_output(completion(0), completion(1))
    merged.add(
        request_output(*(completion(i, embeddings[i]) for i in (2, 0)), finished=True), aggregate
    )
    by_index = {output.index: output.mm_embedding for output in merged.outputs}
    assert by_index[0] is embeddings[0]
    assert by_index[1] is None
    assert by_index[2] is embeddings[2]


# -- the front end --------------------------------------------------------------------------------


def processor_with(kind: RequestOutputKind) -> OutputProcessor:
    """vLLM's own, with one request whose tokens are not turned into text."""
    processor = OutputProcessor(None, log_stats=False)
    params = SamplingParams(detokenize=False, output_kind=kind, max_tokens=8)
    request = EngineCoreRequest(
        request_id="a",
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id="a",
    )
    processor.add_request(request, "prompt")
    return processor


def engine_output(
    token: int, *, embedding: torch.Tensor | None = None, finished: bool = False
) -> EngineCoreOutput:
    return EngineCoreOutput(
        request_id="a",
        new_token_ids=[token],
        finish_reason=FinishReason.LENGTH if finished else None,
        mm_embedding=embedding,
    )


def feed(processor: OutputProcessor, output: VllmEngineCoreOutput) -> list[Any]:
    return processor.process_outputs([output]).request_outputs


@pytest.mark.parametrize("kind", list(RequestOutputKind), ids=lambda kind: kind.name)
def test_the_embedding_of_the_first_output_is_shown_on_the_last(kind: RequestOutputKind):
    processor, embedding = processor_with(kind), torch.randn(5, 4)
    streamed = [
        *feed(processor, engine_output(10, embedding=embedding)),
        *feed(processor, engine_output(11)),
        *feed(processor, engine_output(12, finished=True)),
    ]
    assert len(streamed) == (1 if kind == RequestOutputKind.FINAL_ONLY else 3)
    *others, last = [output.outputs[0] for output in streamed]
    assert last.mm_embedding is embedding
    assert all(output.mm_embedding is None for output in others)


def test_a_request_that_ends_with_its_first_token_has_its_embedding():
    processor, embedding = processor_with(RequestOutputKind.FINAL_ONLY), torch.randn(5, 4)
    (output,) = feed(processor, engine_output(10, embedding=embedding, finished=True))
    assert output.outputs[0].mm_embedding is embedding


def test_a_request_that_the_front_end_ends_has_its_embedding():
    """An abort makes a last output without the engine."""
    processor, embedding = processor_with(RequestOutputKind.CUMULATIVE), torch.randn(5, 4)
    feed(processor, engine_output(10, embedding=embedding))
    final = processor.request_states["a"].make_request_output([11], None, FinishReason.ABORT, None)
    assert final.outputs[0].mm_embedding is embedding


def test_outputs_of_an_engine_without_the_hook_pass():
    processor = processor_with(RequestOutputKind.FINAL_ONLY)
    plain = VllmEngineCoreOutput("a", [10], finish_reason=FinishReason.LENGTH)
    (output,) = feed(processor, plain)
    assert output.outputs[0].mm_embedding is None


def test_an_output_of_a_request_that_is_gone_passes():
    processor = processor_with(RequestOutputKind.FINAL_ONLY)
    processor.abort_requests(["a"], internal=True)
    assert feed(processor, engine_output(10, embedding=torch.randn(5, 4))) == []


def test_requests_share_no_embedding():
    first, second = (processor_with(RequestOutputKind.DELTA) for _ in range(2))
    feed(first, engine_output(10, embedding=torch.randn(5, 4)))
    (output,) = feed(second, engine_output(10, finished=True))
    assert output.outputs[0].mm_embedding is None


def test_memory_of_a_message_is_copied_and_memory_of_its_own_is_not():
    """A frame belongs to the transport, and one small tensor would keep all of it alive."""
    frame = bytearray(5 * 4 * 2)
    in_frame = torch.frombuffer(frame, dtype=torch.bfloat16).view(5, 4)
    in_frame.fill_(3)
    owned = torch.full((5, 4), 3.0)
    for embedding, is_copied in [(in_frame, True), (owned, False)]:
        processor = processor_with(RequestOutputKind.FINAL_ONLY)
        feed(processor, engine_output(10, embedding=embedding))
        kept = processor.request_states["a"].mm_embedding
        assert (kept.data_ptr() != embedding.data_ptr()) == is_copied
        assert kept.dtype == embedding.dtype
    frame[:] = bytes(len(frame))
    processor = processor_with(RequestOutputKind.FINAL_ONLY)
    in_frame.fill_(3)
    feed(processor, engine_output(10, embedding=in_frame))
    frame[:] = bytes(len(frame))
    assert (processor.request_states["a"].mm_embedding == 3).all()


# -- installing -----------------------------------------------------------------------------------


def test_installing_again_wraps_nothing_twice():
    before = RequestOutput.add, OutputProcessor.process_outputs
    state = RequestState._new_completion_output
    output_processor.install()
    after = RequestOutput.add, OutputProcessor.process_outputs
    assert after == before
    assert RequestState._new_completion_output is state


def test_classes_that_are_not_as_expected_are_refused_before_they_are_changed():
    module = ModuleType("vllm.outputs")
    with pytest.raises(UnsupportedVllmError, match="'CompletionOutput'"):
        output_processor._extend_outputs(module)

    class Completion:
        pass

    module.CompletionOutput = Completion
    module.RequestOutput = SimpleNamespace(add=lambda self, other: None)
    with pytest.raises(UnsupportedVllmError, match="no parameter 'next_output'"):
        output_processor._extend_outputs(module)
    assert not hasattr(Completion, "mm_embedding")


def test_an_embedding_of_vllms_own_is_not_taken_for_this_one():
    """It would be filled by nobody, or by somebody else."""
    module = ModuleType("vllm.outputs")
    module.CompletionOutput = type("CompletionOutput", (), {"mm_embedding": None})
    module.RequestOutput = type("RequestOutput", (), {"add": lambda *_: None})
    with pytest.raises(UnsupportedVllmError, match="CompletionOutput has 'mm_embedding' of its"):
        output_processor._extend_outputs(module)
    module.RequestState = type("RequestState", (), {"mm_embedding": None})
    module.OutputProcessor = type("OutputProcessor", (), {"process_outputs": lambda *_: None})
    with pytest.raises(UnsupportedVllmError, match="RequestState has 'mm_embedding' of its own"):
        output_processor._extend_output_processor(module)
