"""The language that a model family is described in: which class, which config keys, which tensors, what comes back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moerunner.errors import SpecError, UnsupportedError
from moerunner.spec import ActivationSpec, GroupSpec, MoESpec
from moerunner.values import GateUp

CHANGES_THE_LAYER = re.compile(r"expert|rout|moe|top_?k|group|scal|limit", re.IGNORECASE)

# Keys that any family may have and that say nothing about what the layer computes.
UNIVERSAL = {
    "experts_implementation": "names the code that runs the experts",
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
    """

    def __init__(self, config: Any, layer: int | None = None) -> None:
        self._config, self.layer = config, layer
        self._seen: set[str] = set()

    def __call__(self, name: str) -> Any:
        value: Any = self._config
        for part in name.split("."):
            value = value.get(part, self) if isinstance(value, dict) else getattr(value, part, self)
            if value is self:
                raise MissingKey(f"has no key {name!r}", where=type(self._config).__name__)
        self._seen.add(name)
        return value

    def unread(self, ignored: Mapping[str, str]) -> list[str]:
        """Keys that look as if they change the layer and were neither read nor ignored. A nested config counts once read."""
        alias = getattr(self._config, "attribute_map", {})
        known = {alias.get(n, n) for n in self._seen | set(ignored) | set(UNIVERSAL)}
        nested = {n.split(".")[0] for n in self._seen if "." in n}
        data = self._config.to_dict()
        names = [*data, *(f"{outer}.{inner}" for outer in nested for inner in data[outer])]
        return sorted(n for n in names if CHANGES_THE_LAYER.search(n.rsplit(".")[-1]) and alias.get(n, n) not in known)


Change = Literal["", "transposed", "reshaped"]


@dataclass(frozen=True)
class View:
    """A tensor of the block that is stored otherwise than `MoESpec.weight_shapes` has it; seen without a copy.

    `transposed`: the last two dimensions are swapped. `reshaped`: same numbers in the same order, another shape.
    """

    path: str
    change: Change


def as_view(source: str | View) -> View:
    """A plain path is a tensor that is stored in the canonical shape."""
    return View(source, "") if isinstance(source, str) else source


@dataclass(frozen=True)
class Router:
    """The block's own router module: `path` on the block, and the place of its results in what it returns.

    flat: it is called with [tokens, hidden]; otherwise with the block's input as it is. The module is called when someone
    listens to it or `returns` needs it; a spec with score="external" takes weights and ids from it always.
    """

    path: str = "gate"
    logits: int = 0
    weights: int = 1
    ids: int = 2
    flat: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family: everything that is needed to run its MoE block, as data.

    name: the family, as Transformers' `model_type`; aliases: other model types with the same block.
    blocks: full names of the block classes, `package.module.Class`. A subclass counts if its `forward` is inherited.
    spec: the layer's `MoESpec` with config keys in place of numbers. It raises `UnsupportedError` for values that the family
        knows and moerunner does not; a key that looks like it matters and is not read is an error unless `ignored` says why.
    weights: canonical names (`MoESpec.weight_shapes`; `shared_gate_proj` and `shared_up_proj` may stand for `shared_w13`) to
        paths on the block. Names that a spec does not need are left out. gate_up: how rows of gate and up lie in w13.
    holds: attributes that the block took from the config when it was built; one that differs now is refused.
    takes: the block's arguments in order, and what each is to `MoERunner.forward`.
    returns: what the block returns: `hidden` alone, or a tuple of it and of places in the router's result.
    training_noise: attribute that holds the strength of noise on the block's input in training; must be 0 there.
    """

    name: str
    blocks: tuple[str, ...]
    spec: Callable[[Keys], MoESpec]
    weights: Mapping[str, str | View]
    aliases: tuple[str, ...] = ()
    gate_up: GateUp = "concat"
    router: Router | None = field(default_factory=Router)
    ignored: Mapping[str, str] = field(default_factory=dict)
    holds: Mapping[str, str] = field(default_factory=dict)
    takes: Mapping[str, str] = field(default_factory=lambda: {"hidden_states": "x"})
    returns: tuple[Literal["hidden"] | int, ...] = ("hidden",)
    training_noise: str = ""

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


def groups(count: int | None, kept: int | None, **how: Any) -> GroupSpec | None:
    """Group-limited choice; None where the config has no groups, or one."""
    if count is None or kept is None or count == 1:
        return None
    return GroupSpec(count=count, kept=kept, **how)


def renormalised(on: bool | None, eps: float = 0.0) -> dict[str, Any]:
    """The fields of `RoutingSpec` for weights that are divided by their sum (+ eps), where the config says so."""
    return {"renormalise": "sum", "eps": eps} if on else {}
