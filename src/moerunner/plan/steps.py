"""The steps a plan is made of, and what each does to the states of the values.

Values: `tokens` (the caller's), `topk` (ids and weights), `routed`, `shared`, `zero` (identity experts), `out`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moerunner.errors import PlanError
from moerunner.parallel.layout import Layout
from moerunner.spec import MoESpec
from moerunner.values import AXES, Partial, Replicate, Shard, ValueState

States = dict[str, ValueState]

# The runner's verbs in the order in which it runs them, each with the value that it changes. What a plan inserts (a reduction,
# a selection, an early trim) runs with the verb that it stands before, on one of the values named for it in INSERTED.
ORDER = {
    "gate": "topk",
    "route": "topk",
    "zero": "zero",
    "input_transform": "routed",
    "pad": "routed",
    "dispatch": "routed",
    "shared": "shared",
    "experts": "routed",
    "row_norm": "routed",
    "combine": "routed",
    "trim": "routed",
    "scale": "routed",
    "output_transform": "routed",
    "join": "out",
    "final_transform": "out",
    "finish": "out",
}
INSERTED = {
    "row_norm": ("routed",),
    "combine": ("routed",),
    "output_transform": ("routed",),
    "join": ("routed", "shared", "zero"),
    "final_transform": ("out",),
    "finish": ("out",),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step.

    verb: what it does, of the runner's list, or `reduce`, `select`. at: the verb of the runner that carries it out.
    value: what it changes. reads: what it computes from, where that is another value.
    kernel, reason, refused: what runs it, why, and why not the others. few: another up to so many tokens.
    dequantises: the format that is turned into plain weights first. axes: of the ranks it concerns.
    width: features after a pad, trim or transform. linear: of a transform. scales, weighs, sums: a kernel's or router's facts.
    adds: an experts kernel adds the shared experts' output. joined: of a shared step, up to so many tokens, its products are in
    the launches of the router and of the experts.
    rounds: a kernel gives the tokens' dtype, as nothing computes with its sums.
    scatter: a reduction that leaves each rank its own rows. overlaps: runs while dispatched tokens travel.
    one_launch: of a route, the kernels that do it from logits to weights at once; of a shared step, those of what stands beside
    its products. side: up to so many tokens, on a side stream of the GPU.
    """

    verb: str
    value: str = "routed"
    at: str = ""
    reads: str = ""
    kernel: str = ""
    reason: str = ""
    refused: tuple[tuple[str, str], ...] = ()
    few: tuple[int, str] = (0, "")
    dequantises: str = ""
    axes: tuple[str, ...] = ()
    gathers: tuple[str, ...] = ()
    takes: int = 0
    width: int = 0
    linear: bool = True
    scales: bool = False
    weighs: bool = False
    sums: bool = False
    rounds: bool = False
    adds: bool = False
    joined: int = 0
    scatter: bool = False
    overlaps: bool = False
    one_launch: str = ""
    side: int = 0
    dtype: str = ""

    @property
    def name(self) -> str:
        """For people: the verb, its value where that is not plain, its axes and kernel."""
        of = f" {self.value}" if self.verb in ("reduce", "select", "trim", "shard") else ""
        over = f" over {'+'.join(self.axes)}" if self.axes and self.verb in ("reduce", "select") else ""
        return f"{self.verb}{of}{over}" + (f" ({self.kernel})" if self.kernel else "")


def start_states(spec: MoESpec, layout: Layout, dtype: str) -> States:
    """The caller's tokens, which the routed value starts as. Copies (dp) always have tokens of their own."""
    split = Replicate() if layout.tokens == "replicated" else Shard(0)
    dp, ep, tp = (Replicate() if getattr(layout, axis) == 1 else (Shard(0) if axis == "dp" else split) for axis in AXES)
    width = spec.hidden_size
    tokens = ValueState(width, width, False, False, False, dtype, (dp, ep, tp))
    return {"tokens": tokens, "routed": tokens}


def flow(steps: tuple[Step, ...], spec: MoESpec, start: States) -> list[States]:
    """The states after each step; the first contradiction is a `PlanError` that names both steps."""
    states, after = dict(start), []
    for step in steps:
        if step.verb not in _EFFECTS:
            raise PlanError(f"the runner has no verb {step.verb!r}", first="the spec", second=step.name)
        for value in _needs(step):
            if value not in states:
                raise PlanError(f"reads '{value}', which no step before it makes", first="the input", second=step.name)
        if step.verb in ("gate", "shared", "zero") and step.reads != "tokens":
            raise PlanError(
                f"reads '{step.reads}' instead of the caller's tokens",
                first=states[step.reads].maker("width") if step.reads in states else "the input",
                second=step.name,
            )
        states = {**states, **_EFFECTS[step.verb](step, states, spec)}
        if step.verb == "experts" and step.adds:
            del states["shared"]
        after.append(dict(states))
    return after


