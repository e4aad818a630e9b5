"""Which layout for which ranks: the memory, the traffic and the time of every sensible one, from plans alone.

No process group, no GPU and no weight is needed: each layout's plan is resolved for weights without data, and what it reads,
multiplies and sends is held against what a machine can do. Times are floors, as if every kernel ran at full speed; they rank
layouts. Attention is not in them, and neither are its collectives.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moerunner.errors import CheckpointError, PlanError, SpecError, UnsupportedError
from moerunner.models.expected import zipf
from moerunner.models.inspection import Inspection, Kind, inspect
from moerunner.parallel import Layout
from moerunner.parallel.balance import imbalance, placement, rank_loads
from moerunner.parallel.comm import SimulatedComm
from moerunner.parallel.cut import local_part
from moerunner.parallel.pairs import SlotMap
from moerunner.plan import Options, Plan, resolve
from moerunner.spec import Custom, MoESpec
from moerunner.values import LayerWeights


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one GPU and its links can do.

    nvlink: bytes/s to the GPUs of its node. net: bytes/s to other nodes, for each GPU. hbm: bytes/s from memory. flops: of
    dense products per second. memory: bytes. gpus_per_node. latency: seconds that a collective takes at least.
    """

    nvlink: float
    net: float
    hbm: float
    flops: float
    memory: float
    gpus_per_node: int = 8
    latency: float = 1e-5


@dataclass(frozen=True)
class Estimate:
    """One layout on a number of ranks; times are of one step of all MoE layers, on the busiest rank.

    dispatch: the kernel between tokens and experts. weights: bytes of MoE layers on a rank; fits: with the rest of the
    model, in its memory. even, linear: the busiest rank's load over the mean, with experts placed by load and in order.
    read, compute: seconds to read weights from memory and to multiply; nvlink, net: to send within and between nodes;
    latency: of all collectives. seconds: of the step.
    """

    layout: Layout
    dispatch: str
    collectives: tuple[str, ...]
    weights: int
    fits: bool
    even: float
    linear: float
    read: float
    compute: float
    nvlink: float
    net: float
    latency: float
    seconds: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        parts = {n: getattr(self, n) for n in ("read", "compute", "nvlink", "net", "latency")}
        return max(parts, key=parts.__getitem__)

    @property
    def name(self) -> str:
        return f"dp {self.layout.dp} x ep {self.layout.ep} x tp {self.layout.tp}, {self.layout.tokens} tokens, {self.dispatch}"

    def to_dict(self) -> dict[str, Any]:
        layout = {n: getattr(self.layout, n) for n in ("dp", "ep", "tp", "tokens")}
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "layout"}
        return {**layout, **own, "bound": self.bound, "world": self.layout.world}


def look_up(path: str | None, family: str | None, dtype: torch.dtype | None = None) -> Inspection:
    """The model of a folder or a config file, or of the default config that a family has in Transformers.

    Raises:
        SpecError: neither or both are given. UnsupportedError: Transformers does not know the family.
    """
    if (path is None) == (family is None):
        raise SpecError("give either --config or --family", where="plan")
    if path is not None:
        given = Path(path)
        if given.is_file() and given.name != "config.json":
            return _of_file(given, dtype)
        return inspect(given.parent if given.is_file() else given, dtype=dtype)
    from transformers import CONFIG_MAPPING

    if family is None or family not in CONFIG_MAPPING:
        raise UnsupportedError(f"Transformers has no model type {family!r}", where="plan", next_step="moerunner families")
    with tempfile.TemporaryDirectory() as folder:
        CONFIG_MAPPING[family]().save_pretrained(folder)
        return inspect(folder, dtype=dtype or torch.bfloat16)


def _of_file(given: Path, dtype: torch.dtype | None) -> Inspection:
    """The model of a config of any name; Transformers reads config.json only."""
    with tempfile.TemporaryDirectory() as folder:
        copied = shutil.copy(given, Path(folder) / "config.json")
        try:
            return inspect(folder, dtype=dtype)
        except (CheckpointError, SpecError, UnsupportedError) as error:
            where = str(given) if error.where in (str(copied), folder) else error.where
            raise type(error)(error.what, where=where, next_step=error.next_step) from error


