"""A model on several ranks: what each keeps of every block, worked out on shapes before anything is read, cut or changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from moerunner.errors import UnsupportedError
from moerunner.models.block import Held, Part, Source, forward_of
from moerunner.models.entry import Joined
from moerunner.models.places import Cut, Shape
from moerunner.parallel.cut import kept
from moerunner.parallel.layout import BoundLayout, Layout
from moerunner.parallel.move import Move
from moerunner.parallel.pairs import SlotMap
from moerunner.values import RECORD_NAMES, Run, Runs, joined, length

Kept = dict[int, Runs]


def bound_to(layout: Layout | BoundLayout | None) -> BoundLayout | None:
    """The layout of a whole model with its ranks; None where there is one rank.

    Raises:
        UnsupportedError: it shards tokens. DistributedError: it is not bound and there are no processes to bind it to.
    """
    plain = layout.layout if isinstance(layout, BoundLayout) else layout
    if plain is None or plain.world == 1:
        return None
    if plain.tokens == "sharded":
        raise UnsupportedError(
            "a Transformers model computes its attention on every rank for all tokens, so they cannot be sharded",
            where="Layout.tokens",
            next_step="tokens='replicated'; with dp above 1 each copy of the model has inputs of its own",
        )
    return layout if isinstance(layout, BoundLayout) else plain.bind()


class Share(Source):
    """A block's tensors of which this rank keeps a part. whole: its parts, each `Held` as if the rank kept all."""

    def __init__(self, source: Source, parts: tuple[Part, ...], layout: BoundLayout, whole: tuple[Part, ...]) -> None:
        super().__init__(source.block, parts, source.built, source.family, source.spec, layout)
        self.whole = whole

    def of(self, block: nn.Module) -> Share:
        assert self.layout is not None
        return Share(super().of(block), self.parts, self.layout, self.whole)

    @torch.no_grad()
    def move(self, move: Move) -> None:
        """This rank's part of the experts becomes that of another placement, one tensor after another."""
        layout = BoundLayout(move.comm.layout, move.comm)
        parts = _cut(self, self.whole, layout, move.after)
        for (before, module), after in zip(self.modules(), parts, strict=True):
            for old, new in zip(before.held, after.held, strict=True):
                name, _, index = new.name.partition(".")
                if name in RECORD_NAMES and new.cut is not None:
                    new.write(module, move.tensor(old.read(module), int(index or 0)))
        self.parts, self.layout = parts, layout


def part_of(source: Source, bound: BoundLayout) -> Share:
    """The block's tensors as this rank will hold them: every `Held` that is cut has its `cut` and its new shape.

    Raises:
        UnsupportedError: a tensor is stored in a way that cannot be cut.
    """
    spec = source.spec
    slots = SlotMap(bound.layout, spec.num_experts, spec.routing.modalities, spec.zero_experts)
    return Share(source, _cut(source, source.parts, bound, slots), bound, source.parts)


def _cut(source: Source, whole: tuple[Part, ...], bound: BoundLayout, slots: SlotMap) -> tuple[Part, ...]:
    """Parts of the block as a rank holds them. source: as they are now, whole or cut otherwise."""
    spec, family = source.spec, source.family
    shapes: dict[str, Shape] = {}
    for one in whole:
        for held in one.held:
            shapes[held.name] = _with_piece(shapes.get(held.name), held, family.weights[held.name])
    runs = kept(spec, shapes, source.gate_up, bound.comm, slots)

    def cut(module: nn.Module, held: Held, now: Held) -> Held:
        if held.name not in runs:
            return held
        stored = tuple(getattr(module, held.attribute).shape) if now.cut is None else now.cut.shape
        own = _of_piece(runs[held.name], shapes[held.name], held, family.weights[held.name])
        seen = Cut.of(held.shape, own)
        return dataclasses.replace(held, shape=seen.local, cut=_as_stored(seen, held, stored))

    return tuple(
        dataclasses.replace(part, held=tuple(cut(module, *both) for both in zip(part.held, now.held, strict=True)))
        for part, (now, module) in zip(whole, source.modules(), strict=True)
    )


