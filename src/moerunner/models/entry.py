"""The language that a model family is described in: which class, which config keys, which tensors, what comes back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from moerunner.errors import SpecError, UnsupportedError
from moerunner.spec import ActivationSpec, GroupSpec, MoESpec
from moerunner.values import GateUp

CHANGES_THE_LAYER = re.compile(r"expert|rout|moe|top_?k|group|scal|limit", re.IGNORECASE)

# Keys that any family may have and that say nothing about what the layer computes.
UNIVERSAL = {
    "experts_implementation": "names the code that runs the experts",
    "index_skip_topk_offset": "attention",
    "index_topk": "attention",
    "index_topk_freq": "attention",
    "index_topk_pattern": "attention",
    "output_router_logits": "what the model returns beside its result",
    "quantization_config": "seen in the weights themselves",
    "rope_parameters": "positions",
    "rope_scaling": "positions",
    "router_aux_loss_coef": "training loss",
    "top_k": "sampling",
}

_ACTIVATIONS = {
    "silu": ActivationSpec(kind="silu"),
    "swish": ActivationSpec(kind="silu"),
    "gelu": ActivationSpec(kind="gelu"),
    "gelu_python": ActivationSpec(kind="gelu"),
    "gelu_new": ActivationSpec(kind="gelu_tanh"),
    "gelu_pytorch_tanh": ActivationSpec(kind="gelu_tanh"),
    "gelu_python_tanh": ActivationSpec(kind="gelu_tanh"),
    "quick_gelu": ActivationSpec(kind="silu", alpha=1.702),
    "relu": ActivationSpec(kind="relu"),
    "relu2": ActivationSpec(kind="relu2"),
}


class MissingKey(SpecError):
    """A config does not have a key that the entry reads: it is the config of something else."""


class Keys:
    """A config that is read key by key and remembers what was read.

    `keys("n_routed_experts")` is the value; the config's own aliases (`attribute_map`) work, and a dot goes into a nested
    config, `keys("ffn_config.moe_top_k")`. layer: the block's index in its stack, for values that are lists per layer.
    `keys("swiglu_limit", 7.0)`: an older Transformers has no such key, and this number in its code.
    """

    def __init__(self, config: Any, layer: int | None = None) -> None:
        if layer is not None and getattr(config, "is_heterogeneous", False):
            config = config.per_layer_config[layer]
        self._config, self.layer = config, layer
        self._seen: set[str] = set()

    def __call__(self, name: str, *older: Any) -> Any:
        value: Any = self._config
        for part in name.split("."):
            value = value.get(part, self) if isinstance(value, dict) else getattr(value, part, self)
            if value is self and older:
                return older[0]
            if value is self:
                raise MissingKey(f"has no key {name!r}", where=type(self._config).__name__)
        self._seen.add(name)
        return value

    def here(self, name: str) -> Any:
        """This layer's value of a key that may have one for each layer."""
        values = self(name)
        if not isinstance(values, (list, tuple)):
            return values
        if self.layer is not None:
            return values[self.layer]
        if len(set(values)) > 1:
            raise UnsupportedError(f"{name} differs between layers, and which one this is cannot be seen from its place")
        return values[0]

    def unread(self, ignored: Mapping[str, str]) -> list[str]:
        """Keys that look as if they change the layer and were neither read nor ignored. A nested config counts once read."""
        alias = getattr(self._config, "attribute_map", {})
        known = {alias.get(n, n) for n in self._seen | set(ignored) | set(UNIVERSAL)}
        nested = {n.split(".")[0] for n in self._seen if "." in n}
        data = self._config.to_dict()
        names = [*data, *(f"{outer}.{inner}" for outer in nested for inner in data[outer])]
        return sorted(n for n in names if CHANGES_THE_LAYER.search(n.rsplit(".")[-1]) and alias.get(n, n) not in known)


Change = Literal["", "transposed", "reshaped", "reshaped transposed", "leading"]


