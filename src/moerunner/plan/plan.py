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
from moerunner.plan.steps import States, Step, check_complete, check_end, check_places, flow, start_states
from moerunner.spec import MoESpec
from moerunner.values import AXES, Replicate, ValueState

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
    def collectives(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Every collective that one forward issues on this rank, in order, without the exchange of row counts."""
        return tuple((kind, axes) for kind, axes, _ in self.traffic())

    def bytes_per_token(self) -> float:
        """Bytes that one rank sends per token of the caller, with ring algorithms and uniform routing."""
        return sum(sent for _, _, sent in self.traffic())

    def traffic(self) -> tuple[tuple[str, tuple[str, ...], float], ...]:
        """Each of `collectives` with the bytes that `bytes_per_token` counts for it."""
        issued: list[tuple[str, tuple[str, ...], float]] = []
        for s, after in zip(self.steps, self.states, strict=True):
            state = after.get(s.value)
            if state is None:
                continue
            row = state.padded_to * _BYTES[s.dtype or self.dtype]
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

    @property
    def fingerprint(self) -> str:
        """Equal on ranks that issue the same collectives for the same layer; kernels on a rank are its own affair."""
        own = {"kernel", "reason", "refused", "few", "dequantises", "one_launch"}
        steps = [{k: v for k, v in asdict(s).items() if k not in own or s.verb in ("dispatch", "combine")} for s in self.steps]
        data = [self.spec.to_dict(), asdict(self.layout), self.dtype, self.options.output, steps]
        return hashlib.sha256(json.dumps(data, default=str, sort_keys=True).encode()).hexdigest()[:16]

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
            "collectives": [{"kind": kind, "axes": list(axes)} for kind, axes in self.collectives],
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
        issued = ", ".join(f"{kind} over {'+'.join(axes)}" for kind, axes in self.collectives) or "none"
        lines.append(f"collectives: {issued}; {self.bytes_per_token():.0f} bytes sent per rank and token")
        return "\n".join(lines)


def _describe(state: ValueState) -> str:
    width = f"[T, {state.width}]" if state.padded_to == state.width else f"[T, {state.width} of {state.padded_to}]"
    facts = [f for f in ("weighted", "summed", "scaled") if getattr(state, f)]
    places = [f"{a} {_short(state.at(a))}" for a in AXES if state.at(a) != Replicate()]
    return " ".join([width, *facts, *places])


def _short(placement: object) -> str:
    return {"Partial(sum)": "partial", "Shard(dim=0)": "sharded"}.get(repr(placement), repr(placement))
