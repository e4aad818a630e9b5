"""A checked plan, and how it explains itself."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from moerunner.parallel.layout import Layout
from moerunner.plan.options import Options
from moerunner.plan.steps import States, Step, check_complete, check_end, check_places, check_streams, flow, start_states
from moerunner.spec import Linear, MoESpec
from moerunner.values import AXES, Replicate, ValueState

Collective = tuple[str, tuple[str, ...]]

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Plan:
    """The ordered steps of one layer on one layout.

    A plan that scales twice or never, reduces twice or never, transforms or adds what it must not, cannot be built: the
    constructor raises a `PlanError` that names both steps.
    """

    spec: MoESpec
    layout: Layout
    device: str
    dtype: str
    options: Options
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        check_complete(self.steps, self.spec)
        check_end(self.steps, self.states[-1], self.spec, self.wanted, self.layout.split_axes)
        check_places(self.steps)
        check_streams(self.steps)

    @property
    def wanted(self) -> str:
        """The output asked for; sharded tokens come back as they went in."""
        sharded = self.layout.tokens == "sharded" and self.options.output == "shard"
        return "replicate" if sharded else self.options.output

    @property
    def start(self) -> States:
        """The states before the first step."""
        return start_states(self.spec, self.layout, self.dtype)

    @cached_property
    def states(self) -> list[States]:
        """The states after each step."""
        return flow(self.steps, self.spec, self.start)

    def step(self, verb: str) -> Step | None:
        """The first step of this verb."""
        return next((s for s in self.steps if s.verb == verb), None)

    def at(self, verb: str) -> tuple[Step, ...]:
        """The steps that the runner carries out under this verb: the verb itself, and what was inserted before it."""
        return tuple(s for s in self.steps if (s.at or s.verb) == verb)

    @property
    def backend(self) -> str:
        found = self.step("experts")
        return found.kernel if found is not None else ""

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Every collective of rows that one forward issues on this rank, in order; `counts` stand beside them."""
        return tuple((kind, axes) for kind, axes, _ in self.traffic())

    @property
    def counts(self) -> tuple[Collective, ...]:
        """The exchanges of row counts before them: one whole number for each rank of the group."""
        found = self.step("dispatch")
        if found is None or found.kernel == "deepep":  # which exchanges them itself
            return ()
        gathered: list[Collective] = [("all_gather", found.gathers)] if found.gathers else []
        return tuple(gathered + ([("all_to_all", ("ep",))] if found.kernel == "alltoall" else []))

    @property
    def backward_collectives(self) -> tuple[Collective, ...]:
        """Every collective that one backward issues on this rank, in order, where tokens and routing weights need gradients.

        What is added up over ranks takes a collective for each dtype: that of partial sums for the tokens, the routing's for
        the rest.
        """
        dtypes = {"tokens": self.options.travels(self.dtype), "rest": "float64" if self.dtype == "float64" else "float32"}
        issued: list[Collective] = []
        for s in reversed(self.steps):
            if s.scatter or s.verb == "shard" or (s.verb == "combine" and s.axes):
                issued.append(("all_gather", s.axes))
            if s.verb in ("dispatch", "combine") and s.kernel == "alltoall":
                issued.append(("all_to_all", ("ep",)))
            if s.verb == "dispatch" and s.gathers:
                issued += [("reduce_scatter", s.gathers)] * len(set(dtypes.values()))
            if s.verb == "dispatch":
                summed = {dtypes["tokens" if part in ("tokens", "routed") else "rest"] for part in self.parts}
                issued += [("all_reduce", self.layout.split_axes)] * len(summed)
        return tuple(issued)

    @cached_property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """What is whole on ranks that each compute a part of a sum from it, and the axes of that sum.

        Its gradients are parts of a sum too: they are added up, so that every rank has them whole. `tokens` are what the
        shared experts read, `routed` what the routed ones read; tensors are named as in `MoESpec.weight_shapes`. Tokens that
        are sharded need nothing here: their gradients take the way back that they came.
        """
        found: dict[str, tuple[str, ...]] = {}
        if self.layout.tokens == "sharded":
            return found
        for s, after in zip(self.steps, self.states, strict=True):
            axes = after[s.value].partial_axes if s.value in after else ()
            if not axes:
                continue
            if s.verb == "experts":
                found["routed"] = axes
            if s.weighs:
                found["topk"] = axes
            if s.verb == "shared" and self.spec.shared is not None:
                gate = {"router": ["shared_weights"], "sigmoid": ["shared_gate"]}.get(self.spec.shared.gate, [])
                found |= dict.fromkeys(["tokens", *gate], axes)
            if s.verb == "row_norm" and self.spec.experts.row_norm is not None and self.spec.experts.row_norm.weight:
                found["row_norm"] = axes
            if s.verb in ("output_transform", "final_transform"):
                ops = self.spec.transforms()[s.verb].ops
                found |= {f"{s.verb}.{i}.weight": axes for i, op in enumerate(ops) if isinstance(op, Linear)}
        return found

    def bytes_per_token(self) -> float:
        """Bytes of rows that one rank sends per token of the caller in a forward, with ring algorithms and uniform routing."""
        return sum(sent for _, _, sent in self.traffic())

    def traffic(self) -> tuple[tuple[str, tuple[str, ...], float], ...]:
        """Each of `collectives` with the bytes that `bytes_per_token` counts for it."""
        issued: list[tuple[str, tuple[str, ...], float]] = []
        for s, after in zip(self.steps, self.states, strict=True):
            state = after.get(s.value)
            if state is None:
                continue
            row = state.padded_to * _BYTES[s.dtype or self.dtype]
            if s.kernel == "deepep":  # a token, and its sum, once for each rank that has one of its experts
                elsewhere = (self.layout.ep - 1) * (1 - (1 - 1 / self.layout.ep) ** self.spec.top_k)
                issued.append(("all_to_all", ("ep",), row * elsewhere))
                continue
            if s.verb == "dispatch" and s.gathers:
                issued.append(("all_gather", s.gathers, row * (self._ranks(s.gathers) - 1)))
            if s.verb in ("dispatch", "combine") and s.kernel == "alltoall":
                elsewhere = (self.layout.ep - 1) / self.layout.ep
                issued.append(("all_to_all", ("ep",), row * self.spec.top_k * self.layout.tp * elsewhere))
            if s.verb == "combine" and s.axes:
                issued.append(("reduce_scatter", s.axes, row * (self._ranks(s.axes) - 1)))
            if s.verb == "reduce":
                rows, ranks = self.spec.top_k if not state.summed else 1, self._ranks(s.axes)
                sent = rows * row * (ranks - 1) / ranks
                issued.append(("reduce_scatter", s.axes, sent) if s.scatter else ("all_reduce", s.axes, 2 * sent))
        return tuple(issued)

    def _ranks(self, axes: tuple[str, ...]) -> int:
        return math.prod(getattr(self.layout, axis) for axis in axes)

    def facts(self) -> dict[str, Any]:
        """What ranks must agree on that run the same layer, as plain data; kernels on a rank are its own affair."""
        own = {"kernel", "reason", "refused", "few", "dequantises", "one_launch", "side", "adds", "joined"}
        steps = [{k: v for k, v in asdict(s).items() if k not in own or s.verb in ("dispatch", "combine")} for s in self.steps]
        return {
            "spec": self.spec.to_dict(),
            "layout": asdict(self.layout),
            "dtype": self.dtype,
            "options": {"output": self.options.output, "grad": bool(self.options.grad)},
            "plan": hashlib.sha256(json.dumps(steps, default=str, sort_keys=True).encode()).hexdigest()[:16],
        }

    @property
    def fingerprint(self) -> str:
        """Equal on ranks that issue the same collectives for the same layer."""
        return hashlib.sha256(json.dumps(self.facts(), default=str, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: every step with its kernel, the reasons, and the state it leaves."""
        rows = []
        for s, states in zip(self.steps, self.states, strict=True):
            row: dict[str, Any] = {
                "verb": s.verb,
                "value": s.value,
                "name": s.name,
                "kernel": s.kernel,
                "reason": s.reason,
            }
            row["few"] = {"tokens": s.few[0], "kernel": s.few[1]} if s.few[0] else None
            row["refused"] = [{"kernel": k, "reason": r} for k, r in s.refused]
            row["state"] = _describe(states[s.value]) if s.value in states else ""
            rows.append(row)
        return {
            "device": self.device,
            "dtype": self.dtype,
            "backend": self.backend,
            "fingerprint": self.fingerprint,
            "world": self.layout.world,
            "collectives": _listed(self.collectives),
            "counts": _listed(self.counts),
            "backward_collectives": _listed(self.backward_collectives) if self.options.grad else None,
            "overlaps": [s.verb for s in self.steps if s.overlaps],
            "bytes_per_rank_per_token": self.bytes_per_token(),
            "steps": rows,
        }

    def explain(self) -> str:
        """The plan for people: each step, what runs it and why, what was refused, and the state after it."""
        data = self.to_dict()
        size = f"dp {self.layout.dp} x ep {self.layout.ep} x tp {self.layout.tp}, tokens {self.layout.tokens}"
        lines = [f"plan {data['fingerprint']}: {self.dtype} on {self.device}, {size}"]
        for number, row in enumerate(data["steps"], 1):
            lines.append(f"{number:3}. {row['name']:<34} {row['state']}")
            if row["reason"]:
                lines.append(f"       because {row['reason']}")
            if row["few"]:
                lines.append(f"       up to {row['few']['tokens']} tokens {row['few']['kernel']} instead")
            lines += [f"       not {refused['kernel']}: {refused['reason']}" for refused in row["refused"]]
        lines.append(f"collectives: {_named(self.collectives)}; {self.bytes_per_token():.0f} bytes sent per rank and token")
        if self.counts:
            lines.append(f"before them, counts of rows: {_named(self.counts)}; 8 bytes for each rank")
        if self.options.grad:
            lines.append(f"backward: {_named(self.backward_collectives)}")
        return "\n".join(lines)


def _listed(issued: tuple[Collective, ...]) -> list[dict[str, Any]]:
    return [{"kind": kind, "axes": list(axes)} for kind, axes in issued]


def _named(issued: tuple[Collective, ...]) -> str:
    return ", ".join(f"{kind} over {'+'.join(axes)}" for kind, axes in issued) or "none"


def _describe(state: ValueState) -> str:
    width = f"[T, {state.width}]" if state.padded_to == state.width else f"[T, {state.width} of {state.padded_to}]"
    facts = [f for f in ("weighted", "summed", "scaled") if getattr(state, f)]
    places = [f"{a} {_short(state.at(a))}" for a in AXES if state.at(a) != Replicate()]
    return " ".join([width, *facts, *places])


def _short(placement: object) -> str:
    return {"Partial(sum)": "partial", "Shard(dim=0)": "sharded"}.get(repr(placement), repr(placement))
