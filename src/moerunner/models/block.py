"""What stands in for a block's `forward`: reads the block's own tensors at each call, and steps aside when it must."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moerunner.errors import Changed, UnsupportedError
from moerunner.models.dtensors import Placed, hooked_by_plan, local
from moerunner.models.entry import Change, Family, Joined
from moerunner.models.places import Cut
from moerunner.ops.precision import wide
from moerunner.ops.route import gate_logits
from moerunner.parallel.layout import BoundLayout
from moerunner.plan import Options
from moerunner.runner import MoERunner
from moerunner.spec import MoESpec
from moerunner.values import EXPERT_NAMES, ExpertWeights, GateUp, LayerWeights, TopK

_RECORDERS = "transformers.utils.output_capturing"  # its hooks read and never change what they see
PLAIN = (Tensor, nn.Parameter)


@dataclass(frozen=True)
class Held:
    """A tensor of a module: its canonical name, its attribute, how it is stored otherwise than in `shape`.

    index: its place among the tensors that `entry.Joined` puts together. cut: the part that this rank keeps of the stored
    tensor, where it does not keep all; `shape` is that of the part. placed: how Transformers spread the tensor over ranks;
    `shape` is that of the whole, and this rank's part is read.
    """

    name: str
    attribute: str
    change: Change
    shape: tuple[int, ...]
    index: int = 0
    cut: Cut | None = None
    placed: Placed | None = None

    def planned(self, module: nn.Module) -> Tensor:
        """The tensor, without data, as it will be once it is cut."""
        tensor = getattr(module, self.attribute)
        shape = tensor.shape if self.cut is None else self.cut.local
        return self.see(torch.empty(shape, dtype=tensor.dtype, device="meta"))

    def read(self, module: nn.Module) -> Tensor:
        """The tensor as it is now, in the spec's shape. Raises `Changed` if it is of another kind than it was."""
        tensor = getattr(module, self.attribute)
        if self.placed is not None:
            if Placed.of(tensor) != self.placed:
                raise Changed(f"{self.attribute} is no longer spread over ranks as it was")
            tensor = local(tensor)
        if type(tensor) not in PLAIN:
            raise Changed(f"{self.attribute} is now a {type(tensor).__name__}")
        return self.see(tensor)

    def write(self, module: nn.Module, seen: Tensor) -> None:
        """Puts this rank's part, in the spec's shape, into the module's tensor, which stays the object that it is."""
        assert self.cut is not None, "a tensor that this rank has a part of"
        tensor = getattr(module, self.attribute)
        seen = seen.mT if self.change.endswith("transposed") else seen
        tensor.data, tensor.grad = seen.reshape(self.cut.local).contiguous(), None

    def see(self, tensor: Tensor) -> Tensor:
        """The tensor in the spec's shape. Raises RuntimeError where that needs a copy or more numbers than there are."""
        if self.change == "transposed":
            return tensor.mT
        if self.change == "reshaped":
            return tensor.view(self.shape)
        if self.change == "reshaped transposed":
            *outer, rows, columns = self.shape
            return tensor.view(*outer, columns, rows).mT
        return tensor.narrow(0, 0, self.shape[0]) if self.change == "leading" else tensor


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
    layout: of several ranks, of which this is one; None: one rank. is_cut: the block's own forward cannot run, as `holds` says.
    """

    holds = "this rank holds a part of its experts"

    def __init__(
        self,
        block: nn.Module,
        parts: tuple[Part, ...],
        built: Mapping[str, Any],
        family: Family,
        spec: MoESpec,
        layout: BoundLayout | None = None,
    ) -> None:
        self._block, self.layout = weakref.ref(block), layout
        self.parts, self.built, self.family, self.spec = parts, built, family, spec
        self.gate_up: GateUp = family.gate_up if spec.experts.gated else "none"
        self.is_cut = any(held.cut is not None for part in parts for held in part.held)

    @property
    def block(self) -> nn.Module:
        block = self._block()
        if block is None:
            raise ReferenceError("the patched block no longer exists")
        return block

    def __call__(self) -> LayerWeights:
        """Raises `Changed` where a tensor or a module is not what it was."""
        return self._layer(Held.read)

    def planned(self) -> LayerWeights:
        """The same without data, as it will be once this rank's part is cut."""
        return self._layer(Held.planned)

    def _layer(self, read: Callable[[Held, nn.Module], Tensor]) -> LayerWeights:
        found: dict[str, Tensor | None] = {}
        parts: dict[str, dict[int, Tensor]] = {}
        for part, module in self.modules():
            for held in part.held:
                tensor = read(held, module)
                if isinstance(self.family.weights[held.name], Joined):
                    parts.setdefault(held.name, {})[held.index] = tensor
                else:
                    found[held.name] = tensor
        for name, by_index in parts.items():
            joined = self.family.weights[name]
            assert isinstance(joined, Joined)
            found[name] = joined.join([tensor for _, tensor in sorted(by_index.items())])
        many = self.spec.routing.modalities > 1
        sets = []
        for index in range(self.spec.routing.modalities):
            suffix = f".{index}" if many else ""
            sets.append(ExpertWeights.of({n: found.pop(n + suffix, None) for n in EXPERT_NAMES}, self.gate_up))
        return LayerWeights(tuple(sets), {name: tensor for name, tensor in found.items() if tensor is not None})

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
        return Source(block, self.parts, self.built, self.family, self.spec, self.layout)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.block, self.parts, self.built, self.family, self.spec)


