"""The experts alone, for any family: as `experts_implementation="moerunner"`, and for `patch` where no entry has the block.

`moerunner.announce` registers the function when Transformers' own registry of such functions is imported.
"""

from __future__ import annotations

import functools
import sys
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moerunner.errors import SpecError, UnsupportedError
from moerunner.experts import fused_experts
from moerunner.models import reference, registry
from moerunner.models.block import reach
from moerunner.models.entry import Family, Keys, Stored, View, activation, activation_names
from moerunner.spec import ActivationSpec, ExpertsSpec, MoESpec, RoutingSpec
from moerunner.values import GateUp

NAME = "moerunner"
_REGISTRY = "transformers.integrations.moe"


def run_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What an experts module of Transformers runs in place of its `forward`.

    Args:
        self: the module; its flags say how `gate_up_proj` (`up_proj` without a gate) and `down_proj` are stored.
        hidden_states: [T, H]. top_k_index, top_k_weights: [T, K]; an id beyond the local experts belongs to another rank.

    Raises:
        UnsupportedError: the module has a gate or a norm of its own, which would be passed over, or weights that are not
            plain floating tensors.
    """
    module: Any = self
    act, rows = _activation(module)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    w13, w2 = getattr(module, first), module.down_proj
    if not w13.is_floating_point() or w13.itemsize < 2:
        raise UnsupportedError(f"{first} is stored as {w13.dtype}", where=type(module).__name__, next_step=_ELSE)
    if module.is_transposed:
        w13, w2 = w13.mT, w2.mT
    y = fused_experts(
        hidden_states.to(w13.dtype),
        w13,
        w2,
        top_k_weights,
        torch.where(top_k_index < w2.shape[0], top_k_index, -1),
        b13=getattr(module, f"{first}_bias") if module.has_bias else None,
        b2=module.down_proj_bias if module.has_bias else None,
        activation=act.kind,
        limit=act.limit,
        alpha=act.alpha,
        beta=act.beta,
        clamp_after=act.clamp_after,
        gate_up=rows if module.has_gate else "none",
    )
    return y.to(hidden_states.dtype)


_ELSE = "Transformers' own functions run it: another experts_implementation, or none"


def _activation(module: Any) -> tuple[ActivationSpec, GateUp]:
    """What stands between a module's two products, and how rows of gate and up lie."""
    default = sys.modules[_REGISTRY]._default_apply_gate
    kind = type(module)
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedError("norms the experts' output", where=kind.__name__, next_step=_ELSE)
    if module.has_gate and kind._apply_gate is not default:
        if module not in _by_entry:
            _by_entry[module] = _of_entry(module)
        return _by_entry[module]
    if module.has_gate and not module.is_concatenated:
        what = "says that gate and up rows alternate, and gates as if they did not"
        raise UnsupportedError(what, where=kind.__name__, next_step=_ELSE)
    found = _FUNCTIONS.get(module.act_fn) or _by_class().get(type(module.act_fn))
    if found is None:
        what = f"its activation {getattr(module.act_fn, '__name__', type(module.act_fn).__name__)} is not offered"
        raise UnsupportedError(what, where=kind.__name__, next_step=_ELSE)
    return found, "concat"


_by_entry: WeakKeyDictionary[nn.Module, tuple[ActivationSpec, GateUp]] = WeakKeyDictionary()


def _of_entry(module: Any) -> tuple[ActivationSpec, GateUp]:
    """The same of a module with a gate of its own (`_apply_gate`), by the entry of the family whose class it is.

    Raises:
        UnsupportedError: no family was verified with this class, its config is another's, or the gate takes more constants
            than a function has arguments for.
    """
    kind, what = type(module), "has a gate of its own (_apply_gate)"
    family = next((f for f in registry.registered() if reference.knows(f, kind)), None)
    if family is None:
        raise UnsupportedError(f"{what} that no family was verified with", where=kind.__name__, next_step=_ELSE)
    try:
        layers = range(getattr(module.config, "num_hidden_layers", 1))
        act, *others = {family.read(module.config, layer).experts.activation.resolved() for layer in layers}
        keys, inside = Keys(module.config), f"{_home(family)}."
        held = {path.removeprefix(inside): key for path, key in family.holds.items() if path.startswith(inside)}
        now = {name: keys(key) if isinstance(key, str) else key(keys) for name, key in held.items()}
    except (SpecError, UnsupportedError) as error:
        raise UnsupportedError(f"{what}, and its config does not say which: {error}", where=kind.__name__) from error
    if others:
        raise UnsupportedError(f"{what} that differs between layers: moerunner.patch(model) runs it", where=kind.__name__)
    changed = [name for name, value in now.items() if reach(module, name) != value]
    if changed:
        raise UnsupportedError(f"its config no longer says what it was built with: {', '.join(changed)}", where=kind.__name__)
    if act.gate_softcap is not None or act.up_softcap is not None:
        raise UnsupportedError(f"{what} that caps softly: moerunner.patch(model) runs it", where=kind.__name__)
    return act, family.gate_up


def _home(family: Family) -> str:
    """The path of the experts' module in a family's block."""
    stored = family.weights["w13"]
    path = stored if isinstance(stored, str) else stored.path if isinstance(stored, View) else ""
    return path.rpartition(".")[0]


_FUNCTIONS = {F.silu: activation("silu"), F.gelu: activation("gelu"), F.relu: activation("relu")}


@functools.cache
def _by_class() -> dict[type, ActivationSpec]:
    from transformers.activations import ACT2FN

    return {type(ACT2FN[name]): activation(name) for name in activation_names()}


class ExpertsOnly(Family):
    """An entry made of a module itself: its class says how it is stored, and no config is read."""

    def read(self, config: Any, layer: int | None = None) -> MoESpec:
        return self.spec(Keys(config, layer))


def is_experts_module(module: nn.Module) -> bool:
    """Whether a module was made for Transformers' registry of experts functions."""
    return all(flag in module.__dict__ for flag in ("has_gate", "has_bias", "is_transposed", "is_concatenated"))


def as_family(module: nn.Module) -> Family:
    """An entry for an experts module of a family that is not in the table. Raises `UnsupportedError` as `run_experts` does."""
    m: Any = module
    act, rows = _activation(m)
    first = "gate_up_proj" if m.has_gate else "up_proj"
    change = "transposed" if m.is_transposed else ""
    weights: dict[str, Stored] = {"w13": View(first, change), "w2": View("down_proj", change)}
    if m.has_bias:
        weights |= {"b13": f"{first}_bias", "b2": "down_proj_bias"}
    count, hidden, width = m.down_proj.mT.shape if m.is_transposed else m.down_proj.shape
    spec = MoESpec(
        hidden_size=hidden,
        num_experts=count,
        top_k=min(count, getattr(m.config, "num_experts_per_tok", None) or 1),  # for estimates: the choice comes from outside
        routing=RoutingSpec(score="external"),
        experts=ExpertsSpec(intermediate_size=width, activation=act, gated=m.has_gate, bias=m.has_bias),
        apply_routed_scale_to_output=False,
    )
    kind = type(m)
    return ExpertsOnly(
        name=f"{m.config.model_type} (experts only)",
        blocks=(f"{kind.__module__}.{kind.__qualname__}",),
        spec=lambda _: spec,
        weights=weights,
        gate_up=rows,
        router=None,
        takes={"hidden_states": "x", "top_k_index": "ids", "top_k_weights": "weights"},
    )


def register() -> None:
    """Adds the function to Transformers' registry now."""
    sys.modules[_REGISTRY].ALL_EXPERTS_FUNCTIONS.register(NAME, run_experts)
