# SPDX-License-Identifier: Apache-2.0
"""Everything that a user starts ends with status 0, with the defaults: bf16 and compiled.

The demo, the examples and the scripts of the documentation are in files of their own, which look at
the status too, and every server that a test starts is told to end and does so with status 0: one
with the defaults in test_default_server.py.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.exits import PERTURBED, check_end
from vllm_spyre_mm.demo.pictures import Shape, draw_picture

CLI = ("-m", "vllm_spyre_mm.cli")
SECONDS = 500

ENGINES = """
import gc, multiprocessing, sys
from PIL import Image
from vllm import LLM, SamplingParams
from vllm_spyre_mm.demo import checkpoint_path

PROMPT = "<|user|>\\n<image>\\nWhat is in the picture?\\n<|assistant|>\\n"


def ask(ranks):
    llm = LLM(
        model=str(checkpoint_path()),
        max_model_len=512,
        kv_cache_memory_bytes=64 << 20,
        enable_return_mm_embedding=True,
        tensor_parallel_size=ranks,
    )
    prompt = {"prompt": PROMPT, "multi_modal_data": {"image": Image.open("picture.png")}}
    output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=12))[0].outputs[0]
    print("ANSWER", output.text, tuple(output.mm_embedding.shape))
    return llm


if __name__ == "__main__":
    for ranks in map(int, sys.argv[1:]):
        llm = ask(ranks)
        children = multiprocessing.active_children()
        del llm
        gc.collect()
        print("CHILDREN", *(child.exitcode for child in children))
    llm = ask(1)  # and is there when the script ends
"""
SHARED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Engines in the script's own process; ranks are processes that it starts."""


@dataclass(frozen=True)
class Run:
    """A Python program.

    Attributes:
        arguments: of the interpreter.
        prints: begins a line of its output, as often as there are lines.
        environment: more of it.
    """

    arguments: tuple[str, ...]
    prints: tuple[str, ...]
    environment: dict[str, str]


ANSWER = "ANSWER a red circle at the top left"
LOWEST = {"SPYRE_MM_CPU_TIER": "generic"}
"""Kernels are PyTorch's, whatever the CPU has."""

EMBED = (*CLI, "embed", "picture.png", "-o", "f.safetensors")
RUNS = {
    "embed": Run(EMBED, ("1 pictures in",), {}),
    "embed in the lowest tier": Run(EMBED, ("1 pictures in",), LOWEST),
    "show": Run((*CLI, "show", "picture.png", "-o", "drawn.png"), ("/",), {}),
    "models": Run((*CLI, "models"), ("Served, by model_type:",), {}),
    "engines": Run(("engines.py", "1"), (ANSWER, "CHILDREN", ANSWER), {}),
    "an engine in its own process in the lowest tier": Run(
        ("engines.py",), (ANSWER,), {**SHARED, **LOWEST}
    ),
    "engines in its own process": Run(
        ("engines.py", "1", "2"), (ANSWER, "CHILDREN", ANSWER, "CHILDREN", ANSWER), SHARED
    ),
}


Ended = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[dict[str, Future[Ended]]]":
    """All of them, two at a time: one's imports and waits overlap the other's work."""

    def run(program: Run, folder: Path) -> Ended:
        shown = draw_picture([Shape("circle", "red", "top left")], (100, 80))
        shown.image.save(folder / "picture.png")
        (folder / "engines.py").write_text(ENGINES)
        return subprocess.run(
            [sys.executable, *program.arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={**os.environ, **PERTURBED, **program.environment},
        )

    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(run, program, tmp_path_factory.mktemp("exits"))
            for name, program in RUNS.items()
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", RUNS)
def test_a_program_ends_with_status_0(programs: "dict[str, Future[Ended]]", name: str) -> None:
    ended = programs[name].result()
    check_end(ended.returncode, ended.stderr)
    assert "Traceback" not in ended.stderr
    lines = ended.stdout.splitlines()
    for begin in set(RUNS[name].prints):
        found = [line for line in lines if line.startswith(begin)]
        assert len(found) == RUNS[name].prints.count(begin), ended.stdout
    crashes = {str(-number) for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)}
    for line in lines:
        assert not (line.startswith("CHILDREN") and crashes & set(line.split())), line
