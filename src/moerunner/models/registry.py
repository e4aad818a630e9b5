"""Which families are known: those of the table, those that a program registers, those of installed packages."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any

from moerunner.errors import SpecError
from moerunner.models.entry import Family
from moerunner.models.families import LEFT_ALONE, TABLE

GROUP = "moerunner.families"
_by_class: dict[str, Family] = {}
_plugins_loaded = False


def register(family: Family) -> Family:
    """Adds a family. Doing it again with the same entry changes nothing.

    Raises:
        SpecError: one of its block classes, or its name, already belongs to another entry.
    """
    for known in {id(f): f for f in _by_class.values()}.values():
        if known is not family and known != family and (known.name == family.name or set(known.blocks) & set(family.blocks)):
            raise SpecError(f"its name or a block class is taken by the family {known.name!r}", where=f"family {family.name!r}")
    _by_class.update(dict.fromkeys(family.blocks, family))
    return family


def unregister(name: str) -> None:
    """Takes back `register`."""
    for block in [block for block, family in _by_class.items() if family.name == name]:
        del _by_class[block]


def registered() -> list[Family]:
    """Every known family, by name: the table, what `register` added, and the entry points of installed packages."""
    _load_plugins()
    return sorted({f.name: f for f in _by_class.values()}.values(), key=lambda f: f.name)


def find(block: type) -> Family | None:
    """The family of a block class: of the class in its ancestry whose `forward` runs."""
    _load_plugins()
    owner = forward_owner(block)
    return _by_class.get(f"{owner.__module__}.{owner.__qualname__}")


def of_model_type(model_type: str) -> Family | None:
    """The family that a config's `model_type` names, if any. Blocks of a built model are found by `find`."""
    return next((f for f in registered() if model_type in (f.name, *f.aliases)), None)


def transformers_knows(model_type: str) -> bool:
    """Whether Transformers has a config for it, by itself or from a package that brings a family."""
    from transformers import CONFIG_MAPPING

    _load_plugins()
    return model_type in CONFIG_MAPPING


def why_not(block: type) -> str:
    """Why a block that looks like a mixture of experts has no family."""
    owner = forward_owner(block)
    name = f"{owner.__module__}.{owner.__qualname__}"
    return LEFT_ALONE.get(name, f"no family entry has the class {name}")


def forward_owner(kind: type) -> type:
    """The class in the ancestry of `kind` that defines the `forward` it runs."""
    return next(c for c in kind.__mro__ if "forward" in c.__dict__)


def _load_plugins() -> None:
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True
    for point in entry_points(group=GROUP):
        try:
            loaded: Any = point.load()
            for family in loaded if isinstance(loaded, Iterable) else (loaded,):
                register(family)
        except Exception as error:  # noqa: BLE001 - another's code, which must not stop what does not need it
            what = f"the entry point {point.value!r} in {GROUP} does not load: {type(error).__name__}: {error}"
            warnings.warn(what, stacklevel=2)


for _family in TABLE:
    register(_family)
