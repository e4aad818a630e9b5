"""Layers, ranks and toy backends for the tests of this folder, and the one comparison rule that they share.

A result is compared with the float64 oracle by relative error, max|y - ref| / max|ref|. The limit in float32 is 2e-6, or twice
the error that a plain loop over the experts makes in the same dtype, up to `CAPS`; there is no absolute tolerance. The loop has
no formula from the code under test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from moerunner import (
    ExpertsSpec,
    GroupSpec,
    LayerWeights,
    Layout,
    Linear,
    MoERunner,
    MoESpec,
    Options,
    RMSNorm,
    RoutingSpec,
    SharedSpec,
    TransformSpec,
)
from moerunner.experts import eager, register
from moerunner.experts.registry import available, get, unregister
from moerunner.ops.reference import gated_activation, reference, reference_route
from moerunner.parallel.comm import simulate
from moerunner.parallel.layout import split_counts
from moerunner.values import Replicate, TopK, ValueState

HIDDEN, EXPERTS, INNER, VOCAB = 16, 8, 48, 32
CAPS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
BACKENDS = [name for name, runs, _ in available("cpu") if runs]
TRAINABLE = [name for name in BACKENDS if get(name).INFO.backward]

ROUTERS = {
    "softmax": RoutingSpec(),
    "softmax renormalised": RoutingSpec(renormalise="sum"),
    "softmax of the chosen": RoutingSpec(score="softmax_topk", choose="logit"),
    "sigmoid": RoutingSpec(score="sigmoid"),
    "biased sigmoid": RoutingSpec(score="sigmoid", selection_bias=True, renormalise="sum", eps=1e-20),
    "groups by best": RoutingSpec(groups=GroupSpec(count=2, kept=1, score="max")),
    "groups by best two": RoutingSpec(
        score="sigmoid", selection_bias=True, renormalise="sum", eps=1e-20, groups=GroupSpec(count=2, kept=1)
    ),
    "groups of logits": RoutingSpec(choose="logit", groups=GroupSpec(count=2, kept=1)),
    "groups filled with zero": RoutingSpec(
        score="sigmoid", choose="logit", selection_bias=True, groups=GroupSpec(count=2, kept=1, fill="zero")
    ),
    "sqrtsoftplus": RoutingSpec(score="sqrtsoftplus", selection_bias=True, renormalise="sum"),
    "token table": RoutingSpec(score="sqrtsoftplus", choose="hash", renormalise="sum"),
    "weights on the input": RoutingSpec(score="sigmoid_topk", choose="logit", weights_on="input"),
    "sparsemixer": RoutingSpec(score="sparsemixer", jitter=0.2),
    "p-norm": RoutingSpec(score="sigmoid", renormalise="p_norm", p=2.0),
    "max of sum and eps": RoutingSpec(score="sigmoid", renormalise="max_sum", eps=1e-12),
    "learned scale per expert": RoutingSpec(choose="logit", renormalise="sum", per_expert_scale=True),
    "learned global scale": RoutingSpec(score="sigmoid", renormalise="sum", global_scale=True),
    "scaled, capped logits": RoutingSpec(logit_scale=1.7, logit_softcap=3.0, logit_bias=True),
    "two modalities": RoutingSpec(modalities=2, selection_bias=True, renormalise="sum"),
}

LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp3": Layout(tp=3),
    "ep2": Layout(ep=2),
    "ep3, uneven": Layout(ep=3),
    "ep2 tp2": Layout(ep=2, tp=2),
    "dp2 tp2": Layout(dp=2, tp=2),
    "dp2 ep2": Layout(dp=2, ep=2),
    "ep2, round robin": Layout(ep=2, placement="round_robin"),
    "ep2, copies": Layout(ep=2, redundant=2),
    "ep2 tp2, whole shared": Layout(ep=2, tp=2, shared="replicated"),
    "sharded tokens, tp2": Layout(tp=2, tokens="sharded"),
    "sharded tokens, ep2": Layout(ep=2, tokens="sharded"),
    "sharded tokens, ep4": Layout(ep=4, tokens="sharded"),
    "sharded tokens, ep2 tp2": Layout(ep=2, tp=2, tokens="sharded"),
    "sharded tokens, dp2 tp2": Layout(dp=2, tp=2, tokens="sharded"),
    "sharded tokens, ep4, copies": Layout(ep=4, tokens="sharded", redundant=4),
}
REPLICATED = {name: layout for name, layout in LAYOUTS.items() if layout.tokens == "replicated"}
SHARDED = {name: layout for name, layout in LAYOUTS.items() if layout.tokens == "sharded"}
SHARED = SharedSpec(width=20)
NORM = TransformSpec((RMSNorm(features=HIDDEN),))
NARROW = TransformSpec((Linear(in_features=HIDDEN, out_features=12),))
WIDEN = TransformSpec((Linear(in_features=12, out_features=HIDDEN),))


def make_spec(routing=None, *, factor=1.0, on_output=False, experts=None, **changes):
    """A small layer; `experts` are keyword arguments of `ExpertsSpec`."""
    given = {
        "hidden_size": HIDDEN,
        "num_experts": EXPERTS,
        "top_k": 2,
        "routing": routing or RoutingSpec(score="sigmoid", renormalise="sum", eps=1e-20),
        "experts": ExpertsSpec(**{"intermediate_size": INNER, **(experts or {})}),
        "routed_scaling_factor": factor,
        "apply_routed_scale_to_output": on_output,
    }
    return MoESpec(**{**given, **changes})


def make_weights(spec, seed=0, dtype=torch.float32):
    """Every tensor the spec needs; what the router reads stays in float32."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in spec.weight_shapes(vocab_size=VOCAB).items():
        if name == "hash_table":
            made[name] = torch.stack([torch.randperm(spec.num_experts, generator=g)[: spec.top_k] for _ in range(VOCAB)])
            continue
        values = torch.randn(shape, generator=g)
        if name in ("per_expert_scale", "global_scale") or "norm" in name:
            made[name] = (1 + 0.3 * values).to(torch.float32)
        elif name in ("gate", "gate_bias", "selection_bias"):
            made[name] = values * (0.5 if name == "gate" else 0.2)
        else:
            made[name] = (values * 0.3).to(dtype)
    return made


