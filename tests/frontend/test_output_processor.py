# SPDX-License-Identifier: Apache-2.0
"""The embedding is shown on the output that ends a completion, however outputs are streamed."""

import pickle
import weakref
from types import ModuleType
from typing import Any

import pytest
import torch
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput as VllmEngineCoreOutput
from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import (
    OutputProcessor,
    RequestOutputCollector,
    RequestState,
)

from vllm_spyre_mm.frontend import output_processor
from vllm_spyre_mm.scheduler.outputs import EngineCoreOutput
from vllm_spyre_mm.upstream.contract import UnsupportedVllmError


@pytest.fixture(autouse=True)
def installed() -> None:
    """As the platform's entry point does it; more than once is harmless."""
    output_processor.install()


def completion(
    index: int = 0, embedding: torch.Tensor | None = None, *, ended: bool = False
) -> CompletionOutput:
    """As the front end makes it of a request that returns ``embedding``."""
    made = output_processor.CompletionOutput(
        index, "text", [1, 2], None, None, finish_reason="stop" if ended else None
    )
    made.returned = output_processor.ReturnedEmbedding(embedding, None)
    return made


def request_output(*completions: CompletionOutput, finished: bool = False) -> RequestOutput:
    return RequestOutput("a", "prompt", [1], None, list(completions), finished)


# -- what users see -------------------------------------------------------------------------------


def test_a_completion_that_others_make_has_no_embedding():
    assert CompletionOutput.mm_embedding is None
    assert CompletionOutput(0, "text", [1], None, None).mm_embedding is None


def test_completions_share_no_embedding():
    embedding = torch.zeros(1, 1)
    assert completion(embedding=embedding, ended=True).mm_embedding is embedding
    assert completion(ended=True).mm_embedding is None


def test_who_drops_an_embedding_frees_its_memory():
    """Also where the parts of the answer are kept."""
    processor = processor_with(RequestOutputKind.DELTA)
    (part,) = feed(processor, engine_output(10, embedding=torch.zeros(1, 1)))
    (end,) = feed(processor, engine_output(11, finished=True))
    memory = weakref.ref(end.outputs[0].mm_embedding)
    end.outputs[0].mm_embedding = None
    assert end.outputs[0].mm_embedding is None
    assert part.outputs[0].returned is end.outputs[0].returned
    assert memory() is None


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
def test_an_embedding_appears_with_the_end_that_is_merged(aggregate: bool):
    embedding = torch.randn(2, 3)
    merged = request_output(completion(embedding=embedding))
    assert merged.outputs[0].mm_embedding is None
    end = request_output(completion(embedding=embedding, ended=True), finished=True)
    merged.add(end, aggregate)
    assert merged.outputs[0].mm_embedding is embedding
    assert merged.outputs[0].text == ("texttext" if aggregate else "text")
    assert merged.finished


@pytest.mark.parametrize("aggregate", [True, False])
def test_completions_of_one_request_end_each_for_itself(aggregate: bool):
    """With ``n > 1``; one of them is new to the merged output."""
    embeddings = [torch.randn(2, 3) for _ in range(3)]
    merged = request_output(completion(0, embeddings[0]), completion(1, embeddings[1]))
    merged.add(
        request_output(*(completion(i, embeddings[i], ended=True) for i in (2, 0)), finished=True),
        aggregate,
    )
    by_index = {output.index: output.mm_embedding for output in merged.outputs}
    assert by_index[0] is embeddings[0]
    assert by_index[1] is None
    assert by_index[2] is embeddings[2]


def test_streamed_outputs_that_nobody_read_are_merged_with_the_embedding():
    """In vLLM's own queue, which hands out one output for all that came since the last."""
    queue = RequestOutputCollector(RequestOutputKind.DELTA, "a")
    processor, embedding = processor_with(RequestOutputKind.DELTA, queue), torch.randn(5, 4)
    processor.process_outputs([engine_output(10, embedding=embedding)])
    processor.process_outputs([engine_output(11)])
    processor.process_outputs([engine_output(12, finished=True)])
    output = queue.get_nowait()
    assert output.outputs[0].token_ids == [10, 11, 12]
    assert output.outputs[0].mm_embedding is embedding


def test_a_part_of_an_answer_is_pickled_without_the_embedding():
    """As programs do that hand streamed outputs to another process."""
    embedding = torch.randn(300, 4)
    part = completion(embedding=embedding)
    assert len(pickle.dumps(part)) < embedding.nbytes
    assert pickle.loads(pickle.dumps(part)) == part
    ended = pickle.loads(pickle.dumps(completion(embedding=embedding, ended=True)))
    assert torch.equal(ended.mm_embedding, embedding)


# -- the front end --------------------------------------------------------------------------------


def processor_with(
    kind: RequestOutputKind, queue: RequestOutputCollector | None = None
) -> OutputProcessor:
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
    processor.add_request(request, "prompt", queue=queue)
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
        kept = processor.request_states["a"].returned.embedding
        assert (kept.data_ptr() != embedding.data_ptr()) == is_copied
        assert kept.dtype == embedding.dtype
    frame[:] = bytes(len(frame))
    processor = processor_with(RequestOutputKind.FINAL_ONLY)
    in_frame.fill_(3)
    feed(processor, engine_output(10, embedding=in_frame))
    frame[:] = bytes(len(frame))
    assert (processor.request_states["a"].returned.embedding == 3).all()


# -- installing -----------------------------------------------------------------------------------


def test_installing_again_wraps_nothing_twice():
    process_outputs, state = OutputProcessor.process_outputs, RequestState._new_completion_output
    output_processor.install()
    assert OutputProcessor.process_outputs is process_outputs
    assert RequestState._new_completion_output is state


def test_classes_that_are_not_as_expected_are_refused_before_they_are_changed():
    with pytest.raises(UnsupportedVllmError, match="'CompletionOutput'"):
        output_processor._extend_outputs(ModuleType("vllm.outputs"))
    module = ModuleType("vllm.v1.engine.output_processor")
    module.RequestState = type("RequestState", (), {"_new_completion_output": lambda *_: None})
    module.OutputProcessor = type("OutputProcessor", (), {"process_outputs": lambda self: None})
    with pytest.raises(UnsupportedVllmError, match="no parameter 'engine_core_outputs'"):
        output_processor._extend_output_processor(module)
    assert not hasattr(module.RequestState, "returned")


def test_an_embedding_of_vllms_own_is_not_taken_for_this_one():
    """It would be filled by nobody, or by somebody else."""
    module = ModuleType("vllm.outputs")
    module.CompletionOutput = type("CompletionOutput", (), {"mm_embedding": None})
    with pytest.raises(UnsupportedVllmError, match="CompletionOutput has 'mm_embedding' of its"):
        output_processor._extend_outputs(module)
    module.RequestState = type("RequestState", (), {"returned": None})
    module.OutputProcessor = type("OutputProcessor", (), {"process_outputs": lambda *_: None})
    with pytest.raises(UnsupportedVllmError, match="RequestState has 'returned' of its own"):
        output_processor._extend_output_processor(module)
