"""Small expert layers and what they must give: float64, and plain PyTorch in the layer's dtype as the yardstick."""

from __future__ import annotations

import dataclasses

import torch

from moerunner.experts import eager
from moerunner.experts.base import ExpertsCall
from moerunner.kernels.experts import LAYOUTS, ROWS, SUMMED, run
from moerunner.kernels.operators import KINDS
from moerunner.kernels.tiles import Few, Grouped, Product
from moerunner.spec import ActivationSpec
from moerunner.values import ExpertWeights, TopK

# Small enough that every case has several tiles of everything and a partial one.
_PRODUCT = Product(block_n=32, block_k=32, warps=4, stages=2)
_WITH_TMA = Product(block_n=32, block_k=32, warps=4, stages=2, tma=True)
TILES = {
    "few": Few(Product(32, 64, 4, 1), Product(64, 32, 4, 1)),
    "few, each": Few(Product(32, 64, 4, 1), Product(64, 32, 4, 1), each=Product(32, 16, 4, 1)),
    "grouped": Grouped(16, _PRODUCT, _PRODUCT),
    "tma": Grouped(16, _WITH_TMA, _WITH_TMA),
}


@dataclasses.dataclass(frozen=True)
class Case:
    x: torch.Tensor
    topk: TopK
    weights: ExpertWeights
    call: ExpertsCall

    def kernel(self, tiles=None, output=None, **changes):
        """The kernels with these tiles, in the output the call asks for; changes replace x, ids or weights, or add `addend`."""
        a, w = self.call.activation.resolved(), self.weights
        return run(
            changes.get("x", self.x), changes.get("ids", self.topk.ids), changes.get("topk_weights", self.topk.weights),
            w.w13, w.w2, w.get("b13"), w.get("b2"), LAYOUTS.index(w.gate_up), KINDS.index(a.kind),
            1.0 if a.alpha is None else a.alpha,
            a.beta, a.limit, a.clamp_after, a.gate_softcap, a.up_softcap, self.call.input_weighting,
            (SUMMED if self.call.output == "summed" else ROWS) if output is None else output, self.call.scale, tiles,
            *changes.get("addend", ()),
        )  # fmt: skip

    def exact(self):
        """float64, scaled."""
        return _plain(self, torch.float64, None) * self.call.scale

    def bound(self):
        """The error that is allowed: twice that of the same computation rounded to the layer's dtype between its steps."""
        exact = self.exact()
        assert exact.isfinite().all(), "a layer without a right result cannot be judged"
        wide = self.x.dtype == torch.float32  # which nothing is rounded to: its error is that of its sums
        plain = _plain(self, torch.float32, None) if wide else _plain(self, torch.float64, self.x.dtype)
        return 2 * error(plain * self.call.scale, exact) + 1e-6

    def redrawn(self):
        """The same problem with the numbers of every tensor in another order."""

        def mixed(t):
            return torch.empty_like(t).copy_(t.flatten()[torch.randperm(t.numel(), device=t.device)].view(t.shape))

        w = self.weights
        tensors = {name: mixed(t) for name in ("w13", "w2", "b13", "b2") if (t := w.get(name)) is not None}
        return dataclasses.replace(self, x=mixed(self.x), weights=ExpertWeights.of(tensors, w.gate_up))


def _plain(case: Case, dtype: torch.dtype, rounded: torch.dtype | None):
    """A loop over experts. rounded: every product and activation is rounded to this dtype, as plain PyTorch does."""

    def keep(t):
        return t if rounded is None else t.to(rounded).to(dtype)

    w, a = case.weights, case.call.activation
    x, p = case.x.to(dtype), case.topk.weights.to(dtype).where(case.topk.ids >= 0, 0)
    tokens, k = case.topk.ids.shape
    rows = x.new_zeros(tokens, k, w.w2.shape[1])
    for t in range(tokens):
        for j, e in enumerate(case.topk.ids[t].tolist()):
            if e < 0:
                continue
            v = keep(x[t] * p[t, j]) if case.call.input_weighting else x[t]
            b13, b2 = w.get("b13"), w.get("b2")
            h = keep(w.w13[e].to(dtype) @ v + (0 if b13 is None else b13[e].to(dtype)))
            h = keep(eager.activate(h, a, gate_up=w.gate_up))
            rows[t, j] = keep(w.w2[e].to(dtype) @ h + (0 if b2 is None else b2[e].to(dtype)))
    if case.call.output == "rows":
        return rows
    return rows.sum(1) if case.call.input_weighting else (rows * p[..., None]).sum(1)


def error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """max|y - exact| / max|exact|; NaN and infinities never pass."""
    return ((y.double() - exact).abs().max() / exact.abs().max()).nan_to_num(torch.inf).item()


def case(
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    tokens: int = 6,
    top_k: int = 3,
    experts: int = 5,
    hidden: int = 72,
    inter: int = 40,
    gate_up: str = "concat",
    activation: ActivationSpec | None = None,
    bias: bool = False,
    skip: bool = True,
    transposed: bool = False,
    **call,
) -> Case:
    """Random tokens, ids and weights. skip: some slots have no expert. transposed: weights lie [E, in, out] in memory."""

    def draw(*shape, scale=1.0):
        t = (torch.randn(*shape) * scale).to(dtype)
        return (t.transpose(-1, -2).contiguous().transpose(-1, -2) if transposed and t.ndim == 3 else t).to(device)

    rows = inter if gate_up == "none" else 2 * inter
    tensors = {
        "w13": draw(experts, rows, hidden, scale=2 * hidden**-0.5),
        "w2": draw(experts, hidden, inter, scale=inter**-0.5),
        "b13": draw(experts, rows, scale=0.5) if bias else None,
        "b2": draw(experts, hidden, scale=0.5) if bias else None,
    }
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    if skip:
        ids[0, 0] = ids[-1, :] = -1
    weights = torch.rand(tokens, top_k) + 0.1
    weights[ids < 0] = torch.nan  # never read
    topk = TopK(ids.to(device), weights.to(device))
    spec = activation or ActivationSpec()
    return Case(draw(tokens, hidden), topk, ExpertWeights.of(tensors, gate_up), ExpertsCall(activation=spec, **call))