def tokens(count=7, seed=1, dtype=torch.float32, hidden=HIDDEN):
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs_for(spec, count):
    """What this spec's router reads beside the tokens."""
    given = {}
    if spec.routing.choose == "hash":
        given["input_ids"] = torch.arange(count) * 5 % VOCAB
    if spec.routing.modalities > 1:
        given["token_types"] = torch.arange(count) % spec.routing.modalities
    return given


def error(y, ref):
    """max|y - ref| / max|ref|; infinite where y is not finite and ref is, or the shapes differ."""
    if y.shape != ref.shape:
        return math.inf
    y, ref = y.double(), ref.double()
    if not torch.equal(y.isfinite(), ref.isfinite()):
        return math.inf
    good = ref.isfinite()
    if not good.any():
        return 0.0
    off, size = (y - ref)[good].abs().max().item(), ref[good].abs().max().item()
    return off / size if size else (0.0 if off == 0 else math.inf)


def assert_close(y, ref, limit=2e-6):
    seen = error(y, ref)
    assert seen <= limit, f"relative error {seen:.2e}, allowed {limit:.1e}"


def check(spec, weights, x, *, layout=None, options=None, limit=2e-6, **inputs):
    """Runs the layer, on simulated ranks if there is a layout, and compares it with the oracle; returns what it gave."""
    inputs = {**inputs_for(spec, x.shape[0]), **inputs}
    run = on_ranks if layout is not None else on_one
    y = run(spec, weights, x, layout=layout, options=options, **inputs)
    whole = weights if isinstance(weights, LayerWeights) else LayerWeights.of(spec, weights)
    ref = reference(spec, whole, x, **inputs)
    assert y.dtype == x.dtype
    assert ref.abs().max() > 0, "the oracle's result is zero, the comparison would mean nothing"
    if error(y, ref) > limit or x.dtype != torch.float32:
        limit = min(max(limit, 2 * error(plain(spec, whole, x, **inputs), ref) + 1e-6), CAPS[x.dtype])
    assert_close(y, ref, limit)
    return y


def on_one(spec, weights, x, *, layout=None, options=None, **inputs):
    return MoERunner(spec, weights, options=options)(x, **inputs)


