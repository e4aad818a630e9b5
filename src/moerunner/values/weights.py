"""The tensors of one layer and how they are cut over ranks.

Shape suffixes: E experts, I intermediate, H hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moerunner.errors import WeightsError
from moerunner.spec import MoESpec
from moerunner.values.runs import Runs, slot_runs, take, width_runs

GateUp = Literal["concat", "interleaved", "none"]


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor of the experts. `expert_dim` and `tp_dim` say where it may be cut, None where it may not.

    role: `gate_up` rows are gate and up, both halves are cut; `down` is cut along the intermediate width; `once` counts
    on one tensor-parallel rank only (the down bias); `whole` is the same for every expert and rank.
    """

    tensor: Tensor
    expert_dim: int | None
    tp_dim: int | None
    role: Literal["gate_up", "down", "once", "whole"]


_EXPERT_LAYOUT: dict[str, tuple[int | None, int | None, Any]] = {
    "w13": (0, 1, "gate_up"),
    "w2": (0, 2, "down"),
    "b13": (0, 1, "gate_up"),
    "b2": (0, None, "once"),
    "row_norm": (None, None, "whole"),
}
EXPERT_NAMES = tuple(_EXPERT_LAYOUT)
RECORD_NAMES = tuple(name for name, (dim, *_) in _EXPERT_LAYOUT.items() if dim is not None)  # of `ExpertWeights.record`


@dataclass(frozen=True)
class ExpertWeights:
    """The routed experts' tensors by name, in logical shapes with free strides.

    w13 [E, 2I, H] (gate rows first for `concat`, alternating for `interleaved`; [E, I, H] for `none`), w2 [E, H, I],
    b13 [E, 2I], b2 [E, H], row_norm [H]; a quantised format adds its scales under names of its own.
    """

    tensors: Mapping[str, ExpertTensor]
    gate_up: GateUp = "concat"
    format: str = "none"

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor | None], gate_up: GateUp = "concat") -> ExpertWeights:
        """From plain tensors named w13, w2, b13, b2, row_norm; None is left out."""
        unknown = sorted(set(tensors) - set(_EXPERT_LAYOUT))
        if unknown:
            raise WeightsError(f"no expert tensor is called {', '.join(unknown)}", where="ExpertWeights")
        return cls({n: ExpertTensor(t, *_EXPERT_LAYOUT[n]) for n, t in tensors.items() if t is not None}, gate_up)

    def get(self, name: str) -> Tensor | None:
        entry = self.tensors.get(name)
        return None if entry is None else entry.tensor

    @property
    def w13(self) -> Tensor:
        return self.tensors["w13"].tensor

    @property
    def w2(self) -> Tensor:
        return self.tensors["w2"].tensor

    @property
    def num_experts(self) -> int:
        return self.w2.shape[0]

    def record(self, expert: int) -> dict[str, Tensor]:
        """Everything that belongs to one expert, as views: what moves when the expert moves."""
        return {n: e.tensor.select(e.expert_dim, expert) for n, e in self.tensors.items() if e.expert_dim is not None}

    def shard(self, experts: list[int] | None, tp_rank: int, tp_size: int) -> ExpertWeights:
        """The part that one rank holds: these experts (-1 an empty slot of zeros; None all), this slice of the width.

        A width that does not divide is padded with zeros, which add nothing to the product with w2.
        """
        cut = {}
        for name, entry in self.tensors.items():
            tensor = entry.tensor
            if experts is not None and entry.expert_dim is not None:
                index = torch.tensor(experts, device=tensor.device)
                tensor = tensor.index_select(entry.expert_dim, index.clamp(min=0))
                if any(e < 0 for e in experts):
                    shape = [-1 if d == entry.expert_dim else 1 for d in range(tensor.ndim)]
                    tensor = torch.where((index < 0).view(shape), torch.zeros((), dtype=tensor.dtype), tensor)
            if tp_size > 1 and entry.tp_dim is not None:
                tensor = cut_width(tensor, entry.tp_dim, tp_rank, tp_size, **_blocks(entry.role, self.gate_up))
            cut[name] = dataclasses.replace(entry, tensor=tensor)
        return dataclasses.replace(self, tensors=cut)


def kept_runs(
    name: str, shape: tuple[int, ...], gate_up: GateUp, experts: list[int] | None, tp_rank: int, tp_size: int
) -> dict[int, Runs]:
    """What `ExpertWeights.shard` keeps of the tensor of this name and shape, along each dimension that it cuts."""
    expert_dim, tp_dim, role = _EXPERT_LAYOUT[name]
    found = {}
    if experts is not None and expert_dim is not None:
        found[expert_dim] = slot_runs(experts)
    if tp_size > 1 and tp_dim is not None:
        found[tp_dim] = width_runs(shape[tp_dim], tp_rank, tp_size, **_blocks(role, gate_up))
    return found