def estimates(
    found: Inspection,
    ranks: int,
    machine: Machine,
    *,
    tokens: int = 128,
    skew: float = 0.0,
    trace: list[list[float]] | None = None,
) -> list[Estimate]:
    """Every sensible layout of so many ranks, those that fit first, then by time.

    Args:
        found: the model, from `look_up`. tokens: of one step, per rank, so that all layouts are given the same work.
        skew, trace: how often each expert is chosen, by `zipf` or as `read_trace` gives it; times are means over its layers.

    Raises:
        UnsupportedError: the model has no MoE layer. SpecError: the trace is of another number of experts.
    """
    if not found.kinds:
        raise UnsupportedError("the model has no MoE layer that moerunner would run", where=found.path)
    loads = []
    for kind in found.kinds:
        layers = trace or [zipf(kind.spec.num_experts, skew)]
        for row in layers:
            if len(row) != kind.spec.num_experts:
                what = f"has loads of {len(row)} experts, {kind.name} has {kind.spec.num_experts}"
                raise SpecError(what, where="trace")
        loads.append(layers)
    made = [
        estimate
        for layout, dispatch in _layouts(found.kinds, ranks, machine)
        if (estimate := _estimate(found, layout, dispatch, machine, tokens, loads)) is not None
    ]
    return sorted(made, key=lambda e: (not e.fits, e.seconds, e.weights, e.layout.tp, e.layout.ep))


def reason(best: Estimate, others: Sequence[Estimate]) -> str:
    """Why the first of `estimates` is first."""
    if not best.fits:
        return "no layout fits the memory; this one would take the least time"
    words = {
        "read": "reading weights",
        "compute": "multiplying",
        "nvlink": "NVLink",
        "net": "the network",
        "latency": "latency",
    }
    text = f"{words[best.bound]} takes longest in it"
    larger = sum(not e.fits for e in others)
    if larger:
        text += f"; {larger} of {len(others)} layouts do not fit"
    second = next((e for e in others if e.fits and e is not best), None)
    if second is None:
        return text + "; no other layout fits"
    return text + f"; {second.seconds / best.seconds:.2f} times as long with {second.name}, bound by {words[second.bound]}"


