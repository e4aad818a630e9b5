"""A whole MoE layer, from its input to its output: a patched Transformers block beside the same block unpatched.

Gate, routing, experts, shared experts and sum; random weights. Shape suffixes: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moerunner.bench.experts import Measured, copies_of, error, time_all
from moerunner.bench.peers import words
from moerunner.bench.shapes import SHAPES, Peaks
from moerunner.errors import UnsupportedError
from moerunner.models.adapt import patch, runners
from moerunner.models.prepare import sites
from moerunner.ops.reference import reference, reference_route
from moerunner.runner import MoERunner

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {  # the family, and its config beside the sizes of `SHAPES`
    "mixtral-8x7b": ("mixtral", {}),
    "qwen3-30b": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3-next": ("qwen3_next", {"shared_expert_intermediate_size": 512, "norm_topk_prob": True}),
    "olmoe": ("olmoe", {}),
    "glm-4.5-air": ("glm4_moe", {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}),
    "gpt-oss-120b": ("gpt_oss", {}),
    "deepseek-v3-tp8": ("deepseek_v3", {"n_shared_experts": 1, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}),
    "small": ("qwen3_moe", {"norm_topk_prob": True}),
}
_WAYS = ("eager", "batched_mm", "grouped_mm", "sonicmoe", "deepgemm")
_CHECKED, _DRAWN = 2, 64
"""So many tokens are compared, those of so many whose last chosen key lies furthest above the best one left out: where the two
are near, rounding decides."""


def make_block(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """The first MoE block of a model of the family, with random weights; the rest of the model has no memory.

    Raises:
        UnsupportedError: no layer is known for this shape, or Transformers does not have the family.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if name not in LAYERS or LAYERS[name][0] not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"no whole layer is known for {name!r}", where="bench --layer", next_step=f"Known: {', '.join(LAYERS)}"
        )
    (family, changes), shape = LAYERS[name], SHAPES[name]
    kind: Any = CONFIG_MAPPING[family]
    known = kind().to_dict()
    inter = "moe_intermediate_size" if "moe_intermediate_size" in known else "intermediate_size"
    sizes = {"hidden_size": shape.hidden, inter: shape.inter, "num_experts_per_tok": shape.top_k, "num_hidden_layers": 1}
    sizes |= {key: shape.experts for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in known}
    elsewhere = {"first_k_dense_replace": 0, "num_attention_heads": 1, "num_key_value_heads": 1}  # the attention is not run
    sizes |= {key: value for key, value in elsewhere.items() if key in known}
    config: Any = kind(**sizes, **changes, vocab_size=64, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    block = next(site.block for site in sites(model) if site.family is not None).to(dtype).to_empty(device=device).eval()
    with torch.no_grad():
        for tensor in [*block.parameters(), *block.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(std=tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.1)
    return block


def measure_layer(
    name: str,
    tokens: Iterable[int],
    *,
    peaks: Peaks,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    only: Iterable[str] | None = None,
    seed: int = 0,
) -> Iterator[list[Measured]]:
    """The patched block and Transformers' own ways to run its experts, one list per number of tokens.

    The router chooses, so routing is that of random tokens. Raises as `make_block`.
    """
    torch.manual_seed(seed)
    blocks = [make_block(name, dtype, device) for _ in range(copies_of(SHAPES[name], dtype))]
    for block in blocks:
        patch(block)
    ways = {"moerunner": _patched, **{f"transformers.{way}": _own(way) for way in _WAYS}}
    chosen = {n: way for n, way in ways.items() if only is None or n in set(only)}
    runner = next(iter(runners(blocks[0]).values()))
    for count in tokens:
        inputs = [torch.randn(1, count, SHAPES[name].hidden, device=device).to(dtype) for _ in range(8 if count <= 1024 else 4)]
        rows, exact, inputs[0] = _judged(runner, inputs[0])
        errors, problems = {}, {}
        for n, way in chosen.items():
            try:
                with torch.no_grad():
                    errors[n] = error(way(blocks[0], inputs[0])[rows], exact)
            except Exception as problem:  # noqa: BLE001 - another implementation's failure is a result
                problems[n] = words(problem)
                continue
            if not errors[n] <= max(4 * torch.finfo(dtype).eps, 2e-5):
                problems[n] = f"wrong: error {errors[n]:.1e}"
        right = {n: way for n, way in chosen.items() if n not in problems}
        pairs = [(blocks[i % len(blocks)], x) for i, x in enumerate(inputs)]
        calls = {n: [lambda way=way, b=b, x=x: way(b, x) for b, x in pairs] for n, way in right.items()}
        with torch.no_grad():
            graph, eager, uncaptured = time_all(calls, {n: n != "transformers.eager" for n in right}, device)
        problems |= uncaptured
        floor = _floor(runner, blocks[0], inputs[0], peaks, dtype)
        yield [
            Measured(
                name, count, "the router's", n, floor, floor, graph.get(n), eager.get(n), errors.get(n),
                errors.get("transformers.eager", 0.0), problems.get(n, ""), n == "moerunner",
            )
            for n in chosen
        ]  # fmt: skip


def _patched(block: nn.Module, x: Tensor) -> Tensor:
    return _rows(block.forward(x))


def _own(way: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """The block's own forward, with this implementation of the experts."""

    def run(block: nn.Module, x: Tensor) -> Tensor:
        for module in block.modules():
            config = getattr(module, "config", None)
            if config is not None:
                config._experts_implementation = way
        own: Any = type(block).forward
        return _rows(own(block, x))

    return run


def _rows(y: Any) -> Tensor:
    y = y[0] if isinstance(y, tuple) else y
    return y.reshape(-1, y.shape[-1])


def _judged(runner: MoERunner, x: Tensor) -> tuple[list[int], Tensor, Tensor]:
    """Some rows, their float64 output, and x with them in it: of `_DRAWN` random tokens those whose choice is clearest."""
    weights = runner.layer_weights()
    drawn = torch.randn(_DRAWN, x.shape[-1], device=x.device).to(x.dtype)
    margins = [choice.margin for choice in reference_route(runner.spec, weights, drawn)]
    rows = list(range(min(_CHECKED, x.shape[1])))
    x = x.clone()
    x[0, rows] = drawn[sorted(range(_DRAWN), key=margins.__getitem__)[-len(rows) :]]
    return rows, reference(runner.spec, weights, x[0, rows]).to(x.device), x


def _floor(runner: MoERunner, block: nn.Module, x: Tensor, peaks: Peaks, dtype: torch.dtype) -> float:
    """As `floor_seconds`, with all that every token reads: the gate and the shared experts."""
    x_TH = x.reshape(-1, x.shape[-1])
    hit, k, spec = runner.route(x_TH).ids.unique().numel(), runner.spec.top_k, runner.spec
    experts = runner.layer_weights().experts[0]
    each = sum(entry.tensor.numel() for entry in experts.tensors.values()) // spec.num_experts
    rest = sum(p.numel() for p in block.parameters()) - spec.num_experts * each
    moved = (hit * each + rest + 2 * x_TH.numel()) * dtype.itemsize
    return max(moved / peaks.bytes_per_second, 2 * len(x_TH) * (k * each + rest) / peaks.flops)
