# SPDX-License-Identifier: Apache-2.0
"""The embedding travels with a request's output, and nothing else about vLLM's messages changes."""

from types import ModuleType
from typing import Any

import pytest
import torch
from vllm.v1.engine import EngineCoreOutput as VllmEngineCoreOutput
from vllm.v1.engine import EngineCoreOutputs as VllmEngineCoreOutputs
from vllm.v1.engine import FinishReason
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_spyre_mm.frontend import engine_output
from vllm_spyre_mm.multimodal.embedding import MMEmbeddingInfo
from vllm_spyre_mm.scheduler.outputs import (
    EngineCoreOutput,
    EngineCoreOutputs,
    attach_mm_embeddings,
)
from vllm_spyre_mm.upstream.contract import UnsupportedVllmError

TIMESTAMP = 12.5


def encode(*outputs: Any, container: type = VllmEngineCoreOutputs) -> list[bytearray]:
    """What the engine's process puts on the wire, copied as a socket would."""
    message = container(engine_index=3, outputs=list(outputs), timestamp=TIMESTAMP)
    return [bytearray(buffer) for buffer in MsgpackEncoder().encode(message)]


def decode(frames: list[bytearray], container: type = EngineCoreOutputs) -> Any:
    return MsgpackDecoder(container).decode(frames)


def plain(request_id: str = "plain", **fields: Any) -> VllmEngineCoreOutput:
    return VllmEngineCoreOutput(request_id=request_id, new_token_ids=[5, 6], **fields)


def extended(embedding: torch.Tensor, request_id: str = "extended") -> EngineCoreOutput:
    return EngineCoreOutput(request_id=request_id, new_token_ids=[7], mm_embedding=embedding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (730, 256)], ids=["inside the message", "own frame"])
def test_an_embedding_arrives_exactly(dtype: torch.dtype, shape: tuple[int, int]):
    embedding = torch.randn(shape).to(dtype)
    frames = encode(extended(embedding))
    assert (len(frames) > 1) == (embedding.nbytes > 1000), "large tensors are frames of their own"
    (received,) = decode(frames).outputs
    assert received.mm_embedding.dtype == dtype
    assert torch.equal(received.mm_embedding, embedding)


def test_plain_and_extended_outputs_mix_in_any_order():
    embeddings = [torch.randn(n, 64).to(torch.bfloat16) for n in (3, 50)]
    reason = FinishReason.STOP
    outputs = [
        plain("a"),
        extended(embeddings[0], "b"),
        plain("c", finish_reason=reason, num_nans_in_logits=2, stop_reason="!"),
        extended(embeddings[1], "d"),
    ]
    received = decode(encode(*outputs))
    assert (received.engine_index, received.timestamp) == (3, TIMESTAMP)
    assert [output.request_id for output in received.outputs] == list("abcd")
    a, b, c, d = received.outputs
    assert a.mm_embedding is None
    assert torch.equal(b.mm_embedding, embeddings[0])
    assert (c.mm_embedding, c.finish_reason, c.stop_reason) == (None, reason, "!")
    assert (c.num_nans_in_logits, c.new_token_ids, c.finished) == (2, [5, 6], True)
    assert torch.equal(d.mm_embedding, embeddings[1])
    assert all(isinstance(output, VllmEngineCoreOutput) for output in received.outputs)


def test_a_front_end_without_the_hook_ignores_the_embedding():
    embedding = torch.randn(50, 64)
    received = decode(encode(extended(embedding), plain()), VllmEngineCoreOutputs)
    assert [output.request_id for output in received.outputs] == ["extended", "plain"]
    assert received.outputs[0].new_token_ids == [7]
    assert not hasattr(received.outputs[0], "mm_embedding")


def test_a_message_without_the_field_has_no_embedding():
    (received,) = decode(encode(plain())).outputs
    assert received.mm_embedding is None
    assert type(received) is EngineCoreOutput


def test_both_containers_are_the_same_on_the_wire():
    assert encode(plain()) == encode(plain(), container=EngineCoreOutputs)


def test_containers_share_no_list_of_outputs():
    one, other = EngineCoreOutputs(), EngineCoreOutputs()
    one.outputs.append(extended(torch.zeros(1, 1)))
    assert other.outputs == []


# -- attaching -------------------------------------------------------------------------------------


def test_each_request_gets_its_own_embedding_and_keeps_everything_else():
    first = plain("a", finish_reason=FinishReason.LENGTH, kv_transfer_params={"x": 1})
    untouched = plain("b")
    outputs = {
        0: VllmEngineCoreOutputs(outputs=[first, untouched]),
        5: VllmEngineCoreOutputs(outputs=[plain("c")]),
    }
    embeddings = {"a": torch.randn(2, 4), "c": torch.randn(3, 4)}
    infos = {name: MMEmbeddingInfo(items=[], pooling=name) for name in embeddings}
    attach_mm_embeddings(outputs, embeddings, infos)
    attached, same = outputs[0].outputs
    assert attached.mm_embedding is embeddings["a"]
    assert attached.mm_embedding_info is infos["a"]
    for name in VllmEngineCoreOutput.__struct_fields__:
        assert getattr(attached, name) == getattr(first, name)
    assert same is untouched
    assert outputs[5].outputs[0].mm_embedding is embeddings["c"]


def test_an_embedding_whose_request_is_gone_is_dropped():
    """It was aborted in the same step."""
    output = plain("a")
    outputs = {0: VllmEngineCoreOutputs(outputs=[output])}
    attach_mm_embeddings(outputs, {"aborted": torch.zeros(1, 1)}, {})
    assert outputs[0].outputs == [output]
    attach_mm_embeddings({}, {"aborted": torch.zeros(1, 1)}, {})


# -- installing ------------------------------------------------------------------------------------


def test_the_front_end_decodes_with_the_extended_class():
    from vllm.v1.engine import core_client

    engine_output.install()
    engine_output.install()
    assert core_client.EngineCoreOutputs is EngineCoreOutputs


def test_a_front_end_that_decodes_with_another_name_is_refused():
    with pytest.raises(UnsupportedVllmError, match="EngineCoreOutputs"):
        engine_output._decode_with_embedding(ModuleType("core_client"))
    module = ModuleType("core_client")
    module.EngineCoreOutputs = dict
    with pytest.raises(UnsupportedVllmError, match=r"core_client.EngineCoreOutputs is another"):
        engine_output._decode_with_embedding(module)
    assert module.EngineCoreOutputs is dict


def test_a_field_that_vllm_adds_behind_ours_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """Outputs are arrays: a field of vLLM's in our place would be read as an embedding."""

    class Newer(VllmEngineCoreOutput, array_like=True, omit_defaults=True, gc=False):
        another: int = 0

    monkeypatch.setattr(engine_output, "VllmEngineCoreOutput", Newer)
    with pytest.raises(UnsupportedVllmError, match="extended at its end"):
        engine_output.install()
