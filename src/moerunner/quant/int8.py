"""`int8`: whole numbers from -127 to 127 with one float32 scale per output channel, w = q * scale.

Tensors: w13 [E, 2I, H] and w2 [E, H, I] in int8, w13_scale [E, 2I, 1], w2_scale [E, H, 1] (Jacob et al. 2018, symmetric).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moerunner.errors import WeightsError
from moerunner.values import ExpertTensor, ExpertWeights

NAME = "int8"
_LARGEST = 127


def quantize(experts: ExpertWeights) -> ExpertWeights:
    """Plain experts with their products rounded to the nearest of 255 steps per row; biases and norms as they are.

    Raises:
        WeightsError: a weight is not finite, or the experts are in a format already.
    """
    if experts.format != "none":
        raise WeightsError(f"the experts are in the format {experts.format!r} already", where="quantize")
    tensors = dict(experts.tensors)
    for name in ("w13", "w2"):
        entry = tensors[name]
        codes = torch.empty(entry.tensor.shape, dtype=torch.int8, device=entry.tensor.device)
        scales = torch.empty((*entry.tensor.shape[:2], 1), dtype=torch.float32, device=entry.tensor.device)
        for weight, code, scale in zip(entry.tensor.detach(), codes, scales, strict=True):  # an expert at a time: little memory
            _quantize_rows(weight.float(), code, scale, name)
        tensors[name] = dataclasses.replace(entry, tensor=codes)
        tensors[f"{name}_scale"] = ExpertTensor(scales, 0, 1 if name == "w13" else None, entry.role)
    return ExpertWeights(tensors, experts.gate_up, NAME)


def _quantize_rows(weight: Tensor, code: Tensor, scale: Tensor, name: str) -> None:
    largest = weight.abs().amax(-1, keepdim=True)
    if not torch.isfinite(largest).all():
        raise WeightsError(f"{name} has a weight that is not finite", where="quantize")
    torch.div(largest, _LARGEST, out=scale)
    code.copy_((weight / torch.where(scale > 0, scale, 1)).round().clamp(-_LARGEST, _LARGEST))


def dequantize(experts: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """The same experts as plain tensors of this dtype."""
    tensors = {n: e.tensor for n, e in experts.tensors.items() if not n.endswith("_scale")}
    for name in ("w13", "w2"):
        scale = experts.get(f"{name}_scale")
        if scale is None:
            raise WeightsError(f"{name}_scale is missing", where="format 'int8'")
        wide = torch.promote_types(dtype, torch.float32)
        tensors[name] = (tensors[name].to(wide) * scale.to(wide)).to(dtype)
    return ExpertWeights.of(tensors, experts.gate_up)
