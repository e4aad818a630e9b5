"""Specs as plain data: dataclasses to dicts and back, every unknown or missing key an error."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

from moerunner.errors import SpecError
from moerunner.spec.parts import Custom, Linear, RMSNorm, TransformOp, refuse

T = TypeVar("T")
_OPS: dict[str, type] = {kind.__name__: kind for kind in (Linear, RMSNorm, Custom)}


def to_plain(value: Any) -> Any:
    """Dicts, lists, strings, numbers and None; an operation of a transform carries its name under `op`."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        named = [{"op": type(v).__name__} if type(v).__name__ in _OPS else {} for v in value]
        return [{**name, **to_plain(v)} if name else to_plain(v) for name, v in zip(named, value, strict=True)]
    return value


def build(kind: type[T], data: Any, where: str) -> T:
    """The dataclass `kind` from plain data; `where` names the place in errors."""
    if not isinstance(data, dict):
        refuse(where, f"expects an object, not {data!r}")
    fields = dataclasses.fields(typing.cast("Any", kind))
    unknown = sorted(str(k) for k in set(data) - {f.name for f in fields})
    if unknown:
        refuse(where, f"has no field {', '.join(unknown)}", f"Known: {', '.join(sorted(f.name for f in fields))}")
    hints = typing.get_type_hints(kind)
    try:
        return kind(**{k: _parse(hints[k], v, f"{where}.{k}") for k, v in data.items()})
    except TypeError as error:
        raise SpecError(str(error), where=where) from error


def _parse(hint: Any, value: Any, where: str) -> Any:
    if hint == tuple[TransformOp, ...]:
        return tuple(_operation(op, where) for op in _list(value, where))
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return build(option, value, where)
    return tuple(value) if isinstance(value, list) else value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        refuse(where, f"expects a list, not {value!r}")
    return value


def _operation(data: Any, where: str) -> Any:
    name = data.get("op") if isinstance(data, dict) else None
    if name not in _OPS:
        refuse(where, f"has an operation {name!r}", f"Known: {', '.join(_OPS)}")
    return build(_OPS[name], {k: v for k, v in data.items() if k != "op"}, f"{where}.{name}")
