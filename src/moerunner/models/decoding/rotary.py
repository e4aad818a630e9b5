"""A Transformers model's rotary embedding of queries and keys in one launch while text is generated; it is some ten otherwise.

A modeling module has it as a function of its own, which its attention finds by name. Which of the usual forms a function
computes is found out when it is first called with tensors of a kind: one form must make of random numbers the same bits.
A function that fits none stays as it is.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moerunner.models.decoding.swap import Place, swapped

NAMES = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave")
"""What modeling modules call it. It takes queries and keys, or one of them, then `cos` and `sin`."""

_ROWS, _TOKENS = 1, 3  # of a trial
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def one_launch(model: nn.Module) -> Iterator[None]:
    """Inside, this thread's calls of a model's rotary embedding run as a kernel."""
    with swapped(places_of(model), Fused.of):
        yield


def places_of(model: nn.Module) -> list[Place]:
    """Where the Python modules of a model's code may have such functions."""
    names = dict.fromkeys(kind.__module__ for kinds in {type(m).__mro__ for m in model.modules()} for kind in kinds)
    return [(vars(sys.modules[module]), name) for module in names if module in sys.modules for name in NAMES]


class Fused:
    """In place of a modeling module's own function. count: of queries and keys, how many that takes."""

    def __init__(self, own: Callable[..., Any], count: int) -> None:
        self.own, self._count = own, count
        self._forms: dict[tuple[Any, ...], Any] = {}

    @classmethod
    def of(cls, own: Any) -> Fused | None:
        """None if the function takes something else."""
        names = list(inspect.signature(own).parameters) if callable(own) else []
        count = names.index("cos") if "cos" in names else 0
        return cls(own, count) if count in (1, 2) and names[count + 1 : count + 2] == ["sin"] else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        known = len(args) == self._count + 2 and not kwargs.keys() - {"unsqueeze_dim"}
        form = self._form(args, kwargs) if known else None
        return self.own(*args, **kwargs) if form is None else self._turned(args, kwargs, form)

    def _form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The form that the function has for such tensors; None if it has none, or if the kernel takes no such tensors."""
        tensors, heads_at = [t for t in args if t is not None], kwargs.get("unsqueeze_dim", 1)
        if args[0] is None or len(tensors) < 3 or heads_at not in (1, 2) or not _fit(tensors, heads_at):
            return None
        kind = (heads_at, *((t is None, t is not None and (t.dtype, t.device, t.shape[-1])) for t in args))
        if kind not in self._forms:
            if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
                return None  # a trial waits for the device
            self._forms[kind] = self._found(args, kwargs)
        return self._forms[kind]

    @torch.no_grad()
    def _found(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Tries the forms on random numbers: few tokens of few heads."""
        from moerunner.kernels.rotary import FORMS

        draw = torch.Generator(args[0].device).manual_seed(0)

        def drawn(like: Tensor | None, *shape: int) -> Tensor | None:
            if like is None:
                return None
            return torch.randn(*shape, like.shape[-1], device=like.device, generator=draw).to(like.dtype)

        apart = kwargs.get("unsqueeze_dim", 1) == 2
        trial = [drawn(x, _ROWS, *((_TOKENS, n) if apart else (n, _TOKENS))) for x, n in zip(args[:-2], (3, 2), strict=False)]
        trial += [drawn(x, _ROWS, _TOKENS) for x in args[-2:]]
        try:
            expected = self.own(*trial, **kwargs)
        except (RuntimeError, TypeError, ValueError):  # it wants more than that
            return None
        for form in FORMS:
            if args[-1].shape[-1] * (1 if form.wide else 2) > args[0].shape[-1]:
                continue
            if _same(expected, self._turned(tuple(trial), kwargs, form)):
                return form
        return None

    def _turned(self, args: tuple[Any, ...], kwargs: dict[str, Any], form: Any) -> Any:
        from moerunner.kernels.rotary import rotary

        def swapped(x: Any) -> Any:
            return x.transpose(1, 2) if x is not None and kwargs.get("unsqueeze_dim", 1) == 2 else x

        *given, cos, sin = args
        q, k = (swapped(x) for x in (*given, None)[:2])
        cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))  # gpt-oss transposes its angles
        out = tuple(map(swapped, rotary(q, k, cos, sin, form)))
        return out if self._count == 2 else out[0]


def _fit(tensors: Sequence[Any], heads_at: int) -> bool:
    """Whether these, of which the last two are cosines and sines, are what the kernel takes."""
    *given, cos, sin = tensors
    if any(type(t) is not Tensor or t.dtype not in _DTYPES or t.requires_grad for t in tensors):
        return False
    x = given[0]
    if not all(t.ndim == 4 and t.dtype == x.dtype and t.shape[-1] == x.shape[-1] for t in given):
        return False
    if cos.ndim != 3 or cos.shape != sin.shape or any(t.device != x.device for t in tensors):
        return False
    if any(t.stride(-1) != 1 for t in given):
        return False
    tokens = {(t.shape[0], t.shape[3 - heads_at]) for t in given}
    if tokens != {(x.shape[0], cos.shape[1])} or cos.shape[0] not in (1, x.shape[0]):
        return False
    return (x.is_cuda or _interpreting()) and not torch.compiler.is_compiling()


def _same(expected: Any, found: Any) -> bool:
    """Whether two results are the same tensors, to the bit."""
    if not isinstance(expected, tuple):
        expected, found = (expected,), (found,)
    if len(expected) != len(found):
        return False
    for a, b in zip(expected, found, strict=True):
        if (a is None) != (b is None) or (a is not None and (a.dtype != b.dtype or not torch.equal(a, b))):
            return False
    return True


def _interpreting() -> bool:
    from moerunner.kernels.common import INTERPRETING

    return INTERPRETING
