"""Collectives of torch.distributed, over process groups made for a layout or by somebody else."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moerunner.errors import DistributedError, UnsupportedError
from moerunner.parallel.comm import Comm
from moerunner.parallel.layout import Layout
from moerunner.parallel.watch import Watch
from moerunner.values import AXES

_SPARE = 30.0  # seconds that torch.distributed's own limit lies behind ours, which says more


class TorchComm(Comm):
    """torch.distributed over a `DeviceMesh`: NCCL on GPUs, gloo on CPUs.

    Whatever goes wrong, here or on another rank, is a `DistributedError` that names the rank, within `Layout.timeout`.
    """

    def __init__(self, layout: Layout, mesh: Any) -> None:
        import torch.distributed as dist

        super().__init__(layout, dist.get_rank())
        names = tuple(mesh.mesh_dim_names or ())
        for axis in AXES:
            size = getattr(layout, axis)
            found = mesh.size(names.index(axis)) if axis in names else 1
            if found != size:
                raise DistributedError(
                    f"the layout's {axis} is {size}, the mesh has {found}",
                    where="Layout.bind",
                    next_step='init_device_mesh(device, (dp, ep, tp), mesh_dim_names=("dp", "ep", "tp"))',
                )
        ranks = layout.group(self.rank, AXES)
        if mesh.mesh.flatten().tolist() != ranks:
            raise UnsupportedError("the mesh does not count ranks with tp fastest, then ep, then dp", where="Layout.bind")
        watch, groups = Watch.here(), {}
        for axes in (("ep",), ("tp",), ("ep", "tp"), AXES):
            for members in sorted({tuple(layout.group(rank, axes)) for rank in range(layout.world)}):
                group = watch.group(members, layout.timeout + _SPARE)
                if self.rank in members:
                    groups[axes] = group
        self._use(groups, mesh.device_type)

    def _use(self, groups: Mapping[tuple[str, ...], Any], device: str) -> None:
        import torch.distributed as dist

        self._dist, self._groups, self._watch = dist, groups, Watch.here()
        self._members = {axes: dist.get_process_group_ranks(group) for axes, group in groups.items()}
        for group in set(groups.values()):
            self._watch.keep(group, self.layout.timeout, gpu=device == "cuda")

    def failed(self, error: Exception) -> Exception:
        return error if isinstance(error, DistributedError) else self._watch.fail(error)

    def process_group(self, axes: tuple[str, ...]) -> Any:
        return self._groups[axes]

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x, on every rank; the others' give shape and dtype."""
        out = x.clone(memory_format=torch.contiguous_format)
        self._run("broadcast", AXES, out, partial(self._dist.broadcast, out, src=self._members[AXES][0]))
        return out

    def object_of_rank_0(self, item: Any) -> Any:
        """What rank 0 passed, on every rank."""
        data = _bytes(item if self.rank == 0 else None)
        size = int(self.broadcast(torch.tensor([len(data)])))
        return _object(self.broadcast(data if self.rank == 0 else data.new_empty(size)))

    def objects(self, item: Any) -> list[Any]:
        """What each rank passed, in order, on every rank."""
        data = _bytes(item)
        counts = self._gather_counts(len(data), data.device, AXES)
        return [_object(part) for part in self._all_gather(data, counts, AXES).split(counts)]

    def _start(
        self, name: str, axes: tuple[str, ...], like: Tensor, issue: Callable[..., Any], *, later: bool = True
    ) -> Callable[[], None]:
        """Issues a collective of `torch.distributed`; what is returned waits for it, on a GPU with the stream only.

        later: something is computed before that is called; otherwise a GPU needs no second stream for it.
        """
        members, timeout = self._members[axes], self.layout.timeout
        self._watch.come(members)
        what = f"{name} over {'+'.join(axes)}"
        with self._watch.lost(members, what, timeout):
            work = issue(group=self._groups[axes], async_op=later or not like.is_cuda)
        if like.is_cuda:
            return work.wait if later else lambda: None
        return lambda: self._watch.wait(work, members, what, timeout)

    def _run(self, name: str, axes: tuple[str, ...], like: Tensor, issue: Callable[..., Any]) -> None:
        self._start(name, axes, like, issue, later=False)()

    def _read(self, counts: Tensor) -> list[int]:
        """On the host; where that had to wait for a rank that has failed, an error."""
        found = counts.tolist()
        self._watch.check()
        return found

    def _gather_objects(self, item: Any, axes: tuple[str, ...]) -> list[Any]:
        what = "comparing the layers of all ranks"
        return self._watch.gather(item, self._members[axes], what, self.layout.timeout)

    def _gather_counts(self, rows: int, device: torch.device, axes: tuple[str, ...]) -> list[int]:
        mine = torch.tensor([rows], device=device)
        counts = mine.new_empty(len(self._members[axes]))
        self._run("all_gather", axes, mine, partial(self._dist.all_gather_into_tensor, counts, mine))
        return self._read(counts)

    def _all_to_all_counts(self, send: list[int], device: torch.device, axes: tuple[str, ...]) -> list[int]:
        counts = torch.tensor(send, device=device)
        received = torch.empty_like(counts)
        self._run("all_to_all", axes, counts, partial(self._dist.all_to_all_single, received, counts))
        return self._read(received)

    def _all_reduce(self, x: Tensor, axes: tuple[str, ...]) -> Tensor:
        out = x.contiguous().clone()
        self._run("all_reduce", axes, out, partial(self._dist.all_reduce, out))
        return out

    def _all_gather(self, x: Tensor, counts: list[int], axes: tuple[str, ...]) -> Tensor:
        longest = max(counts)
        padded = torch.cat([x, x.new_zeros(longest - x.shape[0], *x.shape[1:])]).contiguous()
        out = [torch.empty_like(padded) for _ in counts]
        self._run("all_gather", axes, padded, partial(self._dist.all_gather, out, padded))
        return torch.cat([rows[:n] for rows, n in zip(out, counts, strict=True)])

    def _reduce_scatter(self, x: Tensor, counts: list[int], axes: tuple[str, ...]) -> Tensor:
        longest, here = max(counts), self.index(axes)
        if not x.is_cuda:  # gloo's own is an all-reduce too, and cannot be waited for with a limit
            total = x.contiguous().clone()
            self._run("reduce_scatter", axes, total, partial(self._dist.all_reduce, total))
            return total.split(counts)[here]
        parts = [torch.cat([p, p.new_zeros(longest - p.shape[0], *p.shape[1:])]) for p in x.split(counts)]
        out, rows = torch.empty_like(parts[0]), torch.cat(parts).contiguous()
        self._run("reduce_scatter", axes, rows, partial(self._dist.reduce_scatter_tensor, out, rows))
        return out[: counts[here]]

    def _all_to_all(self, x: Tensor, send: list[int], received: list[int], axes: tuple[str, ...]) -> Callable[[], Tensor]:
        x, out = x.contiguous(), x.new_empty(sum(received), *x.shape[1:])
        wait = self._start("all_to_all", axes, x, partial(self._dist.all_to_all_single, out, x, received, send))

        def arrive() -> Tensor:
            wait()
            return out

        return arrive


def _bytes(item: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8)


def _object(data: Tensor) -> Any:
    return pickle.loads(data.numpy().tobytes())


class GroupComm(TorchComm):
    """torch.distributed over a group whose ranks, in the group's order, are those of a layout that splits one axis.

    It makes no group of its own, so that the ranks outside of it need not take part.
    """

    def __init__(self, layout: Layout, group: Any, device: str) -> None:
        import torch.distributed as dist

        Comm.__init__(self, layout, dist.get_rank(group))
        self._use(dict.fromkeys((layout.split_axes, ("ep", "tp"), AXES), group), device)
