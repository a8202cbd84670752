# SPDX-License-Identifier: Apache-2.0
"""A start in what looks like an image for a card: the doctor has nothing to say of it, and a known
model runs with its known configuration."""

from pathlib import Path

import pytest
import torch

from tests.doctor.card_hosts import image
from tests.e2e.engines import engine, greedy
from vllm_spyre_mm.doctor import examine_card
from vllm_spyre_mm.model_executor.card import limits
from vllm_spyre_mm.model_executor.card.limits import DecoderSize, KnownConfiguration, KnownModel

DEMO = KnownModel(
    "The demo",
    DecoderSize("granite", 4, 256, 512, 8192, num_attention_heads=4, num_key_value_heads=2),
    (KnownConfiguration(1, 256, 3, max_batch_tkv=512),),
)


def test_a_known_model_in_an_image(
    card: None, demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "KNOWN_MODELS", (*limits.KNOWN_MODELS, DEMO))
    host = image(tmp_path)
    for name, value in host.variables.items():
        monkeypatch.setenv(name, value)
    findings = [finding for finding in examine_card(host) if finding.check != "torch_sendnn"]
    assert {finding.level for finding in findings} == {"ok"}
    torch._dynamo.reset()
    given = {"max_model_len": None, "max_num_seqs": None, "kv_cache_memory_bytes": None}
    chunk = {"dtype": "auto", "enforce_eager": False, "max_num_batched_tokens": 128}
    with engine(demo_checkpoint, **chunk, **given) as llm:
        import torch_sendnn

        config = llm.llm_engine.vllm_config
        assert config.model_config.max_model_len == 256
        assert config.scheduler_config.max_num_seqs == 3
        # A decode reads two rows of 256 tokens, and block 0 pads: nine blocks, a multiple of three.
        assert config.cache_config.num_gpu_blocks == 9
        prompts = ["Where is the red circle?"] * 4
        outputs = llm.generate(prompts, greedy(8), use_tqdm=False)
        assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
        assert not torch_sendnn.record.faults
        assert torch_sendnn.record.environment["VLLM_DT_MAX_BATCH_TKV_LIMIT"] == "512"
        caches = [value for graph in torch_sendnn.record.graphs for value in graph.items()]
        blocks = {value.shape[0] for name, value in caches if "past_key_value" in name}
        assert blocks == {9}
