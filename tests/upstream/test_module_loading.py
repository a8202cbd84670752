# SPDX-License-Identifier: Apache-2.0
"""An action runs once, on a finished module, before anybody holds its names."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vllm_spyre_mm.upstream.contract import UnsupportedVllmError
from vllm_spyre_mm.upstream.module_loading import when_loaded

NAME = "spyre_hook_target"
COLLECTOR = "spyre_hook_collector"
FINISHED = "VALUE = 'original'\nFINISHED = True\n"
HALF_EXECUTED = f"""
import {COLLECTOR}
from vllm_spyre_mm.upstream.module_loading import when_loaded

when_loaded(__name__, {COLLECTOR}.action)
"""


class Recorder:
    """An action that remembers its modules and replaces a name in each."""

    def __init__(self, error: Exception | None = None) -> None:
        self.modules: list[ModuleType] = []
        self.error = error

    def __call__(self, module: ModuleType) -> None:
        assert module.FINISHED, "the module's code has run to its end"
        self.modules.append(module)
        if self.error is not None:
            raise self.error
        module.VALUE = "replaced"


@pytest.fixture(autouse=True)
def clean_import_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules come from ``tmp_path``; what a test imports or installs is gone after it."""
    modules, finders = dict(sys.modules), list(sys.meta_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.meta_path[:] = finders
    for name in sys.modules.keys() - modules.keys():
        if name.partition(".")[0].startswith("spyre_hook"):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], None]:
    """Make a module of a dotted name; its packages are made too."""

    def write(name: str, source: str) -> None:
        *packages, module = name.split(".")
        folder = tmp_path.joinpath(*packages)
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(len(packages)):
            tmp_path.joinpath(*packages[: i + 1], "__init__.py").touch()
        (folder / f"{module}.py").write_text(source)
        importlib.invalidate_caches()

    return write


def import_whole(name: str) -> Any:
    """``import name``, then the attribute."""
    return importlib.import_module(name).VALUE


def import_name(name: str) -> Any:
    """``from name import VALUE``."""
    scope: dict[str, Any] = {}
    exec(f"from {name} import VALUE", scope)
    return scope["VALUE"]


both_styles = pytest.mark.parametrize("get_value", [import_whole, import_name])


