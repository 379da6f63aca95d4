"""For the sitecustomize.py beside this: put a defect into a module of a child process as soon as it is imported."""

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class _Finder:
    """Finds one module, once, and leaves every other to the rest."""

    def __init__(self, module: str, change: Callable[[Any], None]) -> None:
        self._module = module
        self._change = change

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_change(made: ModuleType) -> None:
            execute(made)
            self._change(made)

        spec.loader.exec_module = execute_and_change
        return spec


def when_imported(module: str, change: Callable[[Any], None]) -> None:
    """``change(the module)`` right after its import. Children of this process inherit the environment, so they do the same."""
    sys.meta_path.insert(0, _Finder(module, change))
