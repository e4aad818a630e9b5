"""What a checkpoint folder holds, without loading a weight: its MoE layers, their memory, the kernel for each and why.

The model is built without data, so that every block is found as `patch` finds it and every size is that of the tensors
that `load` would make.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moerunner.errors import PlanError, UnsupportedError, WeightsError
from moerunner.models import words
from moerunner.models.checkpoint import INDEX, ONE_FILE, no_weights, read_recipe
from moerunner.models.experts_function import ExpertsOnly
from moerunner.models.load import Blueprint, blueprint
from moerunner.models.prepare import Site, sites, source_of
from moerunner.models.registry import forward_owner
from moerunner.parallel.comm import SimulatedComm
from moerunner.parallel.cut import local_part
from moerunner.parallel.layout import Layout
from moerunner.parallel.pairs import SlotMap
from moerunner.plan import Options, Plan, resolve
from moerunner.spec import MoESpec
from moerunner.values import LayerWeights

_ROUTER = ("gate", "selection_bias", "per_expert_scale", "global_scale", "hash_table")


@dataclass(frozen=True)
class Memory:
    """Bytes of one layer's weights. transforms: of the layer's own, and its output bias."""

    routed: int = 0
    shared: int = 0
    router: int = 0
    transforms: int = 0

    @property
    def total(self) -> int:
        return self.routed + self.shared + self.router + self.transforms

    def to_dict(self) -> dict[str, int]:
        return {**dataclasses.asdict(self), "total": self.total}


@dataclass(frozen=True)
class Stack:
    """A list of layers with MoE blocks in some of them. moe: their indices."""

    name: str
    layers: int
    moe: list[int]


@dataclass(frozen=True)
class Kind:
    """MoE layers that are equal but for the values of their weights. name: with the range of their indices in its place;
    blocks: their names.

    experts_only: the family is not in the table, and the model's own router and shared experts run around the experts.
    dtype: of the experts. parameters, active: weights of one layer, and those at work on one token. memory: of one layer;
    rank: the part of it that one rank of the layout holds.
    """

    name: str
    layers: int
    family: str
    experts_only: bool
    block: str
    spec: MoESpec
    dtype: str
    parameters: int
    active: int
    memory: Memory
    rank: Memory
    plan: Plan
    blocks: tuple[str, ...] = ()

    @property
    def slots(self) -> tuple[tuple[int, ...], ...]:
        """The experts of each ep coordinate; -1 is an empty slot."""
        return self.plan.layout.slots(self.spec.num_experts, self.spec.routing.modalities)

    def to_dict(self) -> dict[str, Any]:
        plain = {n: getattr(self, n) for n in ("name", "layers", "family", "experts_only", "block", "dtype", "parameters")}
        said = {
            "experts": words.experts(self.spec),
            "routing": words.routing(self.spec),
            "shared": words.shared(self.spec),
            "activation": words.activation(self.spec.experts.activation, gated=self.spec.experts.gated),
            "factor": words.factor(self.spec),
            "specials": words.specials(self.spec),
            "transforms": words.transforms(self.spec),
        }
        sizes = {"bytes": self.memory.to_dict(), "bytes_per_rank": self.rank.to_dict()}
        whole = {"spec": self.spec.to_dict(), "plan": self.plan.to_dict()}
        return {**plain, "active_parameters": self.active, "words": said, **sizes, **whole}


@dataclass(frozen=True)
class Inspection:
    """A model folder, looked at.

    dtype: of the weights as `load` would hold them; dtype_from: what says so. files: whether the files of weights were looked
    at. layers: as the config counts them. parameters, active: weights of the model, and those at work on one token; size:
    bytes of all. left_alone: what looks like an MoE block and would stay as it is, with the reason. blocks: the names of all
    that look like one, in order.
    """

    path: str
    model_type: str
    architecture: str
    dtype: str
    dtype_from: str
    device: str
    layout: Layout
    files: bool
    layers: int | None
    parameters: int
    active: int
    size: int
    stacks: list[Stack] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)

    @property
    def moe(self) -> int:
        """Bytes of all MoE layers that moerunner would run."""
        return sum(kind.layers * kind.memory.total for kind in self.kinds)

    @property
    def moe_rank(self) -> int:
        """Bytes of them on one rank."""
        return sum(kind.layers * kind.rank.total for kind in self.kinds)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        names = ("path", "model_type", "architecture", "dtype", "dtype_from", "device", "files", "layers")
        return {
            **{name: getattr(self, name) for name in names},
            "parameters": self.parameters,
            "active_parameters": self.active,
            "layout": dataclasses.asdict(self.layout) | {"world": self.layout.world},
            "bytes": {"model": self.size, "moe": self.moe, "moe_per_rank": self.moe_rank, "rest": self.size - self.moe},
            "stacks": [dataclasses.asdict(stack) for stack in self.stacks],
            "kinds": [kind.to_dict() for kind in self.kinds],
            "left_alone": [{"name": name, "reason": reason} for name, reason in self.left_alone.items()],
            "notes": self.notes,
        }


def inspect(
    path: str | Path, *, layout: Layout | None = None, dtype: torch.dtype | None = None, device: str = "cpu"
) -> Inspection:
    """Looks at a checkpoint folder. Weights may be absent, or quantised: then sizes are those that the config asks for.

    Args:
        path: a folder in the format of `save_pretrained`.
        layout: what the memory of a rank is said for; None: one rank.
        dtype: of the weights; None: the checkpoint's. device: a device, whose kernels are chosen from.

    Raises:
        CheckpointError, SpecError: as `load` does. UnsupportedError: Transformers does not know the model.
    """
    path, layout = Path(path), layout or Layout()
    recipe = read_recipe(path, quantised=True)
    there = (path / ONE_FILE).exists() or (path / INDEX).exists()
    found = blueprint(path, dtype, config_only=bool(recipe.quantised) or not there)
    kept = _name(found.dtype)
    notes = []
    if recipe.quantised:
        notes.append(
            f"the weights are quantised ({recipe.quantised}) and cannot be loaded yet; sizes are those of plain {kept}"
        )
    elif not there:
        notes.append(f"no weights were looked at, sizes are what the config asks for in {kept}: {no_weights(path).what}")
    model = _held(found).eval()
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}.values()
    kinds, left_alone, indices = _kinds(model, layout, device)
    parameters = sum(t.numel() for t in tensors if t.is_floating_point())
    if left_alone:
        notes.append("weights of blocks that are left alone count as at work on every token")
    if any(kind.experts_only for kind in kinds):
        notes.append(
            f"the family {model.config.model_type} is not known: its experts run, with the model's own router around them"
        )
    return Inspection(
        path=str(path),
        model_type=recipe.config.model_type,
        architecture=type(model).__name__,
        dtype=kept,
        dtype_from=_dtype_from(dtype, found),
        device=device,
        layout=layout,
        files=bool(found.stored),
        layers=getattr(recipe.config.get_text_config(), "num_hidden_layers", None),
        parameters=parameters,
        active=parameters - sum(kind.layers * (kind.parameters - kind.active) for kind in kinds),
        size=sum(t.nbytes for t in tensors),
        stacks=[Stack(name, _length(model, name), sorted(moe)) for name, moe in indices.items()],
        kinds=kinds,
        left_alone=left_alone,
        notes=notes,
        blocks=[site.name for site in sites(model)],
    )


def _held(found: Blueprint) -> Any:
    """The model without data, its tensors in the dtypes that `load` holds them in."""
    for name, dtype in found.held_as.items():
        tensor = found.model.get_parameter_or_buffer(name)
        if tensor.dtype != dtype:
            path, _, attribute = name.rpartition(".")
            changed = tensor.to(dtype)
            kept = nn.Parameter(changed, requires_grad=False) if isinstance(tensor, nn.Parameter) else changed
            setattr(found.model.get_submodule(path), attribute, kept)
    return found.model


def _dtype_from(asked: torch.dtype | None, found: Blueprint) -> str:
    if asked is not None:
        return "asked for"
    if found.recipe.dtype is not None:
        return "by the config"
    return "by the files" if found.stored else "named nowhere"


def _kinds(model: nn.Module, layout: Layout, device: str) -> tuple[list[Kind], dict[str, str], dict[str, set[int]]]:
    """The kinds of MoE layers, the blocks that are left alone with the reasons, and the MoE layers of each stack."""
    alike: dict[Any, tuple[Kind, list[str]]] = {}
    reasons: dict[str, list[str]] = {}
    indices: dict[str, set[int]] = {}
    for site in sites(model):
        try:
            kind, key = _kind(site, layout, device)
        except (UnsupportedError, PlanError, WeightsError) as reason:  # what `patch` leaves a block alone for
            reasons.setdefault(str(reason), []).append(site.name)
        else:
            alike.setdefault(key, (kind, []))[1].append(site.name)
        stack, index, _ = _split(site.name)
        if index is not None:
            indices.setdefault(stack, set()).add(index)
    kinds = [
        dataclasses.replace(kind, name=name, layers=count, blocks=tuple(names))
        for kind, names in alike.values()
        for name, count in together(names).items()  # one name: they are of one stack
    ]
    return kinds, {name: reason for reason, names in reasons.items() for name in together(names)}, indices


def _kind(site: Site, layout: Layout, device: str) -> tuple[Kind, Any]:
    """The layer at a site, and what two layers have in common if they are of one kind."""
    source = source_of(site)
    weights, spec, owner = source(), source.spec, forward_owner(type(site.block))
    slots = SlotMap(layout, spec.num_experts, spec.routing.modalities, spec.zero_experts)
    # Every rank holds equally much; a part is cut without any rank being asked.
    part = local_part(weights, spec, SimulatedComm(layout, 0, [], threading.Barrier(1)), slots)
    plan = resolve(spec, layout, part.meta(), device, Options(grad=False))
    parameters = sum(t.numel() for t in _named(weights).values() if t.is_floating_point())
    kind = Kind(
        name=site.name,
        layers=1,
        family=source.family.name,
        experts_only=isinstance(source.family, ExpertsOnly),
        block=f"{owner.__module__}.{owner.__qualname__}",
        spec=spec,
        dtype=_name(weights.experts[0].w2.dtype),
        parameters=parameters,
        active=parameters - _idle(weights, spec),
        memory=_memory(weights),
        rank=_memory(part),
        plan=plan,
    )
    stack, _, rest = _split(site.name)
    return kind, (stack, rest, kind.block, spec, tuple(sorted(weights.meta().items())))


def _idle(weights: LayerWeights, spec: MoESpec) -> int:
    """Weights of the experts that a token does not go to; where it goes to one of several sets, the largest counts."""
    sets = [sum(e.tensor.numel() for e in one.tensors.values() if e.expert_dim is not None) for one in weights.experts]
    count = weights.experts[0].num_experts
    return sum(sets) - max(sets) // count * min(spec.top_k, count)


def _memory(weights: LayerWeights) -> Memory:
    size: Counter[str] = Counter()
    for name, tensor in _named(weights).items():
        part = "shared" if name.startswith("shared_") else "router" if name.startswith(_ROUTER) else "transforms"
        size["routed" if name.startswith("experts.") else part] += tensor.nbytes
    return Memory(**size)


def _named(weights: LayerWeights) -> dict[str, Tensor]:
    experts = {f"experts.{i}.{n}": e.tensor for i, one in enumerate(weights.experts) for n, e in one.tensors.items()}
    return {**experts, **weights.tensors}


def _split(name: str) -> tuple[str, int | None, str]:
    """A block's name as the stack of layers, the index in it (None without one), and what follows.

    The stack is the outermost one: some models keep the parts of a layer in a list too.
    """
    parts = name.split(".")
    at = min((i for i, part in enumerate(parts) if part.isdigit()), default=None)
    if at is None:
        return "", None, name
    return ".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :])


def _length(model: nn.Module, stack: str) -> int:
    return len(list(model.get_submodule(stack).children()))


def together(names: Iterable[str]) -> Mapping[str, int]:
    """Names that differ in their index, as one name with the ranges in its place, and how many each stands for."""
    found: dict[tuple[str, str], list[int | None]] = {}
    for name in names:
        stack, index, rest = _split(name)
        found.setdefault((stack, rest), []).append(index)
    joined = {}
    for (stack, rest), indices in found.items():
        shown = ranges([index for index in indices if index is not None])
        joined[".".join(part for part in (stack, shown, rest) if part)] = len(indices)
    return joined


def ranges(numbers: Sequence[int]) -> str:
    """Numbers in ascending order, runs of them joined: 0,3-60 or 1-31/2 for every second one."""
    shown, at = [], 0
    while at < len(numbers):
        step = numbers[at + 1] - numbers[at] if at + 1 < len(numbers) else 1
        end = at
        while end + 1 < len(numbers) and numbers[end + 1] - numbers[end] == step:
            end += 1
        if end - at < 2 and step > 1:  # two numbers make no pattern
            end = at
        first, last = numbers[at], numbers[end]
        shown.append(str(first) if first == last else f"{first}-{last}" + (f"/{step}" if step > 1 else ""))
        at = end + 1
    return ",".join(shown)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bytes_in_words(count: int) -> str:
    """1536 is 1.5 KiB."""
    power = min(4, max(0, int(math.log2(count)) // 10)) if count else 0
    return f"{count / 2 ** (10 * power):.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
