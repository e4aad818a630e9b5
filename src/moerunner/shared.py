"""Shared experts: the MLP that every token goes through, reading the caller's tokens and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moerunner.experts.base import Addend
from moerunner.ops.activation import gated
from moerunner.ops.precision import Product, linear, wide
from moerunner.spec import SharedSpec

_OF_MLP = ("shared_w13", "shared_gate_proj", "shared_up_proj", "shared_w2")


class SharedExperts:
    """The shared experts of one layer, or the slice of them that one rank holds.

    w13 is one tensor of gate rows then up rows, or two tensors `shared_gate_proj` and `shared_up_proj` (their biases have
    `_bias` behind the name). Without a router gate all of them are one MLP. `adds_bias`: this rank adds the down bias (one
    rank of a sharded group does). `product`: what multiplies, `linear` or one that is batch invariant. `kernels`: what stands
    beside the products is a launch of Triton each.
    """

    def __init__(self, spec: SharedSpec, *, adds_bias: bool = True, product: Product = linear, kernels: bool = False) -> None:
        self.spec, self.adds_bias, self._product = spec, adds_bias, product
        self._gated, self._share = _in_one_launch() if kernels else (gated, self._sigmoid)

    def __call__(self, x_TH: Tensor, tensors: Mapping[str, Tensor], shared_weights_TS: Tensor | None = None) -> Tensor:
        """[T, H] in float32 (float64 for float64 tokens)."""
        spec = self.spec
        if spec.gate == "router":
            assert shared_weights_TS is not None
            each = [{name: tensor[s] for name, tensor in tensors.items() if name in _OF_MLP} for s in range(spec.count)]
            parts = [wide(self._mlp(x_TH, mine)) * shared_weights_TS[:, s, None] for s, mine in enumerate(each)]
            return torch.stack(parts).sum(0)
        return self.addend(x_TH, tensors).output()

    def addend(self, x_TH: Tensor, tensors: Mapping[str, Tensor]) -> Addend:
        """The same, for a backend that adds it; of shared experts that the router does not weigh."""
        gate = tensors.get("shared_gate")
        return Addend(self._mlp(x_TH, tensors), share=None if gate is None else self._share(x_TH, gate))

    def projections(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The rows of the gate and of the up weight; ungated, those of the one there is."""
        if "shared_w13" not in tensors:
            return tensors["shared_gate_proj"], tensors["shared_up_proj"]
        w13 = tensors["shared_w13"]
        if not self.spec.gated:
            return w13, None
        half = w13.shape[0] // 2
        return w13[:half], w13[half:]

    def _sigmoid(self, x_TH: Tensor, gate_1H: Tensor) -> Tensor:
        return torch.sigmoid(wide(self._product(x_TH, gate_1H, None))).squeeze(-1)

    def _mlp(self, x_TH: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        spec, b13 = self.spec, tensors.get("shared_b13")
        if "shared_w13" in tensors:
            h = self._product(x_TH, tensors["shared_w13"], b13)
            gate, up = h.chunk(2, dim=-1) if spec.gated else (h, None)
        else:
            names = ("shared_gate_proj", "shared_up_proj")
            biases = [tensors.get(f"{name}_bias") for name in names] if b13 is None else b13.chunk(2)
            gate, up = (self._product(x_TH, tensors[name], bias) for name, bias in zip(names, biases, strict=True))
        h = self._gated(gate, up, spec.activation)
        return self._product(h, tensors["shared_w2"], tensors.get("shared_b2") if self.adds_bias else None)


def _in_one_launch() -> tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """Imported on first use: Triton may be absent."""
    from moerunner.kernels.shared import gated, triton_share

    return gated, triton_share
