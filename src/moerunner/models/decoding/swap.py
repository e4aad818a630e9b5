"""Functions that a model's code finds by name, replaced for the calls of this thread while text is generated."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

Place = tuple[MutableMapping[str, Any], str]
"""The names of a Python module, or another table of functions, and one name in it."""

_lock = threading.Lock()
_inside = threading.local()  # how deep this thread is inside: others that run the same code go on as they were


class Swap:
    """What stands in the table: calls of threads that are inside go to `ours`, all others to `own`, which was there.

    users: who put it there and has not left.
    """

    def __init__(self, own: Callable[..., Any], ours: Callable[..., Any]) -> None:
        self.own, self.ours, self.users = own, ours, set[object]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.ours if getattr(_inside, "depth", 0) else self.own)(*args, **kwargs)


@contextmanager
def swapped(places: Sequence[Place], ours: Callable[[Any], Callable[..., Any] | None]) -> Iterator[None]:
    """Inside, the functions at these places are what `ours` makes of them; where that is None, and where there is none, all
    stays as it is. The last to leave puts back what was there, unless somebody has put another function there meanwhile."""
    me = object()
    try:
        with _lock:
            for table, name in places:
                swap = table.get(name)
                if swap is not None and not isinstance(swap, Swap):
                    made = ours(swap)
                    swap = None if made is None else Swap(swap, made)
                if swap is not None:
                    swap.users.add(me)
                    table[name] = swap
        _inside.depth = getattr(_inside, "depth", 0) + 1
        try:
            yield
        finally:
            _inside.depth -= 1
    finally:
        with _lock:
            for table, name in places:
                swap = table.get(name)
                if isinstance(swap, Swap):
                    swap.users.discard(me)
                    if not swap.users:
                        _put_back(table, name, swap.own)


def _put_back(table: MutableMapping[str, Any], name: str, own: Any) -> None:
    if not isinstance(table, dict):  # a table of Transformers, which looks into one for all of its kind for what it lacks
        del table[name]
        if table.get(name) is own:
            return
    table[name] = own
