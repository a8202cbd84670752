# SPDX-License-Identifier: Apache-2.0
"""The instructions of the ``Dockerfile``, which is built where there is a builder."""

import fnmatch
import http.server
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions() -> list[tuple[str, str]]:
    """Instructions and what they are given, comments left out and lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    pairs = (line.split(maxsplit=1) for line in lines if line.strip())
    return [(name, given) for name, given in pairs]


INSTRUCTIONS = instructions()
STAGES = [i for i, (name, _) in enumerate(INSTRUCTIONS) if name == "FROM"]
BUILD, SERVE = INSTRUCTIONS[STAGES[0] : STAGES[1]], INSTRUCTIONS[STAGES[1] :]


def given(stage: list[tuple[str, str]], name: str) -> list[str]:
    return [what for instruction, what in stage if instruction == name]


def ignored(path: str) -> bool:
    """Whether a path is left out by ``.dockerignore``; the last pattern that matches decides."""
    result = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        names = [path, *path.split("/"), path.partition("/")[0]]
        if line and not line.startswith("#") and any(fnmatch.fnmatch(n, pattern) for n in names):
            result = not line.startswith("!")
    return result


def test_two_stages_of_the_pinned_python() -> None:
    assert len(STAGES) == 2
    assert f"PYTHON={PYPROJECT['tool']['upstream']['pinned']['python']}" in given(
        INSTRUCTIONS[: STAGES[0]], "ARG"
    )
    images = [what.split()[0] for name, what in INSTRUCTIONS if name == "FROM"]
    assert images == ["python:${PYTHON}-slim"] * 2


def test_what_is_copied_is_sent_and_makes_the_whole_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    copied = [words.split() for words in given(BUILD, "COPY")]
    for *names, target in copied:
        for name in names:
            assert not ignored(name), name
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / target)
            else:
                shutil.copy(ROOT / name, source / target)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "vllm_spyre_mm/demo/tiny_granite_vision/model.safetensors" in names
    assert "vllm_spyre_mm/platform.py" in names


@pytest.mark.parametrize("name", [".git", ".venv", "tests", "docs", "vllm_spyre_mm/__pycache__"])
def test_nothing_else_is_sent_to_the_builder(name: str) -> None:
    assert ignored(name)


def test_vllm_is_built_empty_in_the_pinned_version() -> None:
    (install,) = (run for run in given(BUILD, "RUN") if "pip install" in run)
    assert "VLLM_TARGET_DEVICE=empty" in install
    assert "--no-binary vllm --constraint constraints.txt" in install
    variable = re.search(r'VLLM_VERSION_OVERRIDE="(\$\(.*?\))"', install)
    assert variable is not None
    printed = subprocess.run(
        ["sh", "-c", f"echo {variable[1]}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert f"vllm=={printed}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_a_pytorch_for_cuda_stops_the_build() -> None:
    (check,) = (run for run in given(BUILD, "RUN") if run.startswith("python -c"))
    code = shlex.split(check)[2]
    for cuda, status in (("None", 0), ("'13.0'", 1)):
        fake = "from types import SimpleNamespace as S; import sys; "
        fake += f"sys.modules['torch'] = S(version=S(cuda={cuda}))\n"
        done = subprocess.run([sys.executable, "-c", fake + code], capture_output=True, text=True)
        assert done.returncode == status
        assert ("give the index of CPU wheels as PIP_EXTRA_INDEX_URL" in done.stderr) == bool(
            status
        )


def test_the_server_is_not_root_and_has_the_plugin() -> None:
    names = [name for name, _ in SERVE]
    assert given(SERVE, "USER") == ["10001"]
    assert "--uid 10001" in next(run for run in given(SERVE, "RUN"))
    assert "RUN" not in names[names.index("USER") :]
    (plugins,) = re.findall(r"VLLM_PLUGINS=(\S+)", " ".join(given(SERVE, "ENV")))
    for group in ("vllm.platform_plugins", "vllm.general_plugins"):
        assert plugins in entry_points(group=group).names


def test_the_server_is_given_flags_that_it_has() -> None:
    (entry,), (more,) = given(SERVE, "ENTRYPOINT"), given(SERVE, "CMD")
    program, command, model, *flags = [*json.loads(entry), *json.loads(more)]
    assert (program, command) == ("vllm", "serve")
    assert json.loads(*given(SERVE, "VOLUME")) == [model]
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args([model, *flags])
    assert (parsed.model_tag, parsed.device, parsed.host) == (model, "spyre", "0.0.0.0")
    assert given(SERVE, "EXPOSE") == [str(parsed.port)]


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_asks_the_server(status: int, healthy: bool) -> None:
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

    (check,) = given(SERVE, "HEALTHCHECK")
    _, *arguments = json.loads(check.partition("CMD ")[2])
    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [each.replace("8000", str(server.server_port)) for each in arguments]
        done = subprocess.run([sys.executable, *command], capture_output=True)
        server.shutdown()
    assert (done.returncode == 0) == healthy