@dataclass(frozen=True)
class View:
    """A tensor of the block that is stored otherwise than `MoESpec.weight_shapes` has it; seen without a copy.

    `transposed`: the last two dimensions are swapped. `reshaped`: same numbers in the same order, another shape.
    `reshaped transposed`: the layer's tensor is the transposed of the reshaped. `leading`: only the first rows are the layer's.
    """

    path: str
    change: Change = ""


@dataclass(frozen=True)
class Joined:
    """Several tensors of the block that are one for the layer: put together along `dim` at each call, which is a copy.

    For small tensors, and for blocks that keep every expert in a module of its own: in a single part, `{}` stands for the
    number of the expert, and the tensors are stacked.
    """

    parts: tuple[str | View, ...]
    dim: int = 0

    def join(self, pieces: list[Tensor]) -> Tensor:
        """The layer's tensor, from the block's in order."""
        return torch.stack(pieces) if len(self.parts) == 1 else torch.cat(pieces, self.dim)


Stored = str | View | Joined


def pieces(stored: Stored, shape: tuple[int, ...]) -> list[tuple[View, tuple[int, ...]]]:
    """The tensors of a block that make up one of the layer's with this shape, each with the shape it is to be seen in."""
    if not isinstance(stored, Joined):
        return [(View(stored) if isinstance(stored, str) else stored, shape)]
    parts = [View(part) if isinstance(part, str) else part for part in stored.parts]
    if len(parts) == 1:
        return [(dataclasses.replace(parts[0], path=parts[0].path.format(e)), shape[1:]) for e in range(shape[0])]
    part = (*shape[: stored.dim], shape[stored.dim] // len(parts), *shape[stored.dim + 1 :])
    return [(view, part) for view in parts]


@dataclass(frozen=True)
class Router:
    """The block's own router module: `path` on the block, and the place of its results in what it returns.

    flat: it is called with [tokens, hidden]; otherwise with the block's input as it is. takes: its arguments: a name that
        `Family.takes` gives to an argument of the block, or `.path` for an attribute of the block. `input_ids` are passed
        only where the spec routes by table.
    logits: place of the gate's product, None where it is not there as it was; an answer that is a tensor is that product.
    weights, ids: places of the choice. choice: for a router that answers in another form: from its answer and k to weights and
        ids, [T, k], and to the weights of shared experts that the router weighs; an id of -1 is no expert. A name: the block's
        method that makes weights and ids of the answer.
    The module is called when someone listens to it or `returns` needs it; a spec with score="external" takes weights and ids
    from it always.
    """

    path: str = "gate"
    logits: int | None = 0
    weights: int = 1
    ids: int = 2
    flat: bool = False
    takes: tuple[str, ...] = ("x",)
    choice: Callable[[Any, int], tuple[Tensor, ...]] | str | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family: everything that is needed to run its MoE block, as data.

    name: the family, as Transformers' `model_type`; aliases: other model types with the same block.
    blocks: full names of the block classes, `package.module.Class`. A subclass counts if its `forward` is inherited.
    spec: the layer's `MoESpec` with config keys in place of numbers. It raises `UnsupportedError` for values that the family
        knows and moerunner does not; a key that looks like it matters and is not read is an error unless `ignored` says why.
    weights: canonical names (`MoESpec.weight_shapes`; `shared_gate_proj` and `shared_up_proj` may stand for `shared_w13`, and
        with `_bias` behind them for `shared_b13`) to paths on the block. Names that a spec does not need are left out.
    gate_up: how rows of gate and up lie in w13.
    holds: attributes that the block took from the config when it was built, by path, with the config's key or a function that
        reads it; one that differs now is refused.
    takes: the block's arguments in order, and what each is to `MoERunner.forward`, or to `Router.takes`. `weights` and `ids`
        are a choice that the caller has made, for blocks that are nothing but the experts.
    returns: what the block returns: `hidden` alone, or a tuple of it (`flat`: as [tokens, hidden]), of places in the router's
        result, and of `logits`, the gate's product (of the token's own set, where there are several).
    training: what the block does in training mode and the runner does not, by the attribute that says how strongly (0 and None:
        not at all; "" always). Such a block is refused in training mode.
    older: fields that differ where the block's class is that of an older Transformers, by its `reference.fingerprint`.
    """

    name: str
    blocks: tuple[str, ...]
    spec: Callable[[Keys], MoESpec]
    weights: Mapping[str, Stored]
    aliases: tuple[str, ...] = ()
    gate_up: GateUp = "concat"
    router: Router | None = field(default_factory=Router)
    ignored: Mapping[str, str] = field(default_factory=dict)
    holds: Mapping[str, str | Callable[[Keys], Any]] = field(default_factory=dict)
    takes: Mapping[str, str] = field(default_factory=lambda: {"hidden_states": "x"})
    returns: tuple[Literal["hidden", "flat", "logits"] | int, ...] = ("hidden",)
    training: Mapping[str, str] = field(default_factory=dict)
    older: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def like(self, name: str, *blocks: str, package: str = "", **changes: Any) -> Family:
        """The entry of a family whose blocks are the same but for what `changes` says; blocks as in `hf`."""
        changes = {"aliases": (), **changes}
        return dataclasses.replace(self, name=name, blocks=hf(package or name, *blocks), **changes)

    def read(self, config: Any, layer: int | None = None) -> MoESpec:
        """The spec of one layer.

        Raises:
            MissingKey: the config lacks a key. UnsupportedError: a value is not offered. SpecError: a value is impossible,
            or a key that looks like it changes the layer is not known to the entry.
        """
        keys = Keys(config, layer)
        spec = self.spec(keys)
        unknown = keys.unread(self.ignored)
        if unknown:
            raise SpecError(
                f"the keys {', '.join(unknown)} may change what the layer computes, and the family {self.name!r} does not "
                "know them",
                where=type(config).__name__,
                next_step="Let the family's entry read them, or list them in its `ignored` with the reason",
            )
        return spec


def hf(package: str, *classes: str) -> tuple[str, ...]:
    """Full names of block classes in Transformers' own modelling file of a package."""
    return tuple(f"transformers.models.{package}.modeling_{package}.{name}" for name in classes)


