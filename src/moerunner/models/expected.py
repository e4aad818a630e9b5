"""What each rank of a layout will hold and have to do, from loads that were measured or assumed; nothing is run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moerunner.errors import SpecError
from moerunner.models.inspection import Inspection, Kind
from moerunner.parallel.balance import imbalance, placement, rank_loads
from moerunner.parallel.layout import Layout


@dataclass(frozen=True)
class Trace:
    """Loads that were measured. rows: of each layer how often each expert was chosen. names: of the layers, if known."""

    rows: list[list[float]]
    names: list[str]


@dataclass(frozen=True)
class LayerLoad:
    """One layer under a layout. per_ep: the load of each ep coordinate over the mean. placed: the busiest one's, if as many
    slots were filled by load, which is what `rebalance` does."""

    name: str
    per_ep: list[float]
    placed: float

    @property
    def busiest(self) -> float:
        return max(self.per_ep)


@dataclass(frozen=True)
class RankLoad:
    """One rank. size: bytes of its part of the model. load: over the mean of all ranks, on average over the layers; most: in
    the layer where it is highest."""

    rank: int
    dp: int
    ep: int
    tp: int
    size: int
    load: float
    most: float


def read_trace(path: str | Path) -> Trace:
    """Loads of one or several layers from a JSON file: a list with a number for each expert, a list of such lists, or what
    `moerunner route --json` prints.

    Raises:
        SpecError: the file holds something else.
    """
    try:
        data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"is not JSON ({error})", where=str(path)) from error
    names: list[Any] = []
    if isinstance(data, dict) and isinstance(data.get("layers"), list):
        names = [layer.get("name") if isinstance(layer, dict) else None for layer in data["layers"]]
        data = [layer.get("load") if isinstance(layer, dict) else layer for layer in data["layers"]]
    layers: Any = [data] if isinstance(data, list) and data and not isinstance(data[0], list) else data
    good = isinstance(layers, list) and layers and all(isinstance(row, list) and row for row in layers)
    if not good or not all(_is_load(n) for row in layers for n in row) or not all(map(any, layers)):
        what = "is not a list with a load of at least 0 for each expert, some above 0, nor a list of such lists"
        raise SpecError(what, where=str(path))
    return Trace(layers, names if names and all(isinstance(name, str) for name in names) else [])


def zipf(experts: int, skew: float) -> list[float]:
    """Loads that fall with the rank r of an expert as 1 / r ** skew; 0 is uniform."""
    if not math.isfinite(skew) or skew < 0:
        raise SpecError(f"must be at least 0, not {skew}", where="skew")
    return [(r + 1) ** -skew for r in range(experts)]


def loads_of(found: Inspection, *, skew: float = 0.0, trace: Trace | None = None) -> dict[str, list[float]]:
    """How often each expert of each MoE layer is chosen, by the layer's name.

    Args:
        skew: as `zipf` takes it, expert 0 being the hottest. trace: in its place; one row stands for all layers, several
            belong to the layers of their names, or to all in order.

    Raises:
        SpecError: the trace is of other layers or of another number of experts.
    """
    kinds = _kind_of(found)
    if trace is None:
        return {name: zipf(kind.spec.num_experts, skew) for name, kind in kinds.items()}
    if len(trace.rows) == 1:
        given = dict.fromkeys(kinds, trace.rows[0])
    elif trace.names:
        given = dict(zip(trace.names, trace.rows, strict=True))
    elif len(trace.rows) == len(kinds):
        given = dict(zip(kinds, trace.rows, strict=True))
    else:
        raise SpecError(f"has loads of {len(trace.rows)} layers, the model has {len(kinds)} MoE layers", where="trace")
    for name, kind in kinds.items():
        if name not in given:
            raise SpecError(f"has no loads of {name}", where="trace", next_step=f"It has those of {', '.join(given)}")
        if len(given[name]) != kind.spec.num_experts:
            what = f"has loads of {len(given[name])} experts, {name} has {kind.spec.num_experts}"
            raise SpecError(what, where="trace")
    return {name: given[name] for name in kinds}


def layer_loads(found: Inspection, loads: Mapping[str, Sequence[float]]) -> list[LayerLoad]:
    """What `loads` are for the ranks of the layout that the model was inspected for."""
    made = []
    for name, kind in _kind_of(found).items():
        slots, sets = kind.slots, kind.spec.routing.modalities
        copies = (sum(e >= 0 for row in slots for e in row) - kind.spec.num_experts) // sets
        best = placement(loads[name], found.layout.ep, redundant=copies, sets=sets)
        per_rank = rank_loads(loads[name], slots)
        mean = math.fsum(per_rank) / len(per_rank)
        made.append(LayerLoad(name, [n / mean for n in per_rank], imbalance(rank_loads(loads[name], best))))
    return made


def ranks_of(found: Inspection, layers: Sequence[LayerLoad]) -> list[RankLoad]:
    """Every rank. Ranks of one ep coordinate have equally much to do: tp splits each expert, dp the tokens."""
    size = found.size - found.moe + found.moe_rank
    if not layers:
        return []
    made = []
    for rank in range(found.layout.world):
        at = found.layout.coordinates(rank)
        own = [layer.per_ep[at["ep"]] for layer in layers]
        made.append(RankLoad(rank, **at, size=size, load=math.fsum(own) / len(own), most=max(own)))
    return made


def layout_of(text: str) -> Layout:
    """`ep=4,tp=2,redundant=8`: the fields of `Layout` by name.

    Raises:
        SpecError: a field that is not there, or a value that is none.
    """
    known = [field.name for field in dataclasses.fields(Layout)]
    given: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in known or name in given:
            step = f"Give fields such as ep=4,tp=2; there are {', '.join(known)}"
            raise SpecError(f"{part!r} is not NAME=VALUE of a field that is given once", where="--layout", next_step=step)
        if name in ("tokens", "shared", "placement"):
            given[name] = value
            continue
        try:
            given[name] = float(value) if name == "timeout" else int(value)
        except ValueError as error:
            raise SpecError(f"{name} must be a number, not {value!r}", where="--layout") from error
    return Layout(**given)


def _kind_of(found: Inspection) -> dict[str, Kind]:
    """The kind of each MoE layer, in the order of the model."""
    named = {block: kind for kind in found.kinds for block in kind.blocks}
    return {block: named[block] for block in found.blocks if block in named}


def _is_load(n: object) -> bool:
    return isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) and n >= 0
