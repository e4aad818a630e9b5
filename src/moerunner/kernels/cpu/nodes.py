"""Memory of several nodes (NUMA): each gets an equal part of a layer's experts, so that all are read at once.

Nothing is copied and no address changes: Linux moves the pages that a tensor has. Threads then take tasks of their own node's
experts first, see `experts.cpp`.
"""

from __future__ import annotations

import ctypes
import os
import platform
import warnings
from functools import cache
from pathlib import Path

from torch import Tensor

MOST = 8
"""As in `pool.h`."""
_MBIND = {"x86_64": 237, "aarch64": 235}
_PREFERRED, _MOVE = 1, 2
_seen: set[tuple[int, int]] = set()


@cache
def of_system(folder: Path = Path("/sys/devices/system/node")) -> dict[int, tuple[int, ...]]:
    """The processors that this process may run on, by the number of their node. Empty where the system does not tell."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    found = {int(node.name[4:]): _numbers((node / "cpulist").read_text()) for node in folder.glob("node[0-9]*")}
    with_ours = {node: tuple(sorted(allowed & cpus)) for node, cpus in sorted(found.items()) if allowed & cpus}
    return dict(list(with_ours.items())[:MOST])


@cache
def ours() -> tuple[tuple[int, ...], ...]:
    """The same without the numbers; none where there is but one node, so that nothing has to be told apart."""
    found = tuple(of_system().values())
    return found if len(found) > 1 else ()


@cache
def of_cpus(nodes: tuple[tuple[int, ...], ...]) -> ctypes.Array[ctypes.c_int32]:
    """For each processor by its number the place in `nodes` of the node that it belongs to."""
    table = (ctypes.c_int32 * (1 + max((max(cpus) for cpus in nodes), default=0)))()
    for place, cpus in enumerate(nodes):
        for cpu in cpus:
            table[cpu] = place
    return table


def spread(weights: Tensor) -> None:
    """Has each node of this process hold its part of the experts, [E, ...]; done once for each place in memory."""
    key = weights.data_ptr(), weights.numel()
    if key in _seen:
        return
    _seen.add(key)
    if reason := move(weights, tuple(of_system())):
        _warn(reason)


@cache
def _warn(reason: str) -> None:
    warnings.warn(f"experts stay where they are in memory, which one node has more of: {reason}", stacklevel=3)


def move(weights: Tensor, nodes: tuple[int, ...]) -> str:
    """Moves expert e of [E, ...] to the node nodes[e * len(nodes) // E]. Returns the reason where it could not."""
    number = _MBIND.get(platform.machine())
    if number is None:
        return f"not known how on {platform.machine()}"
    experts, size = len(weights), weights.stride(0) * weights.element_size()
    if not weights.numel() or size < weights[0].numel() * weights.element_size():
        return "experts do not lie one after the other"
    libc, page = ctypes.CDLL(None, use_errno=True), os.sysconf("SC_PAGE_SIZE")
    for place, node in enumerate(nodes):
        first, end = (-(-p * experts // len(nodes)) for p in (place, place + 1))
        begin = -(-(weights.data_ptr() + first * size) // page) * page  # a page that two nodes share stays where it is
        length = (weights.data_ptr() + end * size - begin) // page * page
        mask = (ctypes.c_ulong * (node // 64 + 1))()
        mask[node // 64] = 1 << node % 64
        numbers = (begin, max(length, 0), _PREFERRED, ctypes.addressof(mask), 64 * len(mask) + 1, _MOVE)
        if libc.syscall(number, *map(ctypes.c_ulong, numbers)):
            return f"the system does not move memory: {os.strerror(ctypes.get_errno())}"
    return ""


def _numbers(text: str) -> set[int]:
    """Of a list as Linux writes it, such as 0-3,8."""
    parts = [part.split("-") for part in text.strip().split(",") if part]
    return {number for part in parts for number in range(int(part[0]), int(part[-1]) + 1)}
