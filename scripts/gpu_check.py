"""Every experts backend on a GPU against float64, and what only a GPU can show. Writes JSON; exits 1 if anything is wrong.

    python scripts/gpu_check.py results.json

Bound: twice the error of the eager backend in the same dtype, plus 1e-6 (both against float64). A draw above it is followed by
15 others of the same problem, and the median of their ratios decides: PyTorch's own kernels pass it by luck of a draw.

Shape suffixes: T tokens, K chosen experts, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import json
import math
import multiprocessing
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from moerunner import MoERunner
from moerunner.experts import registry
from moerunner.experts.base import ExpertsCall
from moerunner.ops.reference import reference
from moerunner.plan import Options
from moerunner.spec import ActivationSpec, ExpertsSpec, MoESpec, RoutingSpec, SharedSpec
from moerunner.values import ExpertWeights, LayerWeights, TopK

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {
    "silu": ActivationSpec(),
    "swigluoai": ActivationSpec(kind="swigluoai"),
    "limit": ActivationSpec(limit=0.8),
    "clamp_after": ActivationSpec(limit=0.4, clamp_after=True),
    "softcaps": ActivationSpec(gate_softcap=1.5, up_softcap=0.9),
    "gelu": ActivationSpec(kind="gelu"),
    "gelu_tanh": ActivationSpec(kind="gelu_tanh"),
    "relu": ActivationSpec(kind="relu"),
    "relu2": ActivationSpec(kind="relu2"),
}
found: list[dict[str, object]] = []


def note(check: str, ok: bool, **facts: object) -> None:
    found.append({"check": check, "ok": bool(ok), **facts})
    if not ok:
        print("WRONG", found[-1], flush=True)


def error(y: torch.Tensor, exact: torch.Tensor) -> float:
    if exact.numel() == 0:
        return 0.0 if y.shape == exact.shape else math.inf
    value = ((y.double() - exact.double()).abs().max() / exact.double().abs().max()).item()
    return value if math.isfinite(value) else math.inf


def layer(tokens, k, e, h, i, gate_up, dtype, *, bias=True, skip=True, transposed=False):
    """x, topk, tensors of one random layer."""

    def draw(*size, scale=1.0):
        t = (torch.randn(*size, device=DEVICE) * scale).to(dtype)
        return t.mT.contiguous().mT if transposed and t.ndim == 3 else t

    n = i if gate_up == "none" else 2 * i
    tensors = {"w13": draw(e, n, h, scale=2 * h**-0.5), "w2": draw(e, h, i, scale=i**-0.5)}
    if bias:
        tensors |= {"b13": draw(e, n, scale=0.3), "b2": draw(e, h, scale=0.3)}
    ids = torch.rand(tokens, e, device=DEVICE).topk(k).indices
    weights = torch.rand(tokens, k, device=DEVICE) + 0.1
    if skip and tokens:
        ids[0, 0] = -1
        ids[-1] = -1 if tokens > 1 else ids[-1]
    return draw(tokens, h), TopK(ids, weights), tensors


def widened(x, topk, tensors):
    return x.double(), TopK(topk.ids, topk.weights.double()), {n: t.double() for n, t in tensors.items()}


def run(name, x, topk, tensors, gate_up, call):
    return registry.get(name).run(x, topk, ExpertWeights.of(tensors, gate_up), call)


def judged(errors: Callable[[], tuple[float, float]]) -> tuple[bool, float, float]:
    """Whether (error, of eager) of a draw is within the bound, or the median of 15 others; and both errors."""
    err, plain = errors()
    ok = err <= 2 * plain + 1e-6
    if not ok and math.isfinite(err):
        again = [errors() for _ in range(15)]
        ok = statistics.median(e / max(p, 1e-12) for e, p in again) <= 2 and all(math.isfinite(e) for e, _ in again)
    return ok, err, plain


def forward(dtype: torch.dtype, gate_up: str) -> None:
    """Every backend and activation; few and many tokens; rows and sums; slots without an expert."""
    for name, act in ACTIVATIONS.items():
        if gate_up != "concat" and name not in ("silu", "relu2", "clamp_after"):
            continue
        for tokens, bias in itertools.product((0, 1, 7, 200, 2000), (True, False)):
            variants = [ExpertsCall(activation=act)]
            if name == "silu" and bias:
                variants += [ExpertsCall(activation=act, output="rows"), ExpertsCall(activation=act, input_weighting=True)]
                variants += [ExpertsCall(activation=act, down_bias=False)]
            for call, transposed in itertools.product(variants, (False, True) if name == "silu" else (False,)):
                draw = functools.partial(layer, tokens, 3, 16, 264, 136, gate_up, dtype, bias=bias, transposed=transposed)
                plain = 0.0
                for backend in ("grouped_mm", "triton"):

                    def errors(backend: str = backend, call: ExpertsCall = call, draw: Callable[[], Any] = draw):
                        case = draw()
                        exact = run("eager", *widened(*case), gate_up, call)
                        return tuple(error(run(name, *case, gate_up, call), exact) for name in (backend, "eager"))

                    ok, err, plain = judged(errors)
                    note(
                        "forward", ok, backend=backend, dtype=str(dtype), gate_up=gate_up, activation=name, tokens=tokens,
                        bias=bias, output=call.output, input_weighting=call.input_weighting, transposed=transposed,
                        error=err, eager=plain,
                    )  # fmt: skip
                tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
                note(
                    "eager", plain <= tolerance, dtype=str(dtype), gate_up=gate_up, activation=name, tokens=tokens, error=plain
                )


def gradients(dtype: torch.dtype) -> None:
    for gate_up, tokens in itertools.product(("concat", "interleaved", "none"), (1, 50)):
        call = ExpertsCall(activation=ActivationSpec())

        def grads(name, x, topk, tensors, call=call, gate_up=gate_up):
            leaves = {"x": x, "weights": topk.weights, **tensors}
            leaves = {n: t.detach().clone().requires_grad_() for n, t in leaves.items()}
            rest = {n: leaves[n] for n in tensors}
            y = run(name, leaves["x"], TopK(topk.ids, leaves["weights"]), rest, gate_up, call)
            (y * torch.linspace(-1, 1, y.shape[-1], device=DEVICE)).sum().backward()
            return {n: t.grad for n, t in leaves.items()}

        def errors(n: str, tokens: int = tokens, gate_up: str = gate_up, grads: Callable[..., Any] = grads):
            case = layer(tokens, 3, 16, 264, 136, gate_up, dtype)
            exact = grads("eager", *widened(*case))[n]
            return tuple(error(grads(name, *case)[n], exact) for name in ("grouped_mm", "eager"))

        for n in ("x", "weights", "w13", "w2", "b13", "b2"):
            ok, err, yardstick = judged(lambda n=n, errors=errors: errors(n))
            facts = dict(dtype=str(dtype), gate_up=gate_up, tokens=tokens, of=n, error=err, eager=yardstick)
            note("gradient grouped_mm", ok, **facts)
            note(
                "gradient eager", yardstick <= {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype], **facts
            )


def large(dtype: torch.dtype) -> None:
    """Both ways to sort, real widths, skewed routing, the same bits twice, memory that was poisoned before."""
    call = ExpertsCall(activation=ActivationSpec())
    for tokens, k, e, h, i in [
        (3000, 10, 512, 256, 128),
        (700, 8, 128, 2048, 768),
        (64, 32, 1024, 128, 64),
        (33, 8, 32, 2688, 1856),
    ]:
        x, topk, tensors = layer(tokens, k, e, h, i, "concat", dtype, bias=False)
        skew = torch.rand(tokens, e, device=DEVICE) * torch.linspace(1, 0, e, device=DEVICE) ** 8
        topk = TopK(torch.where(topk.ids < 0, -1, skew.topk(k).indices), topk.weights)
        with torch.no_grad():
            y = run("triton", x, topk, tensors, "concat", call)
            again = run("triton", x, topk, tensors, "concat", call)
            plain_y = run("eager", x, topk, tensors, "concat", call)
            some = slice(0, 64)
            case = x[some], TopK(topk.ids[some], topk.weights[some]), tensors
            exact = run("eager", *widened(*case), "concat", call)
            plain = error(run("eager", *case, "concat", call), exact)
        err, whole = error(y[some], exact), error(y, plain_y)
        facts = dict(dtype=str(dtype), tokens=tokens, experts=e, hidden=h, inter=i)
        note("large", err <= 2 * plain + 1e-6, error=err, eager=plain, **facts)
        note("large, all rows", whole <= 8 * plain + 1e-5, error=whole, eager=plain, **facts)
        note("same bits twice", torch.equal(y, again), **facts)


def offsets(dtype: torch.dtype) -> None:
    """Strides that reach beyond 2^31 elements: experts, rows of a weight, tokens."""
    pool = torch.empty(2**32 + 2**24, dtype=dtype, device=DEVICE).normal_(std=0.05)
    h, i, call = 256, 128, ExpertsCall(activation=ActivationSpec())
    for tokens in (1, 3, 40):
        big = 2**32 // max(tokens, 2)
        x = pool.as_strided((tokens, h), (big, 1))
        for stride_e, stride_n in ((2**31, h), (2**31 // 64, 2**31 // 256 + 8)):
            w13 = pool.as_strided((2, 2 * i, h), (stride_e, stride_n, 1), 512)
            w2 = pool.as_strided((2, h, i), (stride_e, stride_n, 1), 1024)
            ids = torch.tensor([[0, 1]], device=DEVICE).repeat(tokens, 1)
            case = x, TopK(ids, torch.rand(tokens, 2, device=DEVICE)), {"w13": w13, "w2": w2}
            err = error(run("triton", *case, "concat", call), run("eager", *widened(*case), "concat", call))
            note("offsets beyond 2^31", err <= 1e-2, dtype=str(dtype), tokens=tokens, stride=stride_e, row=stride_n, error=err)


def invariant(dtype: torch.dtype) -> None:
    """On request a token's bits depend neither on its company nor on its place; NaN in one token reaches no other."""
    call = ExpertsCall(activation=ActivationSpec(), batch_invariant=True)
    x, topk, tensors = layer(3000, 4, 16, 512, 256, "concat", dtype)
    whole = run("triton", x, topk, tensors, "concat", call)
    for rows in (torch.arange(1), torch.tensor([2999]), torch.arange(100, 117), torch.randperm(3000), torch.arange(1500)):
        at = rows.to(DEVICE)
        y = run("triton", x[at], TopK(topk.ids[at], topk.weights[at]), tensors, "concat", call)
        note("batch invariant", torch.equal(y, whole[at]), dtype=str(dtype), tokens=len(rows))
    bad = x.clone()
    bad[7] = math.nan
    y = run("triton", bad, topk, tensors, "concat", call)
    others = torch.arange(3000, device=DEVICE) != 7
    note("NaN stays alone", torch.equal(y[others], whole[others]) and bool(y[7].isnan().all()), dtype=str(dtype))