def _with_piece(before: Shape | None, held: Held, stored: Any) -> Shape:
    """The shape of the layer's tensor, as far as its pieces up to this one make it up."""
    if not isinstance(stored, Joined):
        return held.shape
    if len(stored.parts) == 1:
        return (held.index + 1, *held.shape)
    size = before[stored.dim] if before is not None else 0
    return (*held.shape[: stored.dim], size + held.shape[stored.dim], *held.shape[stored.dim + 1 :])


def _of_piece(runs: Kept, shape: Shape, held: Held, stored: Any) -> Kept:
    """What is kept of one of the tensors that `Joined` puts together."""
    if not isinstance(stored, Joined):
        return runs
    if len(stored.parts) == 1:
        if 0 in runs:
            raise UnsupportedError(
                "it keeps every expert in a module of its own; such experts cannot be spread over ranks",
                next_step="A layout with ep=1 splits their width over tp",
            )
        return {dim - 1: places for dim, places in runs.items()}
    if stored.dim not in runs:
        return runs
    count, size = len(stored.parts), shape[stored.dim] // len(stored.parts)
    local = length(runs[stored.dim]) // count
    places = _between(runs[stored.dim], held.index * local, (held.index + 1) * local)
    first = held.index * size
    if any(run.start is not None and not first <= run.start <= run.start + run.size <= first + size for run in places):
        raise UnsupportedError(f"{held.attribute} is a part of {held.name}, and a rank's slice of that lies across its parts")
    own = joined(Run(None if run.start is None else run.start - first, run.size) for run in places)
    return {**runs, stored.dim: own}


def _between(runs: Runs, start: int, stop: int) -> Runs:
    """The places from `start` to `stop` of those that are kept."""
    found, at = [], 0
    for run in runs:
        low, high = max(start, at), min(stop, at + run.size)
        if low < high:
            found.append(Run(None if run.start is None else run.start + low - at, high - low))
        at += run.size
    return tuple(found)


def _as_stored(cut: Cut, held: Held, shape: Shape) -> Cut:
    """The cut of the tensor as the module has it, in this shape."""
    if held.change == "leading":
        rows = cut.runs[0] if cut.runs[0] != (Run(0, cut.shape[0]),) else (Run(0, shape[0]),)
        return Cut(shape, (rows, *cut.runs[1:]))
    if held.change in ("transposed", "reshaped transposed"):
        cut = cut.transposed()
    if held.change.startswith("reshaped") and len(shape) == len(cut.shape) - 1:
        cut = cut.merged()
    if cut.shape != shape:
        raise UnsupportedError(f"{held.attribute} is stored as {list(shape)}, {held.change}, which cannot be cut over ranks")
    return cut


@torch.no_grad()
def cut_in_place(sources: Iterable[Source]) -> None:
    """Leaves of each tensor what this rank keeps; the rest is freed. Parameters stay the objects that they are."""
    done: set[int] = set()
    for source in sources:
        for tensor, cut in cut_tensors(source):
            if id(tensor) not in done:
                done.add(id(tensor))
                tensor.data = cut.take(tensor.data)


def cuts_of(model: nn.Module, sources: Iterable[Source] | None = None) -> dict[str, Cut]:
    """What this rank keeps of a model's tensors, by name; those that it keeps whole are left out.

    sources: of blocks that are to be patched; None: those of the blocks that are.
    """
    if sources is None:
        sources = [forward.source for block in model.modules() if (forward := forward_of(block)) is not None]
    cuts = {id(tensor): cut for source in sources for tensor, cut in cut_tensors(source)}
    named = model.state_dict(keep_vars=True)
    return {name: cuts[id(tensor)] for name, tensor in named.items() if id(tensor) in cuts}


def cut_tensors(source: Source) -> list[tuple[Tensor, Cut]]:
    found = []
    for part in source.parts:
        module = part.find(source.block)
        found += [(getattr(module, held.attribute), held.cut) for held in part.held if held.cut is not None]
    return found


def refuse_saving(*_: Any, **__: Any) -> NoReturn:
    """Stands for `save_pretrained` of a model of which this rank holds a part, or which holds its experts quantised."""
    raise UnsupportedError(
        "this rank holds a part of the experts, or holds them quantised; what it could save is no checkpoint",
        where="save_pretrained",
        next_step="Load the checkpoint without a layout and not quantised in one process, and save that model",
    )
