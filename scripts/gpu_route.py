"""Routing in one launch on a GPU, against `ops/route.py`: the same experts, the same weights, and how long both take.

    python scripts/gpu_route.py results.json

A random grid of rules, sizes and logits. Ids must be the same unless the two keys lie within 2 units in the last place, weights
within 4, or not further from float64 than the plain rule's. Then what only a GPU can show: offsets beyond 2^31, CUDA graphs,
torch.compile, the operator's own checks; and the gate's product for few tokens. Last, times inside a CUDA graph and launched
from Python. Exits 1 if anything is wrong.

Shape suffixes: T tokens, K chosen experts, E experts.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import platform
import random
import sys
from pathlib import Path

import torch
import triton

from moerunner import MoERunner
from moerunner.bench.timing import eager_seconds, graph_seconds
from moerunner.kernels.route import _logits_of_few, triton_route
from moerunner.kernels.route import route as one_launch
from moerunner.ops import route as plain
from moerunner.spec import ExpertsSpec, GroupSpec, MoESpec, RoutingSpec, SharedSpec
from moerunner.values import TopK

CASES, PROCESSES = 1000, 14
SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "softmax_topk", "sigmoid_topk", "sparsemixer")
LOGITS = ("normal", "near", "wide", "negative", "ties", "equal", "nan", "inf", "zeros")
TIMED = {
    "128/8 softmax": (128, 8, RoutingSpec(renormalise="sum")),
    "256/8 sigmoid, groups, bias": (
        256,
        8,
        RoutingSpec(score="sigmoid", selection_bias=True, renormalise="sum", eps=1e-20, groups=GroupSpec(count=8, kept=4)),
    ),
    "512/10 softmax": (512, 10, RoutingSpec(renormalise="sum")),
    "32/4 softmax_topk": (32, 4, RoutingSpec(score="softmax_topk", choose="logit")),
}
HIDDEN = {128: 2048, 256: 7168, 512: 2048, 32: 2880}  # fmt: skip


def layer(routing: RoutingSpec, experts: int, top_k: int, **rest) -> MoESpec:
    base = {"hidden_size": 16, "experts": ExpertsSpec(intermediate_size=8), "apply_routed_scale_to_output": False}
    return MoESpec(**{**base, "num_experts": experts, "top_k": top_k, "routing": routing, **rest})


def draw_spec(rng: random.Random) -> MoESpec:
    """A rule that the spec allows, any part of it."""
    score = rng.choice(SCORES)
    experts = rng.choice((1, 2, 3, 8, 15, 16, 31, 32, 60, 64, 100, 128, 160, 256, 257, 384, 512, 513, 768, 1000, 1024))
    rest: dict = {"routed_scaling_factor": rng.choice((1.0, 1.0, 2.5)), "zero_experts": rng.choice((0, 0, 0, 5))}
    experts -= rest["zero_experts"] if experts > 40 else 0
    rest["zero_experts"] *= experts > 35
    total = experts + rest["zero_experts"]
    common = dict(
        score=score, logit_scale=rng.choice((1.0, 1.0, 0.37, -1.3)), logit_softcap=rng.choice((None, None, 3.0, 30.0)),
        per_expert_scale=rng.random() < 0.2, global_scale=rng.random() < 0.2,
    )  # fmt: skip
    if score == "sparsemixer":
        return layer(RoutingSpec(**common, jitter=rng.choice((0.01, 0.2))), max(2, experts), 2, **rest)
    sets = rng.choice((1, 1, 1, 2, 4))
    if sets > 1 and (experts % sets or rest["zero_experts"]):
        sets = 1
    top_k = rng.choice([k for k in (1, 2, 3, 4, 6, 8, 10, 16, 32) if k <= total // sets])
    choose = "logit" if score.endswith("topk") else rng.choice(("score", "score", "logit"))
    choose = "hash" if sets == 1 and rng.random() < 0.1 else choose
    groups = None
    counts = [g for g in (2, 3, 4, 5, 8, 16, 64) if total % g == 0 and total // g >= 2]
    if choose != "hash" and sets == 1 and counts and rng.random() < 0.4:
        count = rng.choice(counts)
        enough = [n for n in range(1, count + 1) if n * (total // count) >= top_k]
        groups = GroupSpec(
            count=count, kept=rng.choice(enough), score=rng.choice(("max", "top2_sum")), fill=rng.choice(("-inf", "zero"))
        )
    if score == "sigmoid" and rng.random() < 0.3:
        rest["shared"] = SharedSpec(width=8, count=rng.choice((1, 2, 3)), gate="router")
    renormalise = rng.choice(("none", "sum", "sum", "max_sum", "p_norm"))
    eps = {"sum": rng.choice((0.0, 1e-20, 1e-6)), "max_sum": 1e-12}.get(renormalise, 0.0)
    routing = RoutingSpec(
        **common, choose=choose, modalities=sets, groups=groups, renormalise=renormalise, eps=eps,
        p=rng.choice((1.0, 2.0, 3.0)), selection_bias=choose != "hash" and rng.random() < 0.5,
    )  # fmt: skip
    return layer(routing, experts, top_k, **rest)


def draw_logits(kind: str, tokens: int, width: int) -> torch.Tensor:
    z = torch.randn(tokens, width, device="cuda")
    if kind == "near":
        return 0.01 * z
    if kind == "wide":
        return 20 * z
    if kind == "negative":
        return z - 30
    if kind == "ties":
        return (2 * z).round() / 2
    if kind == "equal":
        return z[:, :1].expand(-1, width).contiguous()
    if kind in ("nan", "inf"):
        odd = torch.rand_like(z) < 0.2
        odd[tokens // 2 :] &= torch.rand(tokens - tokens // 2, 1, device="cuda") < 0.5
        odd[:1] = True
        return torch.where(odd, torch.nan if kind == "nan" else torch.inf * z.sign(), z)
    if kind == "zeros":
        return torch.where(torch.rand_like(z) < 0.5, 0.0, -0.0) * z.sign()
    return 2 * z


def draw_inputs(spec: MoESpec, tokens: int) -> dict[str, torch.Tensor | None]:
    r, total = spec.routing, spec.num_experts + spec.zero_experts
    dtype = random.choice((torch.float32, torch.bfloat16))
    return {
        "selection_bias": 0.1 * torch.randn(total, device="cuda") if r.selection_bias else None,
        "per_expert_scale": torch.rand(total, device="cuda").to(dtype) if r.per_expert_scale else None,
        "global_scale": torch.rand(1, device="cuda").to(dtype) if r.global_scale else None,
        "hash_table": torch.randint(total, (97, spec.top_k), device="cuda") if r.choose == "hash" else None,
        "input_ids": torch.randint(97, (tokens,), device="cuda"),
        "token_types": torch.randint(r.modalities, (tokens,), device="cuda"),
    }


def apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many float32 lie between a and b, plus one; 0 where both are NaN."""

    def place(x: torch.Tensor) -> torch.Tensor:
        bits = x.float().contiguous().view(torch.int32).long()
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    both = a.isnan() & b.isnan()
    return torch.where(both, 0, torch.where(a.isnan() | b.isnan(), 2**31, (place(a) - place(b)).abs()))