@pytest.fixture
def half_executed(
    write: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Make the target register ``action`` in the middle of its own code."""

    def make(action: Callable[[ModuleType], None], before: str = "", after: str = "") -> None:
        collector = ModuleType(COLLECTOR)
        collector.action = action
        monkeypatch.setitem(sys.modules, COLLECTOR, collector)
        write(NAME, before + HALF_EXECUTED + after + FINISHED)

    return make


# -- loaded ---------------------------------------------------------------------------------------


def test_a_loaded_module_is_acted_on_at_once(write: Callable[[str, str], None]):
    write(NAME, FINISHED)
    module, recorder = importlib.import_module(NAME), Recorder()
    when_loaded(NAME, recorder)
    assert recorder.modules == [module]
    assert module.VALUE == "replaced"


def test_an_error_on_a_loaded_module_reaches_the_caller(write: Callable[[str, str], None]):
    write(NAME, FINISHED)
    importlib.import_module(NAME)
    with pytest.raises(RuntimeError, match="unsupported"):
        when_loaded(NAME, Recorder(RuntimeError("unsupported")))


# -- not imported yet -----------------------------------------------------------------------------


@both_styles
@pytest.mark.parametrize("name", [NAME, f"{NAME}.inner.deep"])
def test_a_module_is_acted_on_when_it_is_imported(
    write: Callable[[str, str], None], get_value: Callable[[str], Any], name: str
):
    write(name, FINISHED)
    finders, recorder = list(sys.meta_path), Recorder()
    when_loaded(name, recorder)
    assert name not in sys.modules, "registering imports nothing"
    assert recorder.modules == []
    assert get_value(name) == "replaced"
    assert recorder.modules == [sys.modules[name]]
    assert sys.meta_path == finders, "nothing is left behind"
    assert get_value(name) == "replaced"
    assert len(recorder.modules) == 1


def test_other_modules_are_left_alone(write: Callable[[str, str], None]):
    write(NAME, FINISHED)
    write(f"{NAME}_other", FINISHED)
    recorder = Recorder()
    when_loaded(NAME, recorder)
    assert import_whole(f"{NAME}_other") == "original"
    assert recorder.modules == []
    assert import_whole(NAME) == "replaced"


def test_several_actions_on_one_module_all_run(write: Callable[[str, str], None]):
    write(NAME, FINISHED)
    recorders = [Recorder(), Recorder(), Recorder()]
    for recorder in recorders:
        when_loaded(NAME, recorder)
    module = importlib.import_module(NAME)
    assert [recorder.modules for recorder in recorders] == [[module]] * 3


@both_styles
def test_an_error_reaches_every_importer_and_no_module_is_left(
    write: Callable[[str, str], None], get_value: Callable[[str], Any]
):
    """Somebody may have caught the first one."""
    write(NAME, FINISHED)
    failing, other = Recorder(RuntimeError("unsupported")), Recorder()
    for recorder in (failing, other):
        when_loaded(NAME, recorder)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="unsupported"):
            get_value(NAME)
        assert NAME not in sys.modules
    assert len(failing.modules) == 3
    failing.error = None
    assert get_value(NAME) == "replaced"
    assert failing.modules[-1:] == other.modules == [sys.modules[NAME]]


def test_an_error_of_the_module_itself_is_not_hidden(write: Callable[[str, str], None]):
    write(NAME, "raise LookupError('its own')")
    recorder = Recorder()
    when_loaded(NAME, recorder)
    with pytest.raises(LookupError, match="its own"):
        importlib.import_module(NAME)
    assert recorder.modules == []


@pytest.mark.parametrize("name", [NAME, f"{NAME}.inner", "json.spyre_hook", "spyre_hook.a.b"])
def test_a_module_that_does_not_exist_is_named(name: str):
    """Its action would never come, without an error."""
    with pytest.raises(UnsupportedVllmError, match=f"there is no module {name!r}"):
        when_loaded(name, Recorder())
    assert name not in sys.modules


def test_a_package_without_code_is_not_taken_for_the_module(tmp_path: Path):
    (tmp_path / NAME).mkdir()
    with pytest.raises(UnsupportedVllmError, match="there is no module"):
        when_loaded(NAME, Recorder())


def test_asking_whether_a_module_exists_does_not_use_up_the_action(
    write: Callable[[str, str], None],
):
    """``importlib.util.find_spec`` is how one looks for a module without importing it."""
    write(NAME, FINISHED)
    recorder = Recorder()
    when_loaded(NAME, recorder)
    assert importlib.util.find_spec(NAME) is not None
    assert recorder.modules == []
    assert import_whole(NAME) == "replaced"


def test_an_import_that_failed_once_is_acted_on_when_it_succeeds(
    write: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
):
    write(NAME, f"import sys\nassert {COLLECTOR!r} in sys.modules\n{FINISHED}")
    recorder = Recorder()
    when_loaded(NAME, recorder)
    with pytest.raises(AssertionError):
        importlib.import_module(NAME)
    monkeypatch.setitem(sys.modules, COLLECTOR, ModuleType(COLLECTOR))
    assert import_whole(NAME) == "replaced"


def test_source_and_file_of_an_acted_on_module_are_still_found(
    write: Callable[[str, str], None], tmp_path: Path
):
    """Tracebacks, ``inspect`` and resources ask the loader."""
    write(NAME, FINISHED)
    when_loaded(NAME, Recorder())
    module = importlib.import_module(NAME)
    assert module.__file__ == str(tmp_path / f"{NAME}.py")
    assert module.__spec__.loader.get_source(NAME) == FINISHED


# -- half executed --------------------------------------------------------------------------------


@both_styles
def test_a_half_executed_module_is_acted_on_at_its_first_use(
    half_executed: Callable[..., None], get_value: Callable[[str], Any]
):
    """The importer that set it off gets the replaced name already."""
    recorder = Recorder()
    half_executed(recorder)
    assert get_value(NAME) == "replaced"
    assert recorder.modules == [sys.modules[NAME]]
    assert type(sys.modules[NAME]) is ModuleType, "no trace is left"
    assert get_value(NAME) == "replaced"
    assert len(recorder.modules) == 1


def test_a_module_is_not_acted_on_while_others_use_it_half_executed(
    half_executed: Callable[..., None], write: Callable[[str, str], None]
):
    """Circular imports read what is there already; that is not the end of the module."""
    recorder = Recorder()
    write(
        "spyre_hook_circular",
        f"import {NAME}\nfrom {NAME} import EARLY\nSEEN = {NAME}.EARLY, hasattr({NAME}, 'VALUE')\n",
    )
    half_executed(
        recorder, before="EARLY = 'early'\n", after="from spyre_hook_circular import SEEN\n"
    )
    module = importlib.import_module(NAME)
    assert recorder.modules == []
    assert module.SEEN == ("early", False)
    assert module.VALUE == "replaced"


@both_styles
def test_an_error_on_a_half_executed_module_reaches_every_user(
    half_executed: Callable[..., None], get_value: Callable[[str], Any]
):
    recorder = Recorder(RuntimeError("unsupported"))
    half_executed(recorder)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="unsupported"):
            get_value(NAME)
    recorder.error = None
    assert get_value(NAME) == "replaced"


def test_several_actions_on_a_half_executed_module_all_run(half_executed: Callable[..., None]):
    first, second = Recorder(), Recorder()

    def register_both(module: ModuleType) -> None:
        first(module)

    half_executed(register_both, after=f"when_loaded(__name__, {COLLECTOR}.second)\n")
    sys.modules[COLLECTOR].second = second
    assert import_name(NAME) == "replaced"
    assert [recorder.modules for recorder in (first, second)] == [[sys.modules[NAME]]] * 2