def listens(module: nn.Module, *, recorders: bool = True) -> bool:
    """Whether calling the module does more than run its class's forward: hooks, or a forward of the instance.

    recorders=False leaves out the hooks with which Transformers records outputs; they change nothing. Hooks that only keep
    a module on its device (accelerate, without offload) do not count: its tensors are where the tokens are. Nor do those with
    which Transformers computes with this rank's part of the tensors.
    """
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    if any(recorders or getattr(hook, "__module__", "") != _RECORDERS for hook in module._forward_hooks.values()):
        return True
    return "forward" in module.__dict__ and not (placed_by_accelerate(module) or hooked_by_plan(module))


def placed_by_accelerate(module: nn.Module) -> bool:
    """Whether the instance's forward is accelerate's, and only moves inputs to the module's device."""
    return getattr(getattr(module, "_hf_hook", None), "offload", True) is False and hasattr(module, "_old_forward")


def refuse_training(block: nn.Module, family: Family) -> None:
    """Raises `UnsupportedError` if the block, in training mode, would do what the runner does not."""
    for path, what in family.training.items():
        if not path or reach(block, path):
            raise UnsupportedError(
                f"{what} in training, which the runner does not" + f" ({path} is {reach(block, path)!r})" * bool(path),
                where=type(block).__name__,
                next_step=f"{f'Set {path} to 0, ' if path else ''}call model.eval(), or moerunner.unpatch(model)",
            )