def plain_with_keys(z: torch.Tensor, spec: MoESpec, **inputs) -> tuple[TopK, torch.Tensor | None]:
    """The plain rule, and the keys that its last choice was made by."""
    keys, choose = [], plain.stable_topk

    def recording(key: torch.Tensor, k: int) -> torch.Tensor:
        keys.append(key)
        return choose(key, k)

    plain.stable_topk = recording
    try:
        return plain.route(z, spec, **inputs), keys[-1] if keys else None
    finally:
        plain.stable_topk = choose


def compare(case: int) -> dict[str, object]:
    """One random case; `wrong` says how."""
    rng = random.Random(case)
    random.seed(case)
    torch.manual_seed(case)
    spec, kind = draw_spec(rng), rng.choice(LOGITS)
    tokens = rng.choice((0, 1, 2, 3, 7, 33, 200, 2049, 5000))
    z = draw_logits(kind, tokens, spec.num_logits).to(rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16)))
    if rng.random() < 0.2:
        z = torch.cat([z, z], 1)[:, : spec.num_logits] if rng.random() < 0.5 else z.T.contiguous().T
    inputs, scale = draw_inputs(spec, tokens), rng.random() < 0.5
    facts = {"case": case, "spec": spec.to_dict()["routing"], "experts": spec.num_experts, "top_k": spec.top_k}
    facts |= {"tokens": tokens, "logits": kind, "dtype": str(z.dtype), "zero": spec.zero_experts}
    try:
        got = one_launch(z, spec, scale=scale, **inputs)
        expected, key = plain_with_keys(z, spec, scale=scale, **inputs)
        wrong = [] if got.ids.shape == expected.ids.shape else ["shape"]
        differ = got.ids != expected.ids
        rows = ~differ.any(1)
        excused = torch.zeros_like(differ)
        if key is not None and differ.any():
            close = apart(key.gather(1, got.ids), key.gather(1, expected.ids)) <= 2
            excused = differ & close
        if (differ & ~excused).any():
            wrong.append(f"{int((differ & ~excused).sum())} ids")
        distance = apart(got.weights[rows], expected.weights[rows])
        if expected.shared_weights is not None:
            assert got.shared_weights is not None
            distance = torch.cat([distance, apart(got.shared_weights[rows], expected.shared_weights[rows])], 1)
        worst = int(distance.max()) if distance.numel() else 0
        if worst > 4:
            exact = plain.route(z.double(), spec, scale=scale, **inputs)
            rows &= (exact.ids == got.ids).all(1)
            ours, theirs = (int(apart(t.weights[rows], exact.weights[rows]).max()) for t in (got, expected))
            facts |= {"from float64": {"one launch": ours, "plain": theirs}}
            if ours > max(4, theirs):
                wrong.append(f"weights {worst} apart in {int((distance > 4).sum())} of {distance.numel()}")
        again = one_launch(z, spec, scale=scale, **inputs)
        if not (torch.equal(again.ids, got.ids) and torch.equal(again.weights.nan_to_num(), got.weights.nan_to_num())):
            wrong.append("not the same bits twice")
        alone = one_launch(z[-1:], spec, scale=scale, **{n: v[-1:] if n in PER_TOKEN else v for n, v in inputs.items()})
        invariant = torch.equal(alone.weights.nan_to_num(), got.weights[-1:].nan_to_num())
        facts |= {"apart": worst, "excused": int(excused.sum()), "slots": differ.numel(), "invariant": invariant}
    except Exception as exc:  # noqa: BLE001 - one broken case must not hide the others
        wrong = [f"{type(exc).__name__}: {str(exc)[:300]}"]
    return {**facts, "wrong": wrong}


