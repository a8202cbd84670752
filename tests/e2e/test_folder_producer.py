# SPDX-License-Identifier: Apache-2.0
"""A producer of features in a folder. (It runs in the test's process, which has one connector at a
time: that of tests/e2e/test_feature_folder.py is another's.)"""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines import Ask, relative_error
from tests.e2e.test_feature_folder import (
    LATER,
    TWO,
    Counts,
    answer,
    faulty_engine,
    generate,
    set_fault,
)
from tests.reference import Reference
from vllm_spyre_mm.worker import encoding


def out_of_memory(*_: Any) -> Any:
    raise MemoryError("no room")


def test_a_producer_answers_for_what_is_in_the_folder_and_goes_on_after_faults(
    llava_next_checkpoint: Path,
    llava_next_reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has no KV cache, whose blocks a failed request would give back."""
    expected = llava_next_reference.features(TWO.text, TWO.images)
    with faulty_engine(
        llava_next_checkpoint, tmp_path, "ec_producer", enable_mm_embeds=True
    ) as llm:
        since = Counts(llm)
        set_fault(llm, "save")
        failed = generate(llm, TWO)
        assert failed.finish_reason == "error"
        assert "did not take them: ConnectionError: the peer takes nothing" in failed.stop_reason
        set_fault(llm, None)
        assert generate(llm, TWO).finish_reason == "stop"
        assert since() == (4, 0)
        files = sorted(tmp_path.iterdir())
        assert len(files) == 2
        files[0].unlink()
        assert generate(llm, TWO).finish_reason == "stop"
        assert sorted(tmp_path.iterdir()) == files
        llm.llm_engine.reset_encoder_cache()
        embedding = generate(llm, TWO).mm_embedding
        assert relative_error(embedding, expected) < 1e-4
        assert since() == (0, 4)
        given = Ask(LATER.question, LATER.images).prompt
        given["multi_modal_data"] = {"image": embedding.unsqueeze(0)}
        assert answer(llm, given).finish_reason == "stop"
        assert sorted(tmp_path.iterdir()) == files
        assert since() == (0, 0)
        monkeypatch.setattr(encoding, "encode_pieces", out_of_memory)
        failed = generate(llm, LATER)
        assert failed.finish_reason == "error"
        assert "image 1 of the request could not be encoded: MemoryError" in failed.stop_reason
        monkeypatch.undo()
        assert generate(llm, LATER).finish_reason == "stop"
        assert len(list(tmp_path.iterdir())) == 3
