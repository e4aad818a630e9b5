"""Collectives over a process group that somebody else has made."""

from __future__ import annotations

from typing import Any

from moerunner.parallel.comm import Comm, TorchComm
from moerunner.parallel.layout import Layout
from moerunner.values import AXES


class GroupComm(TorchComm):
    """torch.distributed over a group whose ranks, in the group's order, are those of a layout that splits one axis.

    It makes no group of its own, so that the ranks outside of it need not take part.
    """

    def __init__(self, layout: Layout, group: Any) -> None:
        import torch.distributed as dist

        Comm.__init__(self, layout, dist.get_rank(group))
        self._dist = dist
        self._groups = dict.fromkeys((layout.split_axes, ("ep", "tp"), AXES), group)