def on_ranks(spec, weights, x, *, layout, options=None, record=None, **inputs):
    """The layer's output for all tokens, from simulated ranks that each get the tokens which the layout gives them.

    Every rank must issue exactly the collectives of its plan, and ranks that hold the same tokens must agree.
    """
    copies = slices([(0, x.shape[0])], layout.dp)
    output = options.output if options is not None else "replicate"

    def main(bound):
        comm, here = bound.comm, bound.comm.coordinates
        start, stop = copies[here["dp"]]
        if layout.tokens == "sharded":
            counts = layout.token_counts(stop - start)
            place = comm.index(("ep", "tp"))
            start += sum(counts[:place])
            stop = start + counts[place]
        _be_strict(comm)
        runner = MoERunner(spec, weights, bound, options)
        y = runner(x[start:stop], **{name: cut_tokens(value, start, stop) for name, value in inputs.items()})
        assert list(comm.log) == list(runner.plan.collectives), f"issued {comm.log}, planned {runner.plan.collectives}"
        if record is not None:
            record.append((comm.rank, runner.plan, list(comm.log)))
        return y

    results = simulate(layout, main)
    together = []
    per_copy = layout.ep * layout.tp
    for copy in range(layout.dp):
        parts = results[copy * per_copy : (copy + 1) * per_copy]
        if output == "partial":
            together.append(torch.stack([p.double() for p in parts]).sum(0).to(x.dtype))
        elif output == "shard" or layout.tokens == "sharded":
            together.append(torch.cat(parts))
        else:
            assert all(torch.equal(p, parts[0]) or p.isnan().any() for p in parts), "ranks of one copy disagree"
            together.append(parts[0])
    return torch.cat(together)


def slices(within, parts):
    """(start, stop) of each of `parts` even pieces of the last range in `within`."""
    start, stop = within[-1]
    found = []
    for count in split_counts(stop - start, parts):
        found.append((start, start + count))
        start += count
    return found


def cut_tokens(value, start, stop):
    if isinstance(value, TopK):
        shared = None if value.shared_weights is None else value.shared_weights[start:stop]
        return dataclasses.replace(value, ids=value.ids[start:stop], weights=value.weights[start:stop], shared_weights=shared)
    return value[start:stop]


def _be_strict(comm):
    """Ranks that exchange rows of different dtype or width are an error, as they are between processes."""
    gather = comm._gather_objects

    def strict(item, axes):
        items = gather(item, axes)
        rows = [i[0] if isinstance(i, tuple) else i for i in items]
        if all(isinstance(r, torch.Tensor) for r in rows):
            kinds = {(r.dtype, tuple(r.shape[1:])) for r in rows}
            assert len(kinds) == 1, f"ranks exchange rows of different kinds: {kinds}"
        return items

    comm._gather_objects = strict


def plain(spec, weights, x, **inputs):
    """The layer as a loop over tokens and experts in x's dtype, with the oracle's routing: how good plain code is."""
    choices = reference_route(spec, weights, x, **inputs)
    flat = x.reshape(-1, spec.hidden_size)
    rows = [_plain_row(spec, weights, row, choice) for row, choice in zip(flat, choices, strict=True)]
    return torch.stack(rows).reshape(x.shape).to(x.dtype)


