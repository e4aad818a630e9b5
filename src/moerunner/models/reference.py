"""The code of Transformers that a runner stands in for: what it was verified with, and whether it is still that.

`families/verified.json` has, for each family, the releases that it was verified with and the fingerprints of the classes in
its blocks there; `scripts/versions.py` writes it after the comparison. A fingerprint is of what a class computes: comments,
docstrings, annotations, decorators and layout do not count, and every version of Python gives the same.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from types import FunctionType
from typing import Any

from torch import nn

from moerunner.models.entry import Family
from moerunner.models.registry import forward_owner

_HOME = "transformers.models."
_DO_NOT_COUNT = ("annotation", "ctx", "kind", "returns", "type_comment", "type_params")
_one_parser = threading.Lock()  # CPython 3.11 counts the depth of its trees for all threads together, and raises SystemError


@dataclass(frozen=True)
class Verified:
    """Releases of Transformers in which a family had the same source. sources: fingerprints by class."""

    releases: tuple[str, ...]
    sources: dict[str, str]


@functools.cache
def verified() -> dict[str, tuple[Verified, ...]]:
    """What is recorded, by family. Families from elsewhere are not in it."""
    text = resources.files("moerunner.models.families").joinpath("verified.json").read_text()
    return {name: tuple(Verified(tuple(r), s) for r, s in groups) for name, groups in json.loads(text).items()}


def releases(family: str | None = None) -> list[str]:
    """The releases that a family was verified with, oldest first; without a name, those that any was."""
    records = verified().values() if family is None else [verified().get(family, ())]
    found = {release for groups in records for group in groups for release in group.releases}
    return sorted(found, key=lambda release: [int(part) for part in release.split(".")])


def unknown(family: Family, block: nn.Module) -> list[str]:
    """The classes in a block whose source is not that of any release that the family was verified with."""
    groups = verified().get(family.name, ())
    found = sources(block) if groups else {}
    return [name for name, print_ in found.items() if all(group.sources.get(name) != print_ for group in groups)]


def knows(family: Family, kind: type) -> bool:
    """Whether a class of the package that a family's block is in was a part of the block, with this source, when verified."""
    near = kind.__module__ in {name.rpartition(".")[0] for name in family.blocks}
    groups = verified().get(family.name, ()) if near else ()
    return any(kind.__qualname__ in group.sources for group in groups) and fingerprint(kind) in {
        group.sources.get(kind.__qualname__) for group in groups
    }


def warning(family: str, classes: list[str]) -> str:
    """What to say of such classes."""
    have, seen = getattr(sys.modules.get("transformers"), "__version__", ""), releases(family)
    return (
        f"Transformers {have} has another source of {', '.join(classes)} than the family {family!r} was verified with, "
        f"{seen[0]} to {seen[-1]}. See whether it still matches: moerunner verify PATH, or moerunner verify --family {family}"
    )


def sources(block: nn.Module) -> dict[str, str]:
    """The fingerprint of every class of Transformers' modelling code in a block, by name; left out where it has no source."""
    kinds = {owner: kind for kind in map(type, block.modules()) if (owner := forward_owner(kind)).__module__.startswith(_HOME)}
    found = {owner.__qualname__: fingerprint(kind) for owner, kind in kinds.items()}
    return {name: print_ for name, print_ in sorted(found.items()) if print_ is not None}


def fingerprint(kind: type) -> str | None:
    """Of the `forward` of a class, and of the methods and functions beside it that are called there. None without a source.

    `_apply_gate` too: Transformers' experts functions call it in place of `forward`.
    """
    texts: dict[Any, str] = {}
    pending: list[Any] = [inspect.unwrap(vars(forward_owner(kind))["forward"]), *_methods(kind, ("_apply_gate",))]
    while pending:
        function = pending.pop()
        if function in texts:
            continue
        try:
            texts[function], methods, names = _read(function)
        except (OSError, TypeError, SyntaxError):  # no source; not a function; not a `def`
            return None
        pending += _methods(kind, methods)
        beside = (function.__globals__.get(name) for name in names)
        pending += (f for f in beside if isinstance(f, FunctionType) and f.__module__ == function.__module__)
    return hashlib.sha256("\n".join(sorted(texts.values())).encode()).hexdigest()[:8]


def _methods(kind: type, names: tuple[str, ...]) -> Iterator[FunctionType]:
    """Of a class by name, without those of every module; properties too."""
    for name in names:
        found: Any = getattr(kind, name, None)
        found = getattr(found, "fget", found)
        found = inspect.unwrap(found) if callable(found) else None
        if isinstance(found, FunctionType) and getattr(nn.Module, name, None) is not found:
            yield found


@functools.cache
def _read(function: FunctionType) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """What a function does, as text; the attributes of `self` and the names that it speaks of."""
    source = inspect.getsource(function)
    with _one_parser:
        tree = ast.parse("if True:\n" + source if source[0].isspace() else source)
    definition = next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), None)
    if definition is None:
        raise SyntaxError("not a def")
    definition.decorator_list = []
    names = {node.id for node in ast.walk(definition) if isinstance(node, ast.Name)}
    attributes = [node for node in ast.walk(definition) if isinstance(node, ast.Attribute)]
    own = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "self"}
    return _text(definition), tuple(sorted(own)), tuple(sorted(names))


def _text(node: Any) -> str:
    """`ast.dump` differs between versions of Python; this does not."""
    if isinstance(node, list):
        return f"[{' '.join(_text(one) for one in node if not _is_docstring(one))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((name, value) for name, value in ast.iter_fields(node) if name not in _DO_NOT_COUNT)
    said = (f"{name}={_text(value)}" for name, value in fields if value is not None and value != [])
    return f"{type(node).__name__}({' '.join(said)})"


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
