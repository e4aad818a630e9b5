"""A Transformers model's linear layers on a CPU while text is generated, where PyTorch has no fast product of its own.

Sums are in float32 there too, and rounded once. Why: `kernels/cpu/linear.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from torch import Tensor, nn
from torch.nn import functional as F

from moerunner.kernels.cpu.linear import HALF, linear, worthwhile
from moerunner.models.block import PLAIN
from moerunner.models.decoding.modules import plain, replaced


def in_native_code(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, linear layers in bfloat16 and float16 are native code for two tokens and more. Without it nothing changes."""
    return replaced(_linears(model) if worthwhile() else ())


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    for module in plain(model):
        if type(module) is not nn.Linear or not all(type(held) in PLAIN for held in module.parameters()):
            continue
        if module.weight.device.type == "cpu" and module.weight.dtype in HALF:
            yield module, _forward(module)


def _forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        few = x.numel() < 2 * x.shape[-1]
        if few or x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype) or x.shape[-1] != weight.shape[1]:
            return F.linear(x, weight, bias)
        return linear(x, weight, bias)

    return forward