PER_TOKEN = ("input_ids", "token_types")


def only_on_a_gpu() -> list[str]:
    """Offsets, graphs, compilation, the operator's checks: what is wrong."""
    wrong, spec = [], layer(RoutingSpec(score="sigmoid", renormalise="sum"), 64, 4)
    pool = torch.randn(2**31 + 2**20, device="cuda", dtype=torch.bfloat16)
    for shape, strides in (((3, 64), (2**30, 1)), ((1000, 64), (1, 2**31 // 64))):
        z = pool.as_strided(shape, strides)
        if not torch.equal(one_launch(z, spec).ids, plain.route(z, spec).ids):
            wrong.append(f"offsets of strides {strides}")
    del pool
    for tokens in (1, 40, 3000):
        z = torch.randn(tokens, 64, device="cuda")
        one_launch(z, spec)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            top = one_launch(z, spec)
        z.copy_(torch.randn_like(z))
        for _ in range(3):
            graph.replay()
        if not torch.equal(top.ids, plain.route(z, spec).ids):
            wrong.append(f"graph of {tokens} tokens")

        def twice(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            top = one_launch(z * 2, spec)
            return top.ids, top.weights * 2

        ids, weights = torch.compile(twice, fullgraph=True)(z)
        if not (torch.equal(ids, twice(z)[0]) and torch.equal(weights, twice(z)[1])):
            wrong.append(f"compiled for {tokens} tokens")
    for (experts, hidden), tokens, dtype in itertools.product(
        HIDDEN.items(), (1, 2, 3, 8, 16), (torch.bfloat16, torch.float32)
    ):
        x, gate = torch.randn(tokens, hidden, device="cuda").bfloat16(), torch.randn(experts, hidden, device="cuda").to(dtype)
        exact = x.double() @ gate.double().T
        ours, theirs = _logits_of_few(x, gate, None), plain.gate_logits(x, gate, None, spec.routing)
        ours, theirs = ((z - exact).abs().max().item() for z in (ours, theirs))
        if not ours <= 2 * theirs + 1e-6 * exact.abs().max().item():
            wrong.append(
                f"the gate's product of {tokens} x {hidden} and {experts} in {dtype}: {ours} from float64, not {theirs}"
            )
    bias = torch.randn(64, device="cuda")
    numbers = (60, 4, 1, False, 1.0, None, 4, 2, True, float("-inf"), 1, 1e-20, 2.0, 0.01, 1, 1.0)
    torch.library.opcheck(
        triton_route, (torch.randn(5, 64, device="cuda"), None, None, bias[:60], None, None, None, None, None, *numbers)
    )
    grouped = dataclasses.replace(
        spec, routing=dataclasses.replace(spec.routing, selection_bias=True, groups=GroupSpec(count=8, kept=4))
    )
    runner = MoERunner(grouped, {n: torch.randn(s, device="cuda") * 0.2 for n, s in grouped.weight_shapes().items()})
    if "in one launch" not in runner.explain():
        wrong.append("the plan of a layer on a GPU routes otherwise")
    x = torch.randn(9, 16, device="cuda")
    with torch.no_grad():
        if not torch.allclose(torch.compile(runner, fullgraph=True)(x), runner(x), atol=1e-5):
            wrong.append("a compiled runner")
    return wrong


def timed() -> list[dict[str, object]]:
    """Seconds of the plain rule and of one launch, from the same logits, which rotate."""
    found: list[dict[str, object]] = []
    for (name, (experts, top_k, routing)), tokens in itertools.product(TIMED.items(), (1, 8, 64, 512, 2048, 8192)):
        spec = layer(routing, experts, top_k)
        inputs = {"selection_bias": torch.randn(experts, device="cuda")} if routing.selection_bias else {}
        logits = [torch.randn(tokens, experts, device="cuda") for _ in range(16)]
        row: dict[str, object] = {"rule": name, "tokens": tokens}
        for label, rule in (("plain", plain.route), ("one_launch", one_launch)):
            calls = [lambda rule=rule, z=z, spec=spec, inputs=inputs: rule(z, spec, **inputs) for z in logits]
            row[f"{label}_graph_us"] = round(graph_seconds(calls) * 1e6, 2)
            row[f"{label}_eager_us"] = round(eager_seconds(calls) * 1e6, 1)
        hidden = HIDDEN[experts]
        if tokens <= 8:  # the gate's product too, from bfloat16
            pairs = [
                (torch.randn(tokens, hidden, device="cuda").bfloat16(), torch.randn(experts, hidden, device="cuda").bfloat16())
                for _ in range(16)
            ]
            both = {
                "plain": lambda x, w, spec=spec, inputs=inputs: plain.route(
                    plain.gate_logits(x, w, None, spec.routing), spec, **inputs
                ),
                "one_launch": lambda x, w, spec=spec, inputs=inputs: one_launch(x, spec, gate=w, **inputs),
            }
            for label, rule in both.items():
                calls = [lambda rule=rule, pair=pair: rule(*pair) for pair in pairs]
                row[f"{label}_with_gate_graph_us"] = round(graph_seconds(calls) * 1e6, 2)
                row[f"{label}_with_gate_eager_us"] = round(eager_seconds(calls) * 1e6, 1)
        found.append(row)
        print(row, flush=True)
    return found


def main() -> None:
    context = multiprocessing.get_context("spawn")  # kernels compile side by side
    with concurrent.futures.ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        cases = list(pool.map(compare, range(CASES), chunksize=10))
    wrong = [c for c in cases if c["wrong"]]
    done = [c for c in cases if "apart" in c]
    for c in wrong[:40]:
        print("WRONG", json.dumps(c), flush=True)
    summary = {
        "cases": len(cases),
        "wrong": len(wrong),
        "slots": sum(int(c["slots"]) for c in done),  # type: ignore[call-overload]
        "ids within 2 units of each other": sum(int(c["excused"]) for c in done),  # type: ignore[call-overload]
        "weights, units apart": {n: sum(c["apart"] == n for c in done) for n in sorted({int(c["apart"]) for c in done})},  # type: ignore[call-overload]
        "beyond 4, from float64": [c["from float64"] for c in done if "from float64" in c],
        "not the same bits alone": sum(not c["invariant"] for c in done),
    }
    print(summary, flush=True)
    elsewhere = only_on_a_gpu()
    print("only on a GPU:", elsewhere or "right", flush=True)
    times = timed()
    environment = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    result = {"environment": environment, "random_cases": summary, "only_on_a_gpu": elsewhere, "wrong": wrong, "times": times}
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(wrong or elsewhere))


if __name__ == "__main__":
    main()
