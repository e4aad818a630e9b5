"""What a rank keeps, on shapes: the part that `local_part` cuts of whole tensors; and no byte of a file beyond it is read."""

from __future__ import annotations

import math
import random
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import some_tree
from tests.support.strategies import SEEDS, Storage, layouts, make_weights, specs

from moerunner.models import places
from moerunner.models.places import Cut, regions
from moerunner.parallel.comm import SimulatedComm
from moerunner.parallel.cut import kept, local_part
from moerunner.parallel.pairs import SlotMap
from moerunner.values import Run, joined, take, width_runs


def some_cut(shape):
    """A random cut: runs in any order, some twice, some of zeros."""
    runs = {}
    for dim, size in enumerate(shape):
        if random.random() < 0.6 and size:
            starts = [random.randrange(size) for _ in range(random.randrange(4))]
            mine = [Run(start, random.randrange(1, size - start + 1)) for start in starts]
            runs[dim] = joined(run if random.random() < 0.8 else Run(None, run.size) for run in mine)
    return Cut.of(shape, runs)


def realise(laid, cut, sources, least):
    """The part of the tensor, of which only regions are read, and how often each number of a source was."""
    target = torch.full(cut.local, torch.nan)
    if cut.has_zeros:
        target.zero_()
    written, read = 0, {name: torch.zeros(tensor.shape, dtype=torch.int) for name, tensor in sources.items()}
    for name, source in sources.items():
        parts = [("it", left) for part in laid.parts if part.source == name for left in cut.parts(part)]
        for box, mine in regions(parts, tuple(source.shape), least):
            read[name][box] += 1
            straight = mine[0][1].box(box) if len(mine) == 1 else None
            if straight is not None:
                target[straight].copy_(source[box])
                written += source[box].numel()
                continue
            written += sum(part.write(target, box, source[box]) for _, part in mine)
    assert written == cut.numel
    return target, read


@pytest.mark.parametrize("least", [1, 1000])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_cut_of_any_composition_is_the_cut_of_the_tensor(depth, least):
    for _ in range(60):
        laid, wanted, sources = some_tree(depth)
        cut = some_cut(laid.shape)
        part, read = realise(laid, cut, sources, least)
        assert torch.equal(part, cut.take(wanted))
        assert max((int(count.max()) for count in read.values() if count.numel()), default=0) <= 1


def test_what_no_kept_number_needs_is_not_read():
    source = torch.rand(4, 6, 5)
    kept_of = {
        "two experts": ({0: (Run(1, 2),)}, 2 * 30),
        "the first and the last": ({0: (Run(0, 1), Run(3, 1))}, 2 * 30),
        "a copy": ({0: (Run(2, 1), Run(2, 1))}, 30),
        "halves of gate and up": ({1: width_runs(6, 1, 2, parts=2)}, 4 * 2 * 5),
        "both": ({0: (Run(1, 2),), 1: width_runs(6, 1, 2, parts=2)}, 2 * 2 * 5),
        "nothing": ({0: (Run(None, 2),)}, 0),
    }
    for name, (runs, numbers) in kept_of.items():
        cut = Cut.of((4, 6, 5), runs)
        part, read = realise(places.whole("t", (4, 6, 5)), cut, {"t": source}, 1)
        assert torch.equal(part, cut.take(source)), name
        assert int(read["t"].sum()) == numbers, name


def test_too_few_numbers_in_a_row_are_read_with_what_lies_between():
    cut = Cut.of((8, 6), {0: (Run(2, 3),), 1: (Run(1, 2),)})
    parts = [("it", left) for left in cut.parts(places.whole("t", (8, 6)).parts[0])]
    assert [box for box, _ in regions(parts, (8, 6), 3)] == [(slice(2, 5), slice(0, 6))]
    assert [box for box, _ in regions(parts, (8, 6), 2)] == [(slice(row, row + 1), slice(1, 3)) for row in (2, 3, 4)]


def test_boxes_are_contiguous_in_the_file():
    for _ in range(200):
        laid, _, sources = some_tree(2)
        cut = some_cut(laid.shape)
        for name, source in sources.items():
            numbers = torch.arange(source.numel()).view(source.shape)
            parts = [("it", left) for part in laid.parts if part.source == name for left in cut.parts(part)]
            for box, _ in regions(parts, tuple(source.shape), random.choice((1, 4))):
                flat = numbers[box].flatten()
                assert torch.equal(flat, torch.arange(int(flat[0]), int(flat[0]) + flat.numel()))


def test_a_cut_of_a_reshaped_or_transposed_tensor():
    whole = torch.rand(4, 6, 5)
    cut = Cut.of((4, 6, 5), {0: (Run(2, 1), Run(None, 1), Run(0, 2)), 1: width_runs(6, 1, 4)})
    assert torch.equal(cut.transposed().take(whole.mT), cut.take(whole).mT)
    assert torch.equal(cut.merged().take(whole.flatten(0, 1)), cut.take(whole).flatten(0, 1))
    assert cut.merged().local == (math.prod(cut.local[:2]), 5)


def test_a_part_lies_in_memory_of_its_own():
    whole = torch.rand(6, 4)
    part = Cut.of((6, 4), {0: (Run(1, 2),)}).take(whole)
    assert part.untyped_storage().nbytes() == part.nbytes


@settings(max_examples=80)
@given(st.data())
def test_what_is_kept_is_what_local_part_cuts(data):
    spec, storage = data.draw(specs()), Storage(gate_up=data.draw(st.sampled_from(["concat", "interleaved"])))
    layout = data.draw(layouts(spec.num_experts))
    w = make_weights(spec, data.draw(SEEDS), storage=storage)
    slots = SlotMap(layout, spec.num_experts, spec.routing.modalities, spec.zero_experts)
    named = {f"experts.{i}.{n}": e.tensor for i, one in enumerate(w.experts) for n, e in one.tensors.items()}
    canonical = {f"{n.split('.')[2]}.{n.split('.')[1]}" if len(w.experts) > 1 else n.split(".")[2]: n for n in named}
    tensors = {**w.tensors, **{name: named[full] for name, full in canonical.items()}}
    for rank in range(layout.world):
        comm = SimulatedComm(layout, rank, [], threading.Barrier(1))
        part = local_part(w, spec, comm, slots)
        held = {f"experts.{i}.{n}": e.tensor for i, one in enumerate(part.experts) for n, e in one.tensors.items()}
        runs = kept(spec, {name: tuple(t.shape) for name, t in tensors.items()}, w.experts[0].gate_up, comm, slots)
        for name, tensor in tensors.items():
            mine = held[canonical[name]] if name in canonical else part.tensors[name]
            for dim, places_ in runs.get(name, {}).items():
                tensor = take(tensor, dim, places_)
            assert torch.equal(tensor, mine), name