def _needs(step: Step) -> tuple[str, ...]:
    return {
        "gate": (step.reads,),
        "route": ("tokens",),
        "shared": (step.reads,),
        "zero": (step.reads, "topk"),
        "dispatch": ("routed", "topk"),
        "experts": ("routed", "topk", *(["shared"] if step.adds else [])),
        "combine": ("routed", "topk"),
        "shard": ("out",),
        "join": ("routed",),
    }.get(step.verb, (step.value,))


def _route(step: Step, states: States, spec: MoESpec) -> States:
    topk = ValueState(spec.top_k, spec.top_k, True, False, False, "float32", states["tokens"].placements)
    if step.scales:
        return {"topk": topk.scale(step.name)}
    return {"topk": topk.scale("the spec (factor 1)") if spec.routed_scaling_factor == 1.0 else topk}


def _input_transform(step: Step, states: States, spec: MoESpec) -> States:
    return {"routed": _transformed(states["tokens"], step, spec)}


def _transformed(x: ValueState, step: Step, spec: MoESpec) -> ValueState:
    """The facts are the spec's; the step's own are for people."""
    transform = spec.transforms()[step.verb]
    return x.transform(step.name, transform.in_features, transform.out_features, linear=transform.linear)


def _dispatch(step: Step, states: States, spec: MoESpec) -> States:
    gathered = {v: states[v].gather(step.name, step.gathers) for v in ("routed", "topk")}
    return gathered if step.gathers else {}


def _experts(step: Step, states: States, spec: MoESpec) -> States:
    y, topk = states["routed"], states["topk"]
    for axis in step.axes:
        if topk.at(axis) != y.at(axis):
            raise PlanError(
                f"tokens are {y.at(axis)!r} over {axis} and their routing is {topk.at(axis)!r}",
                first=topk.maker(f"placed on {axis}"),
                second=step.name,
            )
    y = y.make_partial(step.name, step.axes)
    if step.weighs:
        y = _weigh(y, step.name, topk)
    if step.sums:
        y = y.sum_slots(step.name)
    if step.scales:
        y = y.scale(step.name)
    if step.adds:
        if spec.output_transform is not None or spec.routing.modalities > 1:
            what = "sets of experts" if spec.output_transform is None else "an output transform of the routed part alone"
            raise PlanError(f"adds the shared experts before {what}", first=states["shared"].maker("made"), second=step.name)
        y = y.add(step.name, states["shared"])
    if not step.rounds:
        return {"routed": y}
    if spec.routing.modalities > 1:
        raise PlanError("adds up what each set of experts has rounded", first=step.name, second=step.name)
    return {"routed": y.round(step.name)}


def _weigh(y: ValueState, name: str, topk: ValueState) -> ValueState:
    y = y.weigh(name)
    return y.scale(topk.maker("scaled")) if topk.scaled else y


def _combine(step: Step, states: States, spec: MoESpec) -> States:
    y = states["routed"]
    if step.weighs:
        y = _weigh(y, step.name, states["topk"])
    if step.sums:
        y = y.sum_slots(step.name)
    return {"routed": y.reduce(step.name, step.axes, scatter=True) if step.axes else y}


def _output_transform(step: Step, states: States, spec: MoESpec) -> States:
    y = states["routed"]
    for fact in ("summed", "scaled"):
        if not getattr(y, fact) and (fact == "summed" or not spec.transforms()[step.verb].linear):
            raise PlanError(f"transforms a value that has not been {fact}", first=y.maker("made"), second=step.name)
    return {"routed": _transformed(y, step, spec)}


def _shared(step: Step, states: States, spec: MoESpec) -> States:
    x = states["tokens"].make_partial(step.name, step.axes)
    return {"shared": _finished(x, step.name)}


def _zero(step: Step, states: States, spec: MoESpec) -> States:
    y = _weigh(states["tokens"], step.name, states["topk"]).sum_slots(step.name)
    return {"zero": y.scale(step.name) if step.scales else y}


def _finished(x: ValueState, name: str) -> ValueState:
    return x.weigh(name).sum_slots(name).scale(name)


def _join(step: Step, states: States, spec: MoESpec) -> States:
    out = states["routed"]
    if not {"shared", "zero"} & set(states):
        for fact in ("weighted", "summed", "scaled"):
            if not getattr(out, fact):
                raise PlanError(f"the output has never been {fact}", first=out.maker("made"), second=step.name)
    for value in ("shared", "zero"):
        if value in states:
            out = out.add(step.name, states[value])
    if out.rounded and spec.output_bias:
        raise PlanError("adds a bias to a value that has been rounded already", first=out.maker("rounded"), second=step.name)
    if out.rounded and spec.join == "average":
        raise PlanError("averages a value that has been rounded already", first=out.maker("rounded"), second=step.name)
    if step.axes != out.partial_axes:
        what = f"counts a bias once over {step.axes}, the value is a partial sum over {out.partial_axes}"
        raise PlanError(what, first=out.maker(f"placed on {(*out.partial_axes, *step.axes)[0]}"), second=step.name)
    return {"out": out}