def _plain_row(spec, weights, x, choice):
    factor, r = spec.routed_scaling_factor, spec.routing
    seen = _plain_transform("input_transform", spec, weights, x)
    size = spec.num_experts // r.modalities
    out = torch.zeros(spec.routed_hidden_size, dtype=_wide(x))
    zero = torch.zeros(spec.hidden_size, dtype=_wide(x))
    for e, w in zip(choice.ids, choice.weights, strict=True):
        if e < 0:
            continue
        if e >= spec.num_experts:
            zero += w * factor * x.to(_wide(x))
            continue
        one = {n: t.tensor[e % size] if t.expert_dim == 0 else t.tensor for n, t in weights.experts[e // size].tensors.items()}
        one = {n: _at_width(n, t, spec.routed_hidden_size) for n, t in one.items()}
        after = factor
        feed = seen
        if r.weights_on == "input":
            before, after = (w, factor) if spec.apply_routed_scale_to_output else (w * factor, 1.0)
            feed, w = (seen * before).to(x.dtype), 1.0
        h = _act(_mm(feed, one["w13"], one.get("b13")), spec.experts.activation, weights.experts[0].gate_up)
        y = _mm(h, one["w2"], one.get("b2")).to(_wide(x))
        if spec.experts.row_norm is not None:
            y = _norm(y, one.get("row_norm"), spec.experts.row_norm.eps)
        out += w * after * y
    out = _plain_transform("output_transform", spec, weights, out) + zero + _plain_shared(spec, weights, x, choice)
    out = out / 2 if spec.join == "average" else out
    out = out + weights.tensors.get("output_bias", torch.zeros(())).to(out.dtype)
    return _plain_transform("final_transform", spec, weights, out)


def _plain_shared(spec, weights, x, choice):
    s, t = spec.shared, dict(weights.tensors)
    if "shared_gate_proj" in t:
        t["shared_w13"] = torch.cat([t["shared_gate_proj"], t["shared_up_proj"]])
    if s is None:
        return torch.zeros((), dtype=_wide(x))
    layout = "concat" if s.gated else "none"
    if s.gate == "router":
        each = [
            _mm(_act(_mm(x, t["shared_w13"][j]), s.activation, layout), t["shared_w2"][j]).to(_wide(x)) for j in range(s.count)
        ]
        return sum(w * spec.routed_scaling_factor * y for w, y in zip(choice.shared_weights, each, strict=True))
    h = _act(_mm(x, t["shared_w13"], t.get("shared_b13")), s.activation, layout)
    y = _mm(h, t["shared_w2"], t.get("shared_b2")).to(_wide(x))
    return y * torch.sigmoid(_mm(x, t["shared_gate"]).to(_wide(x))) if s.gate == "sigmoid" else y


def _plain_transform(name, spec, weights, x):
    ops = spec.transforms()[name].ops if name in spec.transforms() else ()
    for i, op in enumerate(ops):
        weight = weights.tensors.get(f"{name}.{i}.weight")
        if isinstance(op, Linear):
            x = _mm(x, weight, weights.tensors.get(f"{name}.{i}.bias"))
        elif isinstance(op, RMSNorm):
            x = _norm(x, weight, op.eps)
        else:
            x = weights.functions[f"{name}.{i}"](x[None])[0]
    return x


def _act(h, activation, gate_up):
    """The oracle's activation in h's dtype, computed in float32 at least."""
    split = {"none": lambda t: (t, None), "concat": lambda t: t.chunk(2), "interleaved": lambda t: (t[0::2], t[1::2])}
    return gated_activation(*split[gate_up](h.to(_wide(h))), activation).to(h.dtype)


def _norm(x, weight, eps):
    y = x.to(_wide(x))
    y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
    return (y if weight is None else y * weight).to(x.dtype)


def _mm(x, weight, bias=None):
    """In x's dtype. float16, which a CPU has no product for, in float32 and rounded where it fits: what a kernel may do."""
    if x.dtype != torch.float16:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return torch.where(y.half().isfinite(), y.half().float(), y).to(x.dtype if y.half().isfinite().all() else torch.float32)


def _wide(x):
    return x.dtype if x.dtype == torch.float64 else torch.float32


def _at_width(name, tensor, width):
    return {"w13": lambda t: t[:, :width], "w2": lambda t: t[:width], "b2": lambda t: t[:width]}.get(name, lambda t: t)(tensor)


def pad_experts(weights, width, fill=0.0):
    """The same experts stored at a larger hidden width; `fill` lies where nothing may look."""
    padded = dict(weights)
    for name, dim in (("w13", 2), ("w2", 1), ("b2", 1), ("row_norm", 0)):
        if name in weights:
            shape = list(weights[name].shape)
            shape[dim] = width - shape[dim]
            padded[name] = torch.cat([weights[name], weights[name].new_full(shape, fill)], dim)
    return padded


@contextlib.contextmanager
def toy_backend(run=eager.run, name="toy", **declares):
    """A third party's backend: what eager declares, changed by `declares`; gives the options that choose it."""
    info = dataclasses.replace(eager.INFO, **{"name": name, "priority": {}, "few_tokens": {}, **declares})
    register(SimpleNamespace(INFO=info, run=run))
    try:
        yield Options(backend=name, deterministic=info.deterministic)
    finally:
        unregister(name)


def recording(calls, run=eager.run):
    """A backend's `run` that keeps what it was called with."""

    def recorded(x, topk, weights, call):
        calls.append(SimpleNamespace(x=x.clone(), topk=topk, weights=weights, call=call))
        return run(x, topk, weights, call)

    return recorded


@contextlib.contextmanager
def poisoned_memory():
    """New tensors start as NaN, or as the largest integer: whoever reads what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def value(width=HIDDEN, *, padded_to=None, weighted=True, summed=True, scaled=True, on=(), maker="the kernel"):
    """A finished value; `on` gives placements other than `Replicate` by axis."""
    placements = tuple(dict(on).get(axis, Replicate()) for axis in ("dp", "ep", "tp"))
    facts = [f"placed on {axis}" for axis in dict(on)] + ["padded", "weighted", "summed", "scaled", "width"]
    return ValueState(
        width, padded_to or width, weighted, summed, scaled, "float32", placements, tuple((f, maker) for f in facts)
    )