def _blocks(role: str, gate_up: GateUp) -> dict[str, int]:
    """How rows of gate and up bear on a cut: two blocks, or pairs that stay together."""
    pair = 2 if role == "gate_up" and gate_up == "interleaved" else 1
    return {"parts": 2 if role == "gate_up" and gate_up == "concat" else 1, "unit": pair}


def cut_width(tensor: Tensor, dim: int, rank: int, size: int, *, parts: int = 1, unit: int = 1) -> Tensor:
    """Slice `rank` of `size` along `dim`, in each of `parts` equal blocks, in whole `unit`s, padded with zeros."""
    return take(tensor, dim, width_runs(tensor.shape[dim], rank, size, parts=parts, unit=unit))


@dataclass(frozen=True)
class TensorMeta:
    """What a plan may know of a tensor. format and gate_up: of the experts' tensors."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    format: str = "none"
    gate_up: str = ""


@dataclass(frozen=True)
class LayerWeights:
    """All tensors of one layer: the experts of each modality set, the rest by the names of `MoESpec.weight_shapes`.

    functions: the caller's functions for `Custom` operations, named like their place, `output_transform.0`.
    """

    experts: tuple[ExpertWeights, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    functions: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: MoESpec, weights: Mapping[str, Any], gate_up: GateUp = "concat") -> LayerWeights:
        """From a mapping of names to tensors; missing, extra and mis-shaped ones are an error that lists them all.

        `experts` may stand for the experts' tensors: one `ExpertWeights`, or a sequence with one per modality set.
        The experts' hidden width may be padded beyond the spec's.
        """
        given = dict(weights)
        experts = given.pop("experts", None)
        functions: dict[str, Any] = {k: v for k, v in given.items() if not isinstance(v, Tensor) and callable(v)}
        tensors = {k: v for k, v in given.items() if isinstance(v, Tensor)}
        odd = {k: v for k, v in given.items() if k not in functions and k not in tensors}
        shapes = spec.weight_shapes(vocab_size=_rows(given.get("hash_table")))
        of_experts = [n for n in shapes if n.split(".")[0] in _EXPERT_LAYOUT]
        named = set(shapes) if experts is None else set(shapes) - set(of_experts)
        problems = _name_problems(named, {*tensors, *odd})
        problems += [f"{n} is a {type(v).__name__}, expected a tensor" for n, v in odd.items() if n in named]
        if experts is None:
            count, many = spec.routing.modalities, spec.routing.modalities > 1
            layout = gate_up if spec.experts.gated else "none"
            own = [[n for n in of_experts if n in tensors and (not many or n.endswith(f".{i}"))] for i in range(count)]
            experts = tuple(ExpertWeights.of({n.split(".")[0]: tensors.pop(n) for n in one}, layout) for one in own)
        else:
            experts = (experts,) if isinstance(experts, ExpertWeights) else tuple(experts)
        problems += [
            f"{n} has shape {list(t.shape)}, expected {list(shapes[n])}"
            for n, t in tensors.items()
            if n in named and tuple(t.shape) != shapes[n]
        ]
        problems += [
            f"{n} is {t.dtype}, expected {'whole numbers' if n == 'hash_table' else 'floating point'}"
            for n, t in tensors.items()
            if n in named and t.is_floating_point() == (n == "hash_table")
        ]
        table, choosable = tensors.get("hash_table"), spec.num_experts + spec.zero_experts
        if (
            table is not None
            and table.numel()
            and not table.is_meta
            and not 0 <= int(table.min()) <= int(table.max()) < choosable
        ):
            problems.append(f"hash_table holds ids from {int(table.min())} to {int(table.max())} of {choosable} experts")
        if len(experts) != spec.routing.modalities:
            problems.append(f"{len(experts)} expert sets given, the spec has {spec.routing.modalities}")
        else:
            problems += _expert_problems(spec, experts, shapes, names=named != set(shapes))
        wanted = {
            f"{name}.{i}"
            for name, transform in spec.transforms().items()
            for i, op in enumerate(transform.ops)
            if type(op).__name__ == "Custom"
        }
        problems += [f"function {n} is missing" for n in sorted(wanted - set(functions))]
        problems += [f"function {n} is not in the spec" for n in sorted(set(functions) - wanted)]
        if problems:
            next_step = "MoESpec.weight_shapes() lists what is needed"
            raise WeightsError("; ".join(problems), where="weights", next_step=next_step)
        return cls(experts, tensors, functions)

    def map(self, change: Callable[[str, Tensor], Tensor]) -> LayerWeights:
        """Every tensor replaced by `change(name, tensor)`; the names have no dots, sets beyond one end in _0, _1, ..."""
        sets = []
        for index, one in enumerate(self.experts):
            suffix = f"_{index}" if len(self.experts) > 1 else ""
            entries = {n: dataclasses.replace(e, tensor=change(n + suffix, e.tensor)) for n, e in one.tensors.items()}
            sets.append(dataclasses.replace(one, tensors=entries))
        tensors = {n: change(n.replace(".", "_"), t) for n, t in self.tensors.items()}
        return dataclasses.replace(self, experts=tuple(sets), tensors=tensors)

    @property
    def requires_grad(self) -> bool:
        """Whether any tensor does."""
        experts = (e.tensor for one in self.experts for e in one.tensors.values())
        return any(t.requires_grad for t in (*experts, *self.tensors.values()))

    def meta(self) -> dict[str, TensorMeta]:
        """Shapes, strides, dtypes and formats of everything, no tensors: the input of `resolve`."""
        metas = {name: _meta(tensor) for name, tensor in self.tensors.items()}
        for index, experts in enumerate(self.experts):
            for name, entry in experts.tensors.items():
                metas[f"experts.{index}.{name}"] = _meta(entry.tensor, experts.format, experts.gate_up)
        return metas


def _meta(tensor: Tensor, format: str = "none", gate_up: str = "") -> TensorMeta:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorMeta(tuple(tensor.shape), tuple(tensor.stride()), dtype, format, gate_up)


def _rows(table: Any) -> int | None:
    return table.shape[0] if isinstance(table, Tensor) and table.ndim else None


def _name_problems(wanted: set[str], given: set[str]) -> list[str]:
    missing, extra = sorted(wanted - given), sorted(given - wanted)
    return [f"missing {', '.join(missing)}"] * bool(missing) + [f"not in the spec: {', '.join(extra)}"] * bool(extra)


def _expert_problems(
    spec: MoESpec, experts: tuple[ExpertWeights, ...], shapes: dict[str, tuple[int, ...]], *, names: bool
) -> list[str]:
    """What is wrong with the experts' tensors; names: missing and extra ones too."""
    problems, width = [], spec.routed_hidden_size
    if len({(one.gate_up, one.format) for one in experts}) > 1:
        problems.append("expert sets differ in gate_up or format")
    for index, one in enumerate(experts):
        suffix = f".{index}" if spec.routing.modalities > 1 else ""
        wanted = {n.split(".")[0]: s for n, s in shapes.items() if n.endswith(suffix) and n.split(".")[0] in _EXPERT_LAYOUT}
        if (one.gate_up == "none") == spec.experts.gated:
            problems.append(f"gate_up={one.gate_up!r} but gated={spec.experts.gated}")
        if one.format != "none":  # a format checks its own tensors
            problems += [f"{n}{suffix} is missing" for n in ("w13", "w2") if n not in one.tensors]
            continue
        if names:
            problems += [f"{n}{suffix} is missing" for n in sorted(set(wanted) - set(one.tensors))]
            problems += [f"{n}{suffix} is not in the spec" for n in sorted(set(one.tensors) - set(wanted))]
        w13, w2 = one.get("w13"), one.get("w2")
        padded = max(width, w2.shape[1]) if w2 is not None and w2.ndim == 3 else width
        for name in sorted(set(one.tensors) & set(wanted)):
            expected = [padded if i == _hidden_dim(name) else d for i, d in enumerate(wanted[name])]
            got = list(one.tensors[name].tensor.shape)
            if got != expected:
                problems.append(f"{name}{suffix} has shape {got}, expected {expected}")
        if w13 is not None and w2 is not None and w13.dtype != w2.dtype:
            problems.append(f"w13{suffix} is {w13.dtype}, w2{suffix} is {w2.dtype}")
    return problems


def _hidden_dim(name: str) -> int:
    return {"w13": 2, "w2": 1, "b2": 1, "row_norm": 0}.get(name, -1)


def register(module: nn.Module, w: LayerWeights) -> LayerWeights:
    """Registers every tensor with the module, under its name with dots as underscores."""

    def one(name: str, tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor)
        return tensor

    for name, function in w.functions.items():
        if isinstance(function, nn.Module):
            module.add_module(name.replace(".", "_"), function)
    return w.map(one)
