# SPDX-License-Identifier: Apache-2.0
"""Runs a function on a module once that module has finished loading.

vLLM resolves its platform in the middle of its own imports. The module that a hook needs is then
loaded, or not yet imported, or half executed; importing it would be too early in the last two
cases. :func:`when_loaded` waits in each of them.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from vllm_spyre_mm.upstream.contract import require

Action = Callable[[ModuleType], None]


def when_loaded(name: str, action: Action) -> None:
    """Call ``action(module)`` as soon as the module ``name`` is loaded; at once if it is.

    What ``action`` raises reaches whoever imports the module (or the caller, if it is loaded), and
    whoever tries to import it again: the module is never had without its actions.

    Raises:
        UnsupportedVllmError: there is no such module, so that the action would never come.
    """
    module = sys.modules.get(name)
    if module is not None and not _is_loading(module):
        action(module)
    elif module is not None:
        _act_on_first_use(module, action)
    else:
        require(_exists(name), f"there is no module {name!r}")
        waiting = next((each for each in sys.meta_path if _waits_for(each, name)), None)
        if isinstance(waiting, _OnImport):
            waiting.actions.append(action)
        else:
            sys.meta_path.insert(0, _OnImport(name, action))


def _exists(name: str) -> bool:
    """Whether the module can be found; nothing is imported, its packages neither."""
    path: Sequence[str] | None = None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        package = ".".join(parts[:end])
        if package in sys.modules:
            path = getattr(sys.modules[package], "__path__", ())
            continue
        spec = importlib.machinery.PathFinder.find_spec(package, path)
        if spec is None or spec.loader is None:
            return False
        path = spec.submodule_search_locations or ()
    return True


def _is_loading(module: ModuleType) -> bool:
    # The import system's own marker of a module whose code has not run to its end.
    return bool(getattr(module.__spec__, "_initializing", False))


def _act_on_first_use(module: ModuleType, action: Action) -> None:
    """Act when an attribute of a half-executed module is read after its code has run.

    ``from module import name`` reads the attribute through the module object, so the action comes
    before anybody holds the name.
    """
    original = type(module)

    class Pending(original):  # type: ignore[misc, valid-type]
        def __getattribute__(self, attribute: str) -> Any:
            # __spec__ is what the import system itself reads while the module is loading.
            if attribute == "__spec__" or _is_loading(self):
                return original.__getattribute__(self, attribute)
            self.__class__ = original  # type: ignore[assignment]
            try:
                action(self)
            except BaseException:
                self.__class__ = Pending
                raise
            return getattr(self, attribute)

    module.__class__ = Pending


class _OnImport(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders would, with a loader that acts after execution.

    It stays until the module has been loaded and acted on once, since a module may be looked for
    without being imported, or fail to load, or to be acted on, and be imported again.
    """

    def __init__(self, name: str, action: Action) -> None:
        self.name = name
        self.actions = [action]
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name or self._searching:
            return None
        self._searching = True  # the others are asked through the same list
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ActingLoader(spec.loader, self._loaded)
        return spec

    def _loaded(self, module: ModuleType) -> None:
        for action in self.actions:
            action(module)
        sys.meta_path.remove(self)


def _waits_for(finder: object, name: str) -> bool:
    return isinstance(finder, _OnImport) and finder.name == name


class _ActingLoader(importlib.abc.Loader):
    """Executes a module with its own loader, then acts on it."""

    def __init__(self, loader: Any, action: Action) -> None:
        self.loader = loader
        self.action = action

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.action(module)

    def __getattr__(self, attribute: str) -> Any:
        # Tools ask a loader for the source, its path and resources.
        return getattr(self.loader, attribute)
