# SPDX-License-Identifier: Apache-2.0
"""A script that would start itself again is stopped with one sentence; no other is."""

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_spyre_mm.frontend.main_guard import SENTENCE

IMPORT = "from vllm_spyre_mm.frontend.main_guard import check_main_guard\n"

PASSES = {
    "guarded": 'if __name__ == "__main__":\n    check_main_guard()\n',
    "guarded the other way round": "if '__main__' == __name__:\n    check_main_guard()\n",
    "guarded, in a function": (
        "def main():\n    check_main_guard()\n\nif __name__ == '__main__':\n    main()\n"
    ),
    "guarded by leaving early": (
        "import sys\nif __name__ != '__main__':\n    sys.exit()\ncheck_main_guard()\n"
    ),
}

STOPS = {
    "unguarded": "check_main_guard()\n",
    "unguarded, in a function": "def main():\n    check_main_guard()\n\nmain()\n",
    "unguarded, in a class body": "class Engine:\n    check_main_guard()\n",
    "a guard that is only written about": (
        "# if __name__ == '__main__':\nprint('__name__')\ncheck_main_guard()\n"
    ),
}


def run(*arguments: str, folder: Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def script(folder: Path, body: str, name: str = "script") -> str:
    file = folder / f"{name}.py"
    file.write_text(f"{IMPORT}{body}\nprint('engine started')\n")
    return str(file)


def assert_passed(result: subprocess.CompletedProcess[str]) -> None:
    assert (result.returncode, result.stderr) == (0, "")
    assert "engine started" in result.stdout


def assert_stopped(result: subprocess.CompletedProcess[str]) -> None:
    """With the sentence alone: no traceback hides it."""
    assert result.returncode == 1
    assert result.stderr.strip() == SENTENCE
    assert "engine started" not in result.stdout


@pytest.mark.parametrize("kind", list(PASSES))
def test_a_script_that_guards_itself_passes(tmp_path: Path, kind: str):
    assert_passed(run(script(tmp_path, PASSES[kind]), folder=tmp_path))


@pytest.mark.parametrize("kind", list(STOPS))
def test_a_script_that_does_not_is_stopped(tmp_path: Path, kind: str):
    assert_stopped(run(script(tmp_path, STOPS[kind]), folder=tmp_path))


def test_code_without_a_file_passes(tmp_path: Path):
    """A new process has nothing to import."""
    code = f"{IMPORT}check_main_guard()\nprint('engine started')\n"
    assert_passed(run("-c", code, folder=tmp_path))
    assert_passed(run("-", folder=tmp_path, text=code))


def test_a_module_run_as_a_script_is_a_script(tmp_path: Path):
    script(tmp_path, "check_main_guard()\n", name="as_module")
    assert_stopped(run("-m", "as_module", folder=tmp_path))


def test_an_engine_started_by_an_import_of_an_unguarded_script_is_stopped(tmp_path: Path):
    script(tmp_path, "check_main_guard()\n", name="helper")
    assert_stopped(run(script(tmp_path, "import helper\n"), folder=tmp_path))
    assert_passed(
        run(script(tmp_path, "if __name__ == '__main__':\n    import helper\n"), folder=tmp_path)
    )


SPAWNING = """
import multiprocessing

{unguarded}

def child():
    check_main_guard()
    print("engine in a child", flush=True)

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start()
    process.join()
    print("child ended with", process.exitcode)
"""


def test_a_child_process_may_start_an_engine_of_its_own(tmp_path: Path):
    result = run(script(tmp_path, SPAWNING.format(unguarded="")), folder=tmp_path)
    assert_passed(result)
    assert "engine in a child\nchild ended with 0" in result.stdout


def test_a_child_that_imports_an_unguarded_script_is_stopped(tmp_path: Path):
    """The script looks at its name, but not before it starts an engine."""
    body = SPAWNING.format(unguarded="check_main_guard()")
    result = run(script(tmp_path, body), folder=tmp_path)
    assert SENTENCE in result.stderr
    assert "Traceback" not in result.stderr
    assert "engine in a child" not in result.stdout
    assert "child ended with 1" in result.stdout
