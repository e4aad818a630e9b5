"""What stands in for a block's `forward`: reads the block's own tensors at each call, and steps aside when it must."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moerunner.errors import UnsupportedError
from moerunner.models.entry import Change, Family
from moerunner.plan import Options
from moerunner.runner import MoERunner
from moerunner.spec import MoESpec
from moerunner.values import ExpertWeights, LayerWeights, TopK

_RECORDERS = "transformers.utils.output_capturing"  # its hooks read and never change what they see
_EXPERT_NAMES = ("w13", "w2", "b13", "b2", "row_norm")
PLAIN = (Tensor, nn.Parameter)


class Changed(Exception):
    """The block is no longer what the runner was made for; the message says how. Its own forward is right then."""


@dataclass(frozen=True)
class Held:
    """A tensor of a module: its canonical name, its attribute, how it is stored otherwise than in `shape`."""

    name: str
    attribute: str
    change: Change
    shape: tuple[int, ...]

    def read(self, module: nn.Module) -> Tensor:
        """The tensor as it is now, in the spec's shape. Raises `Changed` if it is no plain tensor any more."""
        tensor = getattr(module, self.attribute)
        if type(tensor) not in PLAIN:
            raise Changed(f"{self.attribute} is now a {type(tensor).__name__}")
        if self.change == "transposed":
            return tensor.mT
        return tensor.view(self.shape) if self.change == "reshaped" else tensor


@dataclass(frozen=True)
class Part:
    """The block (empty path) or a module inside it, which the runner reads tensors from instead of calling it.

    kind: its class when the block was patched. router: it is the router or inside it.
    """

    path: str
    kind: type
    router: bool
    held: tuple[Held, ...]

    def find(self, block: nn.Module) -> nn.Module:
        """The module as it is now; straight from the tables of children, since this runs at every forward."""
        found: nn.Module | None = block
        for name in self.path.split(".") if self.path else ():
            found = found._modules.get(name)
            if found is None:
                raise Changed(f"{self.path} is gone")
        return found


class Source:
    """The block's tensors as `LayerWeights`, read anew at each call, so that whatever happens to them is seen.

    The block is held weakly, so that a patched model is freed like any other, without waiting for the garbage collector.
    parts: every module of the block. built: its attributes that the spec speaks of, by path, with their values.
    """

    def __init__(
        self, block: nn.Module, parts: tuple[Part, ...], built: Mapping[str, Any], family: Family, spec: MoESpec
    ) -> None:
        self._block = weakref.ref(block)
        self.parts, self.built, self.family, self.spec = parts, built, family, spec

    @property
    def block(self) -> nn.Module:
        block = self._block()
        if block is None:
            raise ReferenceError("the patched block no longer exists")
        return block

    def __call__(self) -> LayerWeights:
        """Raises `Changed` where a tensor or a module is not what it was."""
        found = {held.name: held.read(module) for part, module in self.modules() for held in part.held}
        gate_up = self.family.gate_up if self.spec.experts.gated else "none"
        many = self.spec.routing.modalities > 1
        sets = []
        for index in range(self.spec.routing.modalities):
            suffix = f".{index}" if many else ""
            sets.append(ExpertWeights.of({n: found.pop(n + suffix, None) for n in _EXPERT_NAMES}, gate_up))
        return LayerWeights(tuple(sets), found)

    def modules(self) -> Iterator[tuple[Part, nn.Module]]:
        """The modules as they are now.

        Raises `Changed` for another class or built-in value than before, and for hooks or a replaced forward, which the
        runner would pass over; those of the router are seen to where it is called.
        """
        block = self.block
        for path, value in self.built.items():
            if reach(block, path) != value:
                raise Changed(f"{path} is now {reach(block, path)!r}")
        for part in self.parts:
            module = part.find(block)
            if part.path:  # the block itself is called as always
                if type(module) is not part.kind:
                    raise Changed(f"{part.path} is now a {type(module).__name__}")
                if not part.router and listens(module):
                    raise Changed(f"{part.path} has hooks, which the runner would pass over")
            yield part, module

    def router_is_watched(self, *, recorders: bool = True) -> bool:
        """Whether calling the router does more than its class's forward; see `listens`."""
        return any(listens(part.find(self.block), recorders=recorders) for part in self.parts if part.router)

    def of(self, block: nn.Module) -> Source:
        """The same for a copy of the block."""
        return Source(block, self.parts, self.built, self.family, self.spec)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.block, self.parts, self.built, self.family, self.spec)