def _reduce(step: Step, states: States, spec: MoESpec) -> States:
    return {step.value: states[step.value].reduce(step.name, step.axes, scatter=step.scatter)}


_EFFECTS: dict[str, Callable[[Step, States, MoESpec], States]] = {
    "gate": lambda step, states, spec: {},
    "route": _route,
    "input_transform": _input_transform,
    "pad": lambda step, states, spec: {"routed": states["routed"].pad(step.name, step.width)},
    "dispatch": _dispatch,
    "experts": _experts,
    "row_norm": lambda step, states, spec: {"routed": states["routed"].row_norm(step.name)},
    "combine": _combine,
    "trim": lambda step, states, spec: {step.value: states[step.value].trim(step.name, step.width)},
    "scale": lambda step, states, spec: {"routed": states["routed"].scale(step.name)},
    "output_transform": _output_transform,
    "shared": _shared,
    "zero": _zero,
    "reduce": _reduce,
    "select": lambda step, states, spec: {step.value: states[step.value].select(step.name, step.axes)},
    "join": _join,
    "final_transform": lambda step, states, spec: {"out": _transformed(states["out"], step, spec)},
    "shard": lambda step, states, spec: {"out": states["out"].take_shard(step.name, step.axes)},
}


def check_complete(steps: tuple[Step, ...], spec: MoESpec) -> None:
    """Everything that the spec has is done once, and nothing that it does not have."""
    r = spec.routing
    wanted = {
        "gate": r.score != "external" and r.simulate is None,
        "input_transform": spec.input_transform is not None,
        "row_norm": spec.experts.row_norm is not None,
        "output_transform": spec.output_transform is not None,
        "final_transform": spec.final_transform is not None,
        "shared": spec.shared is not None,
        "zero": spec.zero_experts > 0,
        **dict.fromkeys(("route", "dispatch", "experts", "combine", "join"), True),
    }
    last = steps[-1].name if steps else "the end"
    for verb, needed in wanted.items():
        found = [s.name for s in steps if s.verb == verb]
        if needed and not found:
            raise PlanError(f"no step does '{verb}'", first="the spec", second=last, next_step="Let resolve() build the plan")
        if found and not needed:
            raise PlanError("is not part of the layer", first="the spec", second=found[0])
        if len(found) > 1:
            raise PlanError("runs a second time", first=found[0], second=found[1])


def check_places(steps: tuple[Step, ...]) -> None:
    """Every step stands where the runner carries it out: it runs its verbs in one order, whatever the plan's."""
    verbs, before, reached = list(ORDER), "the input", -1
    for step in steps:
        place = step.at or step.verb
        inserted = place in INSERTED and step.verb in ("reduce", "select", "trim", "shard")
        allowed = INSERTED[place] if inserted else (ORDER.get(place),) if place == step.verb else ()
        if step.value not in allowed:
            raise PlanError(f"changes '{step.value}' at '{place}', where the runner does not", first=before, second=step.name)
        position = verbs.index(place) - (0.5 if inserted else 0)
        if position < reached:
            raise PlanError("stands after a step that the runner carries out later", first=before, second=step.name)
        before, reached = step.name, position


def check_streams(steps: tuple[Step, ...]) -> None:
    """Nothing runs on a side stream that issues a collective, or that changes what the main stream reads meanwhile."""
    for step in steps:
        if not step.side or (step.verb == "shared" and step.reads == "tokens"):
            continue
        collective = step.verb in ("dispatch", "combine", "reduce", "shard")
        what = "issues a collective" if collective else f"changes '{step.value}'"
        raise PlanError(f"{what} on a side stream", first="the main stream", second=step.name)


def check_end(steps: tuple[Step, ...], states: States, spec: MoESpec, wanted: str, split: tuple[str, ...]) -> None:
    """What must be true of `out` after the last step. split: the axes with more than one rank that share an answer."""
    out, last = states.get("out"), steps[-1].name if steps else "the input"
    if out is None:
        raise PlanError("ends without an output", first="the input", second=last)
    if out.padded_to != out.width or out.width != spec.hidden_size:
        raise PlanError(
            f"returns {out.padded_to} features, the layer has {spec.hidden_size}",
            first=out.maker("padded"),
            second=last,
        )
    for axis in split:
        got = out.at(axis)
        expected = {"replicate": states["tokens"].at(axis), "partial": Partial(), "shard": Shard(0)}[wanted]
        if got != expected:
            raise PlanError(
                f"returns a value that is {got!r} over {axis}, asked for is {expected!r}",
                first=out.maker(f"placed on {axis}"),
                second=last,
            )