def activation(name: str) -> ActivationSpec:
    """An activation by the name that Transformers' configs use."""
    if name not in _ACTIVATIONS:
        raise UnsupportedError(f"the activation {name!r} is not offered", next_step=f"Known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def activation_names() -> tuple[str, ...]:
    """The names that `activation` knows."""
    return tuple(_ACTIVATIONS)


def groups(
    count: int | None, kept: int | None, *, experts: int, top_k: int, weighs_lost: bool = True, **how: Any
) -> GroupSpec | None:
    """Group-limited choice; None where the config has no groups, or one, or where every expert is chosen whatever its group.

    weighs_lost: an expert of a group that lost would have its own weight, if it were chosen, and not 0.

    Raises:
        UnsupportedError: the kept groups hold fewer experts than are chosen. Transformers fills up with experts of groups that
        lost, which all have the same key, in an order that nothing defines.
    """
    if count is None or kept is None or count == 1:
        return None
    found = GroupSpec(count=count, kept=kept, **how)
    possible = isinstance(experts, int) and isinstance(top_k, int) and top_k <= experts  # if not, MoESpec says so
    if possible and kept * experts < top_k * count:
        if top_k == experts and weighs_lost:
            return None
        raise UnsupportedError(
            f"{kept} of {count} groups of {experts} experts are kept, which hold fewer than the {top_k} chosen"
        )
    return found


def renormalised(on: bool | None, eps: float = 0.0) -> dict[str, Any]:
    """The fields of `RoutingSpec` for weights that are divided by their sum (+ eps), where the config says so."""
    return {"renormalise": "sum", "eps": eps} if on else {}