def listens(module: nn.Module, *, recorders: bool = True) -> bool:
    """Whether calling the module does more than run its class's forward: hooks, or a forward of the instance.

    recorders=False leaves out the hooks with which Transformers records outputs; they change nothing. Hooks that only keep
    a module on its device (accelerate, without offload) do not count: its tensors are where the tokens are.
    """
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    if any(recorders or getattr(hook, "__module__", "") != _RECORDERS for hook in module._forward_hooks.values()):
        return True
    return "forward" in module.__dict__ and not placed_by_accelerate(module)


def placed_by_accelerate(module: nn.Module) -> bool:
    """Whether the instance's forward is accelerate's, and only moves inputs to the module's device."""
    return getattr(getattr(module, "_hf_hook", None), "offload", True) is False and hasattr(module, "_old_forward")


class PatchedForward:
    """Callable in place of one block's `forward`, with its arguments and its result.

    A copy of the block, by `copy.deepcopy` or pickle, gets one of its own that reads the copy's tensors.
    """

    def __init__(self, source: Source, options: Options) -> None:
        self.source, self.options = source, options
        self._told = False

    @cached_property
    def runner(self) -> MoERunner:
        """Made on first use: while a block is copied or unpickled, its tensors are not there yet."""
        return MoERunner(self.source.spec, self.source, options=self.options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block, family = self.source.block, self.source.family
        if family.training_noise and block.training and getattr(block, family.training_noise):
            raise UnsupportedError(
                f"adds noise to its input in training ({family.training_noise}), which the runner does not",
                where=type(block).__name__,
                next_step="Set it to 0, call model.eval(), or moerunner.unpatch(model)",
            )
        try:
            given = self._arguments(args, kwargs)
            answer, chosen = self._ask_router(block, given["x"])
            hidden = self.runner(**given, **chosen)
        except Changed as change:
            self._tell(change)
            return type(block).forward(block, *args, **kwargs)
        if family.returns == ("hidden",):
            return hidden
        return tuple(hidden if place == "hidden" else answer[place] for place in family.returns)

    def _arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        takes = self.source.family.takes
        given = dict(zip(takes.values(), args, strict=False))
        for name, value in kwargs.items():
            if name in takes:
                given[takes[name]] = value
            elif value is not None:
                raise Changed(f"it is called with {name!r}, which the family's entry does not know")
        if len(args) > len(takes):
            raise Changed(f"it is called with {len(args)} arguments, the family's entry knows {len(takes)}")
        return given

    def _ask_router(self, block: nn.Module, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The router module's own answer, and what of it the runner takes: nothing if nobody needs the call.

        Recorders want to see the logits: the runner routes by them. Any other hook, or a replaced forward, may have
        changed the choice: then weights and ids are taken as they come.
        """
        family, spec = self.source.family, self.source.spec
        router = family.router
        if router is None:
            return (), {}
        external = spec.routing.score == "external"
        if not (external or family.returns != ("hidden",) or self.source.router_is_watched()):
            return (), {}
        list(self.source.modules())  # what raises must raise before the call: a router must not be called twice
        answer = block.get_submodule(router.path)(x.reshape(-1, x.shape[-1]) if router.flat else x)
        if external or self.source.router_is_watched(recorders=False):
            weights, ids = answer[router.weights], answer[router.ids]
            scaled = not spec.apply_routed_scale_to_output
            return answer, {"topk": TopK(ids.to(torch.int64), weights.float(), scaled=scaled)}
        return answer, {"router_logits": answer[router.logits]}

    def _tell(self, change: Changed) -> None:
        if not self._told:
            self._told = True
            name = type(self.source.block).__name__
            warnings.warn(f"a patched {name} runs its own forward: {change}", stacklevel=3)

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchedForward:
        return PatchedForward(self.source.of(copy.deepcopy(self.source.block, memo)), self.options)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source, self.options)


def reach(start: Any, path: str) -> Any:
    """The attribute at a dotted path, None where there is none."""
    for name in path.split("."):
        start = getattr(start, name, None)
    return start


def slot_of(block: nn.Module) -> str:
    """Where a block's forward is replaced: inside accelerate's wrapper, where there is one."""
    return "_old_forward" if placed_by_accelerate(block) else "forward"


def forward_of(block: nn.Module) -> PatchedForward | None:
    """What stands in for the block's forward, if the block is patched."""
    found = block.__dict__.get(slot_of(block))
    return found if isinstance(found, PatchedForward) else None