def _layouts(kinds: Sequence[Kind], ranks: int, machine: Machine) -> Iterator[tuple[Layout, str]]:
    """tp within a node and dividing the width, ep up to the experts, the rest copies; tokens replicated or sharded."""
    experts = min(kind.spec.num_experts for kind in kinds)
    given = [kind.spec.experts.intermediate_size for kind in kinds]
    widths = [width for one in given for width in ((one,) if isinstance(one, int) else one)]
    for tp in (n for n in range(1, machine.gpus_per_node + 1) if ranks % n == 0 and all(w % n == 0 for w in widths)):
        for ep in (n for n in range(1, min(experts, ranks // tp) + 1) if ranks // tp % n == 0):
            size = Layout(dp=ranks // tp // ep, ep=ep, tp=tp)
            sharded = dataclasses.replace(size, tokens="sharded")
            yield size, "auto"
            if ep * tp > 1:
                yield sharded, "allgather"
            if ep > 1:
                yield sharded, "alltoall"


def _estimate(
    found: Inspection, layout: Layout, dispatch: str, machine: Machine, tokens: int, loads: Sequence[list[list[float]]]
) -> Estimate | None:
    """None where no plan can be made for the layout."""
    total: dict[str, float] = dict.fromkeys(("read", "compute", "nvlink", "net", "latency", "seconds"), 0.0)
    weights, even, linear, issued, kernel = 0, [], [], (), ""
    for kind, layers in zip(found.kinds, loads, strict=True):
        try:
            part, plan = _plan(kind, layout, dispatch)
        except (UnsupportedError, PlanError):
            return None
        step = plan.step("dispatch")
        assert step is not None
        kernel = step.kernel
        weights += kind.layers * _bytes(part)
        issued = issued or tuple(f"{name} over {'+'.join(axes)}" for name, axes in plan.collectives)
        for row in layers:
            spread = _spread(kind.spec, layout, machine, row)
            even.append(imbalance(rank_loads(row, spread)))
            linear.append(imbalance(rank_loads(row, layout.slots(len(row), kind.spec.routing.modalities))))
            for name, seconds in _times(kind.spec, part, plan, machine, tokens, row, spread, even[-1]).items():
                total[name] += seconds * kind.layers / len(layers)
    fits = weights + found.size - found.moe <= machine.memory
    mean = (sum(even) / len(even), sum(linear) / len(linear))
    return Estimate(layout, kernel, issued, weights, fits, *mean, **total)


def _plan(kind: Kind, layout: Layout, dispatch: str) -> tuple[LayerWeights, Plan]:
    """What rank 0 of the layout holds, without data, and the plan."""
    spec = kind.spec
    names: dict[str, Any] = {
        name: torch.empty(shape, dtype=torch.int64 if name == "hash_table" else getattr(torch, kind.dtype), device="meta")
        for name, shape in spec.weight_shapes(vocab_size=1).items()
    }
    for name, transform in spec.transforms().items():
        names |= {f"{name}.{i}": torch.nn.Identity() for i, op in enumerate(transform.ops) if isinstance(op, Custom)}
    slots = SlotMap(layout, spec.num_experts, spec.routing.modalities, spec.zero_experts)
    comm = SimulatedComm(layout, 0, [], threading.Barrier(1))
    part = local_part(LayerWeights.of(spec, names), spec, comm, slots)
    options = Options(grad=False, dispatch="auto" if layout.tokens == "replicated" else dispatch)  # type: ignore[arg-type]
    return part, resolve(spec, layout, part.meta(), "cpu", options)


def _bytes(part: LayerWeights) -> int:
    return sum(t.nbytes for t in part.tensors.values()) + _bytes_of_experts(part)


def _bytes_of_experts(part: LayerWeights) -> int:
    return sum(e.tensor.nbytes for one in part.experts for e in one.tensors.values())


def _spread(spec: MoESpec, layout: Layout, machine: Machine, loads: list[float]) -> tuple[tuple[int, ...], ...]:
    """Experts placed by load; by node where the ep ranks of a copy fill whole nodes."""
    span = layout.ep * layout.tp
    nodes = span // machine.gpus_per_node if span % machine.gpus_per_node == 0 else 1
    return placement(loads, layout.ep, nodes=nodes if layout.ep % nodes == 0 else 1, sets=spec.routing.modalities)


def _times(
    spec: MoESpec,
    part: LayerWeights,
    plan: Plan,
    machine: Machine,
    tokens: int,
    loads: list[float],
    spread: tuple[tuple[int, ...], ...],
    even: float,
) -> dict[str, float]:
    """Seconds of one layer on the busiest rank. Reading and multiplying overlap, as do NVLink and the network."""
    layout = plan.layout
    copy = tokens * layout.ep * layout.tp  # of one copy's ranks together
    caller = tokens if layout.tokens == "sharded" else copy
    held = sum(one.num_experts for one in part.experts)
    one_bytes = _bytes_of_experts(part) / held
    one_weights = sum(one.w13.numel() + one.w2.numel() for one in part.experts) / held
    total = math.fsum(loads)
    chosen = [min(1.0, spec.top_k * n / total) for n in loads]  # by one token
    copies = [sum(e in row for row in spread) for e in range(len(loads))]
    hit = max(math.fsum(1 - (1 - chosen[e] / copies[e]) ** copy for e in row) for row in spread)
    pairs = max(rank_loads(loads, spread)) / total * copy * spec.top_k
    rest = [t for n, t in part.tensors.items() if n != "hash_table"]
    read = (hit * one_bytes + sum(t.nbytes for t in rest)) / machine.hbm
    compute = 2 * (pairs * one_weights + caller * sum(t.numel() for t in rest if t.ndim > 1)) / machine.flops
    times = {"read": read, "compute": compute, "nvlink": 0.0, "net": 0.0, "latency": 0.0}
    step = 0.0
    for kind, axes, sent in plan.traffic():
        inside, across = _links(layout, kind, axes, caller * sent * (even if kind == "all_to_all" else 1.0), machine)
        times["nvlink"] += inside
        times["net"] += across
        times["latency"] += machine.latency
        step += max(inside, across) + machine.latency
    return {**times, "seconds": max(read, compute) + step}


def _links(layout: Layout, kind: str, axes: tuple[str, ...], sent: float, machine: Machine) -> tuple[float, float]:
    """Seconds on NVLink and on the network for what one rank sends to the group over these axes.

    Rows of an all_to_all go to each rank alike. Rings pass between nodes as often as they have ranks on one, each time by
    another network card.
    """
    group = layout.group(0, axes)
    near = sum(rank < machine.gpus_per_node for rank in group)
    if near == len(group):
        return sent / machine.nvlink, 0.0
    if kind == "all_to_all":
        others = len(group) - 1
        return sent * (near - 1) / others / machine.nvlink, sent * (others - near + 1) / others / machine.net
    return sent / machine.nvlink if near > 1 else 0.0, sent / near / machine.net