def custom_ops(dtype: torch.dtype) -> None:
    """`torch.library.opcheck` on the op that the backend calls, in each regime."""
    from moerunner.kernels.experts import triton_experts

    for tokens in (1, 40, 900):
        x, topk, t = layer(tokens, 4, 32, 256, 128, "concat", dtype)
        constants = (0, 0, 1.0, 0.0, None, False, None, None, False, 1, 1.0, False)
        torch.library.opcheck(triton_experts, (x, topk.ids, topk.weights, t["w13"], t["w2"], t["b13"], t["b2"], *constants))
        note("opcheck", True, dtype=str(dtype), tokens=tokens)


def sanitized(dtype: torch.dtype) -> None:
    """NVIDIA's compute-sanitizer finds no access outside of memory in a small case of each regime."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed: not run", flush=True)
        return
    command = [
        tool,
        "--tool",
        "memcheck",
        "--report-api-errors",
        "no",  # cuda-bindings asks the driver for functions that it may not have
        "--error-exitcode",
        "9",
        sys.executable,
        __file__,
        "--small",
        str(dtype).removeprefix("torch."),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    note("sanitizer", done.returncode == 0, dtype=str(dtype), said=done.stdout[-400:] + done.stderr[-400:])


def small(dtype: torch.dtype) -> None:
    """What runs under the sanitizer."""
    for tokens, gate_up in itertools.product((1, 9, 300), ("concat", "none")):
        run("triton", *layer(tokens, 3, 5, 72, 40, gate_up, dtype), gate_up, ExpertsCall(activation=ActivationSpec()))
    torch.cuda.synchronize()


def captured(dtype: torch.dtype) -> None:
    """A CUDA graph replayed with other tokens and ids, and torch.compile without a break."""
    call, backend = ExpertsCall(activation=ActivationSpec()), registry.get("triton")
    for tokens in (1, 40, 900):
        x, topk, tensors = layer(tokens, 4, 32, 256, 128, "concat", dtype, bias=False)
        run("triton", x, topk, tensors, "concat", call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run("triton", x, topk, tensors, "concat", call)
        other = layer(tokens, 4, 32, 256, 128, "concat", dtype, bias=False)
        x.copy_(other[0])
        topk.ids.copy_(other[1].ids)
        for _ in range(3):
            graph.replay()
        note("graph", torch.equal(y, run("triton", x, topk, tensors, "concat", call)), dtype=str(dtype), tokens=tokens)

        weights = ExpertWeights.of(tensors)

        def twice(x, topk=topk, weights=weights):
            return backend.run(x, topk, weights, call) * 2

        note("compile", torch.equal(torch.compile(twice, fullgraph=True)(x), y * 2), dtype=str(dtype), tokens=tokens)


def runners(dtype: torch.dtype) -> None:
    """Whole layers by `MoERunner`, every backend, against the oracle; float16 with a factor that would overflow it twice."""
    specs = {
        "qwen3": MoESpec(
            hidden_size=64, num_experts=8, top_k=2, routing=RoutingSpec(renormalise="sum"),
            experts=ExpertsSpec(intermediate_size=32), routed_scaling_factor=1.0, apply_routed_scale_to_output=False,
        ),
        "deepseek": MoESpec(
            hidden_size=64, num_experts=8, top_k=3,
            routing=RoutingSpec(score="sigmoid", selection_bias=True, renormalise="sum"),
            experts=ExpertsSpec(intermediate_size=32), shared=SharedSpec(width=48), routed_scaling_factor=16.0,
            apply_routed_scale_to_output=True,
        ),
    }  # fmt: skip
    for (name, spec), backend, tokens in itertools.product(
        specs.items(), ("eager", "grouped_mm", "triton", "auto"), (0, 1, 17)
    ):
        drawn = {n: torch.randn(s) * 0.2 for n, s in spec.weight_shapes().items()}
        kept = {n: t if n in ("gate", "selection_bias") else t.to(dtype) for n, t in drawn.items()}
        x = torch.randn(tokens, 64).to(dtype)
        exact = reference(spec, LayerWeights.of(spec, kept), x)
        runner = MoERunner(spec, {n: t.to(DEVICE) for n, t in kept.items()}, options=Options(backend=backend))
        with torch.no_grad():
            y = runner(x.to(DEVICE)).cpu()
        err = error(y, exact)
        limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        chosen = runner.plan.step("experts").kernel
        right = err <= limit and y.dtype == dtype
        note("runner", right, spec=name, dtype=str(dtype), backend=backend, ran=chosen, tokens=tokens, error=err)


PARTS = {
    **{f"forward {layout}": functools.partial(forward, gate_up=layout) for layout in ("concat", "interleaved", "none")},
    "runners": runners,
    "invariant": invariant,
    "custom ops": custom_ops,
    "sanitized": sanitized,
    "captured": captured,
    "gradients": gradients,
    "large": large,
    "offsets": offsets,
}


def check(part: str, dtype: torch.dtype) -> list[dict[str, object]]:
    """One part in one dtype, in a process of its own."""
    torch.manual_seed(0)
    found.clear()
    if part not in ("captured", "gradients"):
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN: what is never written shows
    try:
        PARTS[part](dtype)
    except Exception as exc:  # noqa: BLE001 - one broken part must not hide the others
        note(part, False, dtype=str(dtype), raised=f"{type(exc).__name__}: {str(exc)[:400]}")
    print(f"{part} {dtype}: {sum(bool(f['ok']) for f in found)} of {len(found)} right", flush=True)
    return found


def main() -> None:
    if sys.argv[1] == "--small":
        small(getattr(torch, sys.argv[2]))
        return
    context = multiprocessing.get_context("spawn")  # kernels compile side by side
    with concurrent.futures.ProcessPoolExecutor(14, mp_context=context) as pool:
        done = [pool.submit(check, part, dtype) for part in PARTS for dtype in DTYPES]
        all_found = [f for d in done for f in d.result()]
    worst: dict[str, float] = {}
    for f in all_found:
        if "error" in f:
            key = " ".join(str(f.get(n, "")) for n in ("check", "backend", "dtype")).strip()
            worst[key] = max(worst.get(key, 0.0), float(f["error"]))  # type: ignore[arg-type]
    environment = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    wrong = [f for f in all_found if not f["ok"]]
    Path(sys.argv[1]).write_text(
        json.dumps({"environment": environment, "checks": len(all_found), "wrong": wrong, "worst_error": worst}, indent=1)
        + "\n"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
