"""Run something when a module is first imported, without importing it: how `import diffulex` stays light."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

Callback = Callable[[ModuleType], None]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module with the finders behind it and runs the callbacks after the module's own code.

    Looking for the module without importing it, and an import that fails, leave the finder in place.
    """

    def __init__(self, name: str, callback: Callback) -> None:
        self.name = name
        self.callbacks = [callback]
        self.looking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                for callback in self.callbacks:
                    callback(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def after_import(name: str, callback: Callback) -> None:
    """Call `callback(module)` once module `name` is loaded: now where it is, else right after its first import."""
    if name in sys.modules:
        callback(sys.modules[name])
        return
    finder = next((found for found in sys.meta_path if isinstance(found, _Finder) and found.name == name), None)
    if finder is None:
        sys.meta_path.insert(0, _Finder(name, callback))
    elif callback not in finder.callbacks:
        finder.callbacks.append(callback)