class PatchedForward:
    """Callable in place of one block's `forward`, with its arguments and its result.

    A copy of the block, by `copy.deepcopy` or pickle, gets one of its own that reads the copy's tensors.
    """

    def __init__(self, source: Source, options: Options) -> None:
        self.source, self.options = source, options
        self._told = False

    @property
    def layout(self) -> BoundLayout | None:
        """Of several ranks, of which this is one, as the experts lie now; None: one rank."""
        return self.source.layout

    @cached_property
    def runner(self) -> MoERunner:
        """Made on first use: while a block is copied or unpickled, its tensors are not there yet."""
        return MoERunner(self.source.spec, self.source, self.layout, self.options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block, family = self.source.block, self.source.family
        if block.training:
            refuse_training(block, family)
        try:
            x, answer, chosen = self.inputs(*args, **kwargs)
            hidden = self.runner(x, **chosen)
        except Changed as change:
            if self.source.is_cut:
                what = f"{change}; its own forward cannot run, as {self.source.holds}"
                raise UnsupportedError(what, where=type(block).__name__) from change
            self._tell(change)
            return type(block).forward(block, *args, **kwargs)
        if family.returns == ("hidden",):
            return hidden
        named = {"hidden": hidden, "flat": hidden.flatten(0, -2), "logits": None}
        if "logits" in family.returns:
            named["logits"] = self._own_logits(chosen)
        return tuple(named[place] if isinstance(place, str) else answer[place] for place in family.returns)

    def inputs(self, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """What a call of the block comes to: the tokens, the router's own answer (empty where it is not asked), and the other
        arguments of `MoERunner.forward`."""
        given = self._arguments(args, kwargs)
        return given["x"], *self._ask_router(self.source.block, given)

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

    def _ask_router(self, block: nn.Module, given: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The router module's own answer, and what the runner is given beside the tokens.

        The router is called only if somebody needs it. Recorders want to see the logits: the runner routes by them. Any other
        hook, or a replaced forward, may have changed the choice: then weights and ids are taken as they come.
        """
        family, spec, x = self.source.family, self.source.spec, given["x"]
        router, types, chosen = family.router, spec.routing.modalities, {}
        if spec.routing.choose == "hash":
            chosen["input_ids"] = given.get("input_ids")
        if types > 1:  # a type beyond the last set is one more kind of what that set is for
            asked = given.get("token_types")
            zeros = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
            chosen["token_types"] = zeros if asked is None else asked.to(torch.int64).clamp(0, types - 1)
        if "logits" in family.returns:
            tensors = self.source().tensors
            rows = x.reshape(-1, x.shape[-1])
            chosen["router_logits"] = wide(gate_logits(rows, tensors["gate"], tensors.get("gate_bias"), spec.routing))
        if "ids" in given:
            return (), {"topk": self._choice(given["weights"], given["ids"])}
        if router is None:
            return (), chosen
        external = spec.routing.score == "external"
        calls = external or any(isinstance(place, int) for place in family.returns)
        if not (calls or self.source.router_is_watched()):
            return (), chosen
        list(self.source.modules())  # what raises must raise before the call: a router must not be called twice
        named = {**given, "x": x.reshape(-1, x.shape[-1]) if router.flat else x}
        passed = [name for name in router.takes if name != "input_ids" or spec.routing.choose == "hash"]
        answer: Any = block.get_submodule(router.path)(*(reach(block, n[1:]) if n[0] == "." else named.get(n) for n in passed))
        if external or self.source.router_is_watched(recorders=False):
            return answer, {"topk": self.chosen_by(answer)}
        if router.logits is not None:
            chosen["router_logits"] = answer[router.logits] if isinstance(answer, tuple) else answer
        return answer, chosen

    def chosen_by(self, answer: Any) -> TopK:
        """The choice in what the block's own router returned."""
        router = self.source.family.router
        assert router is not None, "a block without a router is handed its choice"
        if isinstance(router.choice, str):
            return self._choice(*getattr(self.source.block, router.choice)(answer))
        if router.choice is not None:
            return self._choice(*router.choice(answer, self.source.spec.top_k))
        return self._choice(answer[router.weights], answer[router.ids])

    def _choice(self, weights: Tensor, ids: Tensor, shared: Tensor | None = None) -> TopK:
        """A choice made elsewhere. An id beyond the experts is how Transformers marks one that another rank holds."""
        spec = self.source.spec
        ids = torch.where(ids < spec.num_experts + spec.zero_experts, ids, -1).to(torch.int64)
        scaled = not spec.apply_routed_scale_to_output
        return TopK(ids, wide(weights), scaled=scaled, shared_weights=None if shared is None else wide(shared))

    def _own_logits(self, chosen: Mapping[str, Any]) -> Tensor:
        """[T, E] of the experts that each token may choose from."""
        logits, sets = chosen["router_logits"], self.source.spec.routing.modalities
        if sets == 1:
            return logits
        rows = torch.arange(logits.shape[0], device=logits.device)
        return logits.unflatten(1, (sets, -1))[rows, chosen["token_types"].reshape(-1)]

    def _tell(self, change: Changed) -> None:
        if not self._told:
            self._told = True
            name = type(self.source.block).__name__
            warnings.warn(f"a patched {name} runs its own forward: {change}", stacklevel=3)

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchedForward:
        return PatchedForward(self.source.of(copy.deepcopy(self.source.block, memo)), self.options)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.layout is not None:
            raise UnsupportedError("a model that is one rank's part cannot be pickled", where=type(self.source.block).__name__)
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
