# SPDX-License-Identifier: Apache-2.0
"""Running requests on the stand-in card do not wait for pictures: steps are counted, no seconds."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM

from tests.e2e.engines import Ask, engine, greedy
from tests.e2e.test_server import picture
from tests.reference import Reference
from vllm_spyre_mm.worker.encode_queue import EncodedImage

PICTURES = 20
CHUNK = 128
QUESTION = "What is in the picture?"
ENGINE: dict[str, Any] = {
    "dtype": "auto",
    "enforce_eager": False,
    "max_num_batched_tokens": CHUNK,
    "max_model_len": 8192,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 64 << 20,
}


class Steps:
    """The steps of an engine in this process, while pictures are encoded in another.

    Attributes:
        tokens: of each request.
        without_token: steps in a row, the last ones, in which the request that was added first got
            no token, and the most of them so far.
        waits: steps that waited for a picture, by whether a request ran meanwhile.
        encoded: pictures.
    """

    def __init__(self, llm: LLM, patch: pytest.MonkeyPatch) -> None:
        self.engine: Any = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.worker = self.core.model_executor.driver_worker.worker
        self.tokens: Counter[str] = Counter()
        self.token_ids: dict[str, list[int]] = {}
        self.without_token, self.most_without_token = 0, 0
        self.waits: Counter[bool] = Counter()
        self.encoded = 0
        advance = self.worker.encoder.advance

        def watched(*, idle: bool) -> list[EncodedImage]:
            self.waits[bool(self.core.scheduler.running)] += idle
            done: list[EncodedImage] = advance(idle=idle)
            self.encoded += len(done)
            return done

        patch.setattr(self.worker.encoder, "advance", watched)

    def step(self) -> None:
        """One of them."""
        before = self.tokens["text"]
        for output in self.engine.step():
            self.tokens[output.request_id] = len(output.outputs[0].token_ids)
            self.token_ids[output.request_id] = list(output.outputs[0].token_ids)
        got_one = self.tokens["text"] > before
        self.without_token = 0 if got_one else self.without_token + 1
        self.most_without_token = max(self.most_without_token, self.without_token)


def test_no_step_waits_for_a_picture_while_a_request_runs(
    card: None,
    demo_checkpoint: Path,
    demo_reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = [picture(seed).image for seed in range(PICTURES)]
    with engine(demo_checkpoint, **ENGINE) as llm:
        import torch_sendnn

        steps = Steps(llm, monkeypatch)
        assert steps.worker.model.fms_model.vision_tower is None, "no second copy of the encoder"
        steps.engine.add_request("text", {"prompt": "Say."}, greedy(8000, ignore_eos=True))
        while not steps.tokens["text"]:
            steps.step()
        steps.waits.clear()
        steps.most_without_token = 0
        runs = len(torch_sendnn.record.runs)
        names = [f"picture {number}" for number in range(PICTURES)]
        for name, image in zip(names, shown, strict=True):
            steps.engine.add_request(name, Ask(QUESTION, (image,)).prompt, greedy(12))
        done = 0
        while steps.engine.get_num_unfinished_requests() > 1:
            steps.step()
            done += 1
        assert steps.encoded == PICTURES
        # A step is a decode, with a token for the text, or the chunk of a prompt, which is no
        # longer than a chunk without pictures is: one call of the device.
        assert steps.most_without_token == 1
        assert len(torch_sendnn.record.runs) - runs == done
        assert not steps.waits[True]
        assert not torch_sendnn.record.faults
        for name, image in list(zip(names, shown, strict=True))[:3]:
            text = Ask(QUESTION, (image,)).text
            certain = demo_reference.certain_tokens(text, [image], 12, margin=0.5)
            assert steps.token_ids[name][: len(certain)] == certain
            assert certain
