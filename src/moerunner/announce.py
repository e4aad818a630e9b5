"""Tells Transformers about `experts_implementation="moerunner"` when its registry is imported. No torch here.

Importing moerunner imports neither torch nor Transformers; what is registered imports the rest when it is first needed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.integrations.moe"


def register() -> None:
    """Adds the function to Transformers' registry now."""
    importlib.import_module("moerunner.models.experts_function").register()


def install() -> None:
    """Registers as soon as Transformers' registry exists. Calling it again changes nothing."""
    if REGISTRY in sys.modules:
        register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Lets the registry be imported as always, then registers, once."""

    _asking = False

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != REGISTRY or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            register()

        spec.loader.exec_module = exec_module
        return spec
