"""How a layer is to be run, beside what it computes and who holds it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from moerunner.errors import SpecError

Output = Literal["replicate", "partial", "shard"]
Dispatch = Literal["auto", "allgather", "alltoall", "deepep"]
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Choices of the caller.

    dtype: of the tokens, by name or torch dtype; None takes the experts'. backend: an experts backend, or "auto".
    output: `replicate`: finished rows for the tokens that this rank passed; `partial`: this rank's share of the sum, for a
        caller who reduces it together with values of its own; `shard`: finished rows, this rank's part of the tokens.
    reduce_dtype: what partial sums travel in, of the output and of the tokens' gradients; None: the tokens' dtype, float32 for
        float16.
    grad: only kernels with a backward. None asks for it where tokens or weights require a gradient.
    deterministic: the same bits every run. batch_invariant: a token's bits do not depend on its company.
    capturable: fit for CUDA graphs. dispatch: how sharded tokens reach their experts; `deepep` needs that package.
    overlap: on CUDA shared experts run on a stream of their own, while tokens travel, or beside the router or the routed
    experts of few tokens.
    count_loads: `runner.loads` counts how often each expert is chosen. graphs: on CUDA the launches of up to 4,096 tokens are
        recorded as a CUDA graph when they come a second time, without gradients, and later calls launch that.
    """

    dtype: Any = None
    backend: str = "auto"
    output: Output = "replicate"
    reduce_dtype: Any = None
    grad: bool | None = None
    deterministic: bool = True
    batch_invariant: bool = False
    capturable: bool = False
    dispatch: Dispatch = "auto"
    overlap: bool = True
    count_loads: bool = False
    graphs: bool = True

    def __post_init__(self) -> None:
        for name in ("dtype", "reduce_dtype"):
            value = getattr(self, name)
            if value is None:
                continue
            text = str(value).removeprefix("torch.")
            if text not in DTYPES:
                raise SpecError(f"must be one of {', '.join(DTYPES)}, not {text}", where=f"Options.{name}")
            object.__setattr__(self, name, text)
        if not isinstance(self.backend, str):
            raise SpecError(f"must be a name, not {self.backend!r}", where="Options.backend")
        for name in ("grad", "deterministic", "batch_invariant", "capturable", "overlap", "count_loads", "graphs"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "grad" and value is None):
                raise SpecError(f"must be true or false, not {value!r}", where=f"Options.{name}")
        for name, kind in (("output", Output), ("dispatch", Dispatch)):
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise SpecError(f"must be one of {allowed}, not {getattr(self, name)!r}", where=f"Options.{name}")

    def travels(self, dtype: str) -> str:
        """What partial sums of tokens of this dtype travel in."""
        return self.reduce_dtype or ("float32" if dtype == "float16" else dtype)

    def replace(self, **changes: Any) -> Options:
        return dataclasses.replace(self, **changes)
