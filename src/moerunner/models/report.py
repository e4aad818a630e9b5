"""What `patch` did, block by block."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from moerunner.parallel.layout import Layout

_ROOT = "(the model)"


@dataclass(frozen=True)
class Replaced:
    """A block that moerunner runs. copied_bytes: memory that its weights take beside the model's own. already: it was
    patched before, and this call changed nothing."""

    name: str
    family: str
    backend: str
    copied_bytes: int
    already: bool = False


@dataclass(frozen=True)
class Skipped:
    """A block that looks like a mixture of experts and was left as it is."""

    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Every MoE block of a model: those that were replaced, and the others with the reason. `str` gives a table.

    notes: what is no failure and should be known. layout: of the model over several ranks, of which `rank` is this one.
    tp_plan: modules outside of the blocks that Transformers' own plan splits over them; all others are whole.
    """

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    layout: Layout | None = None
    rank: int = 0
    tp_plan: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        if not self.replaced and not self.skipped:
            return "The model has no mixture-of-experts block."
        lines = []
        if self.replaced:
            heads = ("replaced", "family", "backend", "copied bytes")
            rows = [
                (r.name or _ROOT, r.family, r.backend, f"{r.copied_bytes:,}" + "  already patched" * r.already)
                for r in self.replaced
            ]
            lines += _table(heads, rows)
        if self.skipped:
            lines += [""] * bool(lines) + _table(
                ("left as it is", "because"), [(s.name or _ROOT, s.reason) for s in self.skipped]
            )
        if self.layout is not None:
            here = self.layout.coordinates(self.rank)
            places = ", ".join(f"{axis} {at} of {getattr(self.layout, axis)}" for axis, at in here.items())
            lines += ["", f"rank {self.rank} of {self.layout.world}: {places}"]
        if self.tp_plan:
            lines.append(f"{len(self.tp_plan)} modules outside of the blocks are split by Transformers' tp_plan")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)]
