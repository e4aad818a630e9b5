"""Which expert backends exist, which one runs, and why the others do not.

A backend is one file of this package and one line in `_BUILT_IN`. Third parties add theirs with `register` or through the
entry point group `moerunner.backends`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points

from moerunner.errors import UnsupportedError
from moerunner.experts.base import Backend, BackendInfo, Request, refusals, unavailable

_BUILT_IN = {
    "eager": "moerunner.experts.eager",
    "grouped_mm": "moerunner.experts.grouped_mm",
    "cpu": "moerunner.experts.cpu",
    "triton": "moerunner.experts.triton",
}
_registered: dict[str, Backend] = {}


@dataclass(frozen=True)
class Chosen:
    """The backend, the reason for it, and every other with the reason against it.

    few: another that takes its place up to a number of tokens.
    """

    backend: Backend
    reason: str
    refused: tuple[tuple[str, str], ...]
    few: tuple[int, Backend] | None = None


def register(backend: Backend) -> None:
    """Makes a third party's backend available under its `INFO.name`; a name that is taken is an error."""
    name = backend.INFO.name
    if name in _BUILT_IN or name in _registered:
        raise UnsupportedError(f"a backend {name!r} exists", where="experts.register", next_step="Choose another name")
    _registered[name] = backend


def unregister(name: str) -> None:
    """Takes back `register`."""
    _registered.pop(name, None)


@cache
def _entry_points() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group="moerunner.backends")}


def names() -> list[str]:
    return [*_BUILT_IN, *_registered, *_entry_points()]


def get(name: str) -> Backend:
    """The backend of this name, imported on first use."""
    if name in _registered:
        return _registered[name]
    path = _BUILT_IN.get(name) or _entry_points().get(name)
    if path is None:
        raise UnsupportedError(f"no backend is called {name!r}", where="backend", next_step=f"Known: {', '.join(names())}")
    module, _, attribute = path.partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded  # type: ignore[return-value]


def choose(request: Request, backend: str = "auto") -> Chosen:
    """The named backend, or with "auto" the preferred one among those that can do what is asked.

    Raises:
        UnsupportedError: none can, or the named one cannot; the reason of each is in the message.
    """
    if backend != "auto":
        found = get(backend)
        why = refusals(found.INFO, request)
        if why:
            raise UnsupportedError("; ".join(why), where=f"backend {backend!r}", next_step="Use backend='auto'")
        return Chosen(found, "asked for", ())
    able: list[tuple[int, Backend]] = []
    refused: list[tuple[str, str]] = []
    for name in names():
        candidate = get(name)
        why = refusals(candidate.INFO, request)
        if why:
            refused.append((name, "; ".join(why)))
        else:
            able.append((_priority(candidate.INFO, request), candidate))
    if not able:
        each = "; ".join(f"{name}: {why}" for name, why in refused)
        raise UnsupportedError(f"no backend can run this layer ({each})", where="experts")
    able.sort(key=lambda pair: -pair[0])
    best = able[0][1]
    refused += [(b.INFO.name, f"{best.INFO.name} is preferred on {request.device}") for _, b in able[1:]]
    few = [(b.INFO.few_tokens.get(request.device, 0), b) for _, b in able if _interchangeable(b.INFO, best.INFO)]
    limit, small = max(few, key=lambda pair: pair[0])  # of equals the preferred one
    limit = 0 if small is best or request.batch_invariant else limit  # other kernels, other bits
    reason = f"preferred on {request.device} among {len(able)} that can"
    return Chosen(best, reason, tuple(refused), (limit, small) if limit else None)


def _priority(info: BackendInfo, request: Request) -> int:
    return info.priority.get(f"{request.device}/{request.dtype}", info.priority.get(request.device, 0))


def _interchangeable(one: BackendInfo, other: BackendInfo) -> bool:
    """Whether kernels may change with the number of tokens while who scales and who reduces stays."""
    return (one.applies_scale, one.reduced) == (other.applies_scale, other.reduced)


def available(device: str) -> list[tuple[str, bool, str]]:
    """Every backend with whether it runs on this device type, and the reason: for `moerunner env`."""
    rows = []
    for name in names():
        info: BackendInfo = get(name).INFO
        absent = unavailable(info)
        if absent:
            rows.append((name, False, absent))
        elif device in info.dtypes:
            rows.append((name, True, f"{', '.join(sorted(info.dtypes[device]))}"))
        else:
            rows.append((name, False, f"runs on {', '.join(sorted(info.dtypes))}"))
    return rows
