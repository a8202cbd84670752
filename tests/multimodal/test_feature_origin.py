# SPDX-License-Identifier: Apache-2.0
"""The origin of features changes with all that they depend on, and with nothing else."""

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from vllm.engine.arg_utils import EngineArgs

from tests.checkpoints import edit_tensors
from vllm_spyre_mm.multimodal import feature_origin
from vllm_spyre_mm.multimodal.feature_origin import COMPUTES, origin_of


@pytest.fixture
def checkpoint(llava_next_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llava_next_checkpoint, tmp_path / "model"))


def origin(checkpoint: Path, dtype: str = "float32", **arguments: Any) -> str:
    config = EngineArgs(model=str(checkpoint), dtype="float32", **arguments)
    return origin_of(config.create_engine_config(), dtype)


def changed_weight(part: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / "model.safetensors")
        name = next(each for each in sorted(tensors) if each.startswith(part))
        tensor = tensors[name].clone()
        tensor.view(-1)[0] += 1
        edit_tensors(checkpoint, {name: tensor})

    return change


def changed_processor(checkpoint: Path) -> None:
    file = checkpoint / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"]["image_mean"] = [0.4, 0.5, 0.6]
    file.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (changed_weight("vision_tower."), True),
        (changed_weight("multi_modal_projector."), True),
        (changed_weight("image_newline"), True),
        (changed_processor, True),
        (changed_weight("language_model.model.layers.0"), False),
        (lambda checkpoint: (checkpoint / "notes.txt").touch(), False),
    ],
    ids=["tower", "projector", "newline", "processor", "decoder", "other file"],
)
def test_what_lies_in_the_checkpoint_counts_not_its_path(
    checkpoint: Path, change: Callable[[Path], None], differs: bool
) -> None:
    before = origin(checkpoint)
    assert origin(checkpoint) == before
    change(checkpoint)
    assert (origin(checkpoint) != before) == differs


def test_what_the_engine_is_asked_for_counts(checkpoint: Path) -> None:
    kwargs = {"mm_processor_kwargs": {"do_resize": True}}
    found = [
        origin(checkpoint),
        origin(checkpoint, "bfloat16"),
        origin(checkpoint, **kwargs),
        origin(checkpoint, load_format="dummy"),
        origin(checkpoint, load_format="dummy", seed=1),
    ]
    assert len(set(found)) == len(found)
    assert origin(checkpoint, max_model_len=512, max_num_seqs=3) == found[0]


def test_the_processor_counts_where_the_weights_lie_elsewhere(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ``--download-dir``, which the processor's files do not go to."""
    weights = tmp_path / "weights"
    weights.mkdir()
    shutil.copy(checkpoint / "model.safetensors", weights)
    monkeypatch.setattr(feature_origin, "find_checkpoint", lambda *_: weights)
    before = origin(checkpoint)
    changed_processor(checkpoint)
    assert origin(checkpoint) != before


@pytest.mark.parametrize("name", COMPUTES)
def test_another_release_of_what_processes_or_encodes_counts(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = EngineArgs(model=str(checkpoint), load_format="dummy").create_engine_config()
    before, version = origin_of(config, "float32"), importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda asked: "9" if asked == name else version(asked)
    )
    assert origin_of(config, "float32") != before
