# SPDX-License-Identifier: Apache-2.0
"""The demo and the examples, run as a user runs them, in memory that holds garbage."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from tests.e2e.exits import PERTURBED, check_end

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
EXAMPLE = EXAMPLES / "offline_inference" / "mm_embedding_example.py"


IN_ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Saves a process of the engine's; the demo and the first example have one, as users do."""


def run(*arguments: str, folder: Path, **environment: str) -> list[str]:
    """Lines that a Python program prints; it has to succeed."""
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **PERTURBED, **environment},
    )
    check_end(finished.returncode, finished.stderr)
    assert "Traceback" not in finished.stderr
    return finished.stdout.splitlines()


def after(lines: list[str], label: str) -> list[str]:
    """What follows a label, in each line that begins with it."""
    found = [line.strip() for line in lines if line.strip().startswith(label)]
    return [line.removeprefix(label).strip() for line in found]


def test_the_demo_answers_and_shows_the_embedding(tmp_path: Path) -> None:
    file = tmp_path / "demo.png"
    lines = run("-m", "vllm_spyre_mm.demo", "--output", str(file), folder=tmp_path)

    assert after(lines, "LLM.generate:") == ["What is in the picture?"]
    assert len(after(lines, "LLM.chat:")) == 1
    answers = after(lines, "answer:")
    assert len(answers) == 2
    assert answers == after(lines, "right answer:")
    # 192 x 144 pixels: 6 x 6 base features; 3 x 3 tiles without their padding are 14 x 18.
    shapes = [shape.partition(",")[0] for shape in after(lines, "mm_embedding:")]
    assert shapes == [f"{6 * 6 + 14 * (18 + 1)} x 256"] * 2

    assert lines[-1].endswith(f": {file}")
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        assert picture.getcolors(maxcolors=16) is None, "the figure has hardly a colour"


def test_the_example(tmp_path: Path) -> None:
    file = tmp_path / "embeddings.safetensors"
    more = ("--enforce-eager", "--dtype", "float32", "--output", str(file))
    lines = run(str(EXAMPLE), *more, folder=tmp_path)

    embeddings = load_file(file)
    shapes = {name: tuple(embedding.shape) for name, embedding in embeddings.items()}
    assert set(shapes) == {"circle", "square"}
    assert all(embedding.dtype == torch.float32 for embedding in embeddings.values())
    assert after(lines, "circle: What is in the picture? ->") == [
        f"'a red circle at the top left', mm_embedding: {shapes['circle']}"
    ]
    assert after(lines, "square: Where is the blue square? ->") == [
        f"'at the bottom right', mm_embedding: {shapes['square']}"
    ]
    (text_only,) = after(lines, "text only:")
    assert text_only.endswith("mm_embedding: None")
    (similarity,) = after(lines, "cosine similarity of the pictures:")
    assert -1 <= float(similarity) < 1


def test_retrieval_finds_the_same_colour_at_the_same_place_first(tmp_path: Path) -> None:
    script = EXAMPLES / "offline_inference" / "retrieval.py"
    lines = run(str(script), folder=tmp_path, **IN_ONE_PROCESS)
    answers = dict(line.split(": ", 1) for line in lines if ": " in line and "(" in line)
    assert len(answers) == 3
    for asked, found in answers.items():
        colour, place = asked.split()[0], asked.split(", ")[1]
        for name in found.split("; ")[:2]:  # there are two kinds of shapes
            assert name.startswith(f"{colour} ")
            assert f", {place} (" in name


def test_a_linear_probe_reads_the_colour(tmp_path: Path) -> None:
    script = EXAMPLES / "offline_inference" / "linear_probe.py"
    lines = run(str(script), folder=tmp_path, **IN_ONE_PROCESS)
    (line,) = (line for line in lines if line.startswith("the colour of "))
    right, total = (int(word) for word in line.split() if word.isdigit())
    assert total == 120
    assert right >= 108


def test_a_picture_that_is_encoded_once_is_asked_about(tmp_path: Path) -> None:
    script = EXAMPLES / "offline_inference" / "encode_once_ask_many.py"
    lines = run(str(script), folder=tmp_path, **IN_ONE_PROCESS)
    whole = "a red circle at the top left and a blue square at the bottom right"
    assert after(lines, "What is in the picture?") == [whole]
    assert after(lines, "Where is the red circle?") == ["at the top left"]
    assert after(lines, "What colour is the square?") == ["blue"]
