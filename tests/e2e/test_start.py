# SPDX-License-Identifier: Apache-2.0
"""Starting: from an installed wheel, without the guard, and with checkpoints that are not whole."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests import architectures
from tests.checkpoints import edit_tensors
from tests.doctor.findings import pretend_installed
from tests.e2e.engines import engine, greedy
from vllm_spyre_mm.model_executor.checkpoint import CheckpointError

ROOT = Path(__file__).parents[2]

ASK = """
    from PIL import Image
    from vllm import LLM, SamplingParams
    import vllm_spyre_mm
    from vllm_spyre_mm.demo import checkpoint_path
    llm = LLM(model=str(checkpoint_path()), max_model_len=512, enable_return_mm_embedding=True)
    output = llm.generate(
        {"prompt": "<|user|>\\n<image>\\nWhat is in the picture?\\n<|assistant|>\\n",
         "multi_modal_data": {"image": Image.new("RGB", (60, 60), "red")}},
        SamplingParams(temperature=0, max_tokens=4),
    )[0].outputs[0]
    print("EMBEDDING", tuple(output.mm_embedding.shape), vllm_spyre_mm.__file__)
"""


def run_script(
    path: Path, code: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    path.write_text(code)
    return subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=path.parent,
        env=environment,
    )


def test_a_script_without_the_guard_gets_one_sentence(tmp_path: Path) -> None:
    code = "\n".join(line.removeprefix("    ") for line in ASK.splitlines())
    finished = run_script(tmp_path / "unguarded.py", code)
    assert finished.returncode == 1
    assert 'if __name__ == "__main__":' in finished.stderr
    assert "Traceback" not in finished.stderr
    assert "bootstrapping" not in finished.stderr


def test_a_wheel_builds_installs_and_works_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dependencies are this environment's; the package is the wheel's alone."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", ".*_cache"),
    )
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run(build, cwd=source, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(installed), str(wheel)], check=True, timeout=300)
    monkeypatch.setenv("PYTHONPATH", str(installed))
    finished = run_script(tmp_path / "ask.py", f'if __name__ == "__main__":{ASK}')
    assert finished.returncode == 0, finished.stderr[-3000:]
    line = next(line for line in finished.stdout.splitlines() if line.startswith("EMBEDDING"))
    assert ", 256) " in line
    assert line.endswith(str(installed / "vllm_spyre_mm" / "__init__.py"))
    assert "Traceback" not in finished.stderr
    assert "Compiling: 100%" in finished.stderr


@pytest.mark.parametrize(
    "command",
    [["-c", "import vllm; vllm.LLM('model')"], ["-m", "vllm.entrypoints.cli.main", "serve"]],
)
def test_a_vllm_that_is_older_stops_the_start_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    """Before anything of vLLM's that the platform leans on is touched."""
    pretend_installed(tmp_path, "vllm", "0.31.0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    finished = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert finished.returncode != 0
    last = finished.stderr.strip().splitlines()[-1]
    assert "UnsupportedVllmError: vllm-spyre-mm" in last
    assert "works with vllm<0.34,>=0.32.0, but 0.31.0 is installed" in last


NEWER = """
import sys
import vllm
from vllm.v1.core.sched.scheduler import Scheduler

if "less" in sys.argv:
    del Scheduler._reserve_prefill_lookahead
vllm.LLM(sys.argv[1], enforce_eager=True, max_model_len=512)
"""


@pytest.mark.parametrize("has", ["everything", "less"])
def test_a_vllm_that_is_newer_starts_with_a_warning_if_it_has_all_that_is_leant_on(
    demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: str
) -> None:
    pretend_installed(tmp_path, "vllm", "0.99.0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # where the script has its effect
    command = [sys.executable, "-c", NEWER, str(demo_checkpoint), has]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    output = finished.stdout + finished.stderr
    warning = "vllm 0.99.0 is newer than any that was tested (vllm<0.34,>=0.32.0): it has all"
    assert output.count(warning) == 1
    assert (finished.returncode == 0) == (has == "everything"), output
    if has == "less":
        last = finished.stderr.strip().splitlines()[-1]
        assert "UnsupportedVllmError: vLLM 0.99.0 is not as vllm-spyre-mm" in last
        assert last.endswith("Scheduler has no '_reserve_prefill_lookahead'")


def test_half_a_checkpoint_stops_the_start(demo_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    checkpoint = shutil.copytree(demo_checkpoint, tmp_path / "half")
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        names = sorted(file.keys())
    edit_tensors(checkpoint, dict.fromkeys(names[::2]))
    with pytest.raises(CheckpointError, match="cannot be served; missing: "), engine(checkpoint):
        pass


def test_a_nan_in_a_weight_stops_the_start(demo_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(demo_checkpoint, tmp_path / "nan")
    edit_tensors(checkpoint, {"image_newline": torch.full((256,), torch.nan)})
    with pytest.raises(CheckpointError, match="not finite: image_newline"), engine(checkpoint):
        pass


SERVE_WITH_A_WHOLE_TORCHVISION = """
    import sys
    from vllm_spyre_mm.compat import ensure_torchvision_importable
    ensure_torchvision_importable()
    from vllm.entrypoints.cli.main import main
    try:
        main()
    finally:
        print("LOADED", *(name for name in sys.modules if name.startswith("vllm_spyre_mm")))
"""


@pytest.mark.parametrize(
    ("plugins", "device"), [("", ()), ("some_plugin,another", ("--device", "spyre"))]
)
def test_a_vllm_without_the_plugin_finds_nothing_to_run_on(
    demo_checkpoint: Path, tmp_path: Path, plugins: str, device: tuple[str, ...]
) -> None:
    """In the lean installation: it is vLLM's own error, and nothing of the platform is there."""
    script = tmp_path / "serve.py"
    script.write_text(f'if __name__ == "__main__":{SERVE_WITH_A_WHOLE_TORCHVISION}')
    serve = ("serve", str(demo_checkpoint), "--host", "127.0.0.1", "--port", "0")
    finished = subprocess.run(
        [sys.executable, str(script), *serve, *device],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "VLLM_PLUGINS": plugins},
    )
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith("RuntimeError: Failed to infer device type")
    (loaded,) = (line for line in finished.stdout.splitlines() if line.startswith("LOADED"))
    assert set(loaded.split()[1:]) == {
        "vllm_spyre_mm",
        "vllm_spyre_mm.compat",
        "vllm_spyre_mm.environment",
    }


def test_the_length_that_fits_is_taken(demo_checkpoint: Path) -> None:
    """``--max-model-len auto``: one block is nobody's, and the longest request is served."""
    block_bytes = 64 * 4096
    with engine(demo_checkpoint, max_model_len=-1, kv_cache_memory_bytes=12 * block_bytes) as llm:
        longest = 11 * 64
        assert llm.llm_engine.model_config.max_model_len == longest
        outputs = llm.generate(
            [{"prompt_token_ids": [20] * 600}], greedy(longest, ignore_eos=True), use_tqdm=False
        )
        with pytest.raises(VLLMValidationError, match=f"maximum model length of {longest}"):
            llm.generate([{"prompt_token_ids": [20] * longest}], greedy(1), use_tqdm=False)
    assert len(outputs[0].outputs[0].token_ids) == longest - 600


@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_the_smallest_cache_serves_the_longest_request(tmp_path: Path, max_num_seqs: int) -> None:
    """One block is nobody's, the rest hold one sequence; the warmup has to do with them too."""
    checkpoint = architectures.save_checkpoint(
        tmp_path, architectures.llava(architectures.llama(num_hidden_layers=1, head_dim=32))
    )
    block_bytes = 64 * 2 * 2 * 32 * 4
    with engine(
        checkpoint,
        max_model_len=512,
        max_num_seqs=max_num_seqs,
        kv_cache_memory_bytes=9 * block_bytes,
    ) as llm:
        assert llm.llm_engine.vllm_config.cache_config.num_gpu_blocks == 9
        outputs = llm.generate(
            [{"prompt_token_ids": [20 + i] * 511} for i in range(2)],
            SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True),
            use_tqdm=False,
        )
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 1]


def test_the_shortest_lengths_are_served(demo_checkpoint: Path) -> None:
    """The warmup's made-up requests are shorter then, and pictures are left out of it."""
    answers = {}
    for length in (2, 4):
        with engine(demo_checkpoint, max_model_len=length) as llm:
            (output,) = llm.generate(
                {"prompt_token_ids": [40]}, greedy(100, ignore_eos=True), use_tqdm=False
            )
        answers[length] = list(output.outputs[0].token_ids)
        assert len(answers[length]) == length - 1
        assert output.outputs[0].finish_reason == "length"
    assert answers[4][:1] == answers[2]
