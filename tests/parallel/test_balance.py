"""Experts are placed by their loads, and move there: the result stays what it was."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.parallel.pool import on_ranks
from tests.support.strategies import make_weights, specs
from torch import nn

from moerunner import (
    DistributedError,
    ExpertsSpec,
    ExpertWeights,
    LayerWeights,
    Layout,
    MoERunner,
    MoESpec,
    Options,
    RoutingSpec,
    SpecError,
    TopK,
    UnsupportedError,
)
from moerunner.experts import eager, registry
from moerunner.parallel.balance import imbalance, placement, rank_loads
from moerunner.parallel.comm import simulate
from moerunner.parallel.move import Move, senders
from moerunner.parallel.pairs import SlotMap
from moerunner.values import ExpertTensor

SPEC = MoESpec(
    hidden_size=16,
    num_experts=8,
    top_k=2,
    routing=RoutingSpec(score="softmax", renormalise="sum"),
    experts=ExpertsSpec(intermediate_size=12, bias=True),
    apply_routed_scale_to_output=False,
)


class RowByRow:
    """The eager backend on one row after another: what a row gives does not depend on which others came to its rank."""

    INFO = dataclasses.replace(eager.INFO, name="row_by_row", few_tokens={}, batch_invariant=True)

    @staticmethod
    def run(x_TH, topk, weights, call):
        parts = zip(x_TH.split(1), topk.ids.split(1), topk.weights.split(1), strict=True)
        return torch.cat([eager.run(x, TopK(ids, w, space="physical"), weights, call) for x, ids, w in parts])


@contextlib.contextmanager
def row_by_row():
    registry.register(RowByRow)
    try:
        yield
    finally:
        registry.unregister("row_by_row")


LOADS = [1, 1, 40, 2, 0, 3, 20, 5]


@st.composite
def problems(draw):
    """Loads, ep, redundant, nodes and sets that fit each other."""
    nodes, sets = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    ep, size = nodes * draw(st.integers(1, 4)), draw(st.integers(1, 9))
    loads = draw(st.lists(st.floats(0, 1e4) | st.integers(0, 3), min_size=size * sets, max_size=size * sets))
    return loads, ep, draw(st.integers(0, min(9, size * (ep - 1)))), nodes, sets


@given(problem=problems())
def test_every_expert_has_a_place_and_every_rank_equally_many(problem):
    loads, ep, redundant, nodes, sets = problem
    rows = placement(loads, ep, redundant=redundant, nodes=nodes, sets=sets)
    assert rows == placement(list(loads), ep, redundant=redundant, nodes=nodes, sets=sets)
    size = len(loads) // sets
    assert {len(row) for row in rows} == {sets * min(size, -(-(size + redundant) // ep))}
    assert all(len(set(row)) == len(row) for row in rows), "a second copy on one rank is of no use"
    slots = Layout(ep=ep, placement=rows).slots(len(loads), sets)
    assert [sorted(row) for row in slots] == [sorted(row) for row in rows], "no slot stays empty"
    assert math.isclose(sum(rank_loads(loads, rows)), sum(loads), abs_tol=1e-9)


@given(problem=problems())
def test_copies_of_an_expert_lie_on_different_nodes_first(problem):
    loads, ep, redundant, nodes, sets = problem
    rows = placement(loads, ep, redundant=redundant, nodes=nodes, sets=sets)
    step = ep // nodes
    for expert in range(len(loads)):
        per_node = [sum(expert in row for row in rows[i : i + step]) for i in range(0, ep, step)]
        assert max(per_node) - min(per_node) <= 1


@given(problem=problems())
def test_the_busiest_rank_has_at_most_one_copy_more_than_the_mean(problem):
    loads, ep, redundant, nodes, _ = problem
    rows = placement(loads, ep, redundant=redundant, nodes=nodes)
    copies = [sum(e in row for row in rows) for e in range(len(loads))]
    heaviest = max(n / c for n, c in zip(loads, copies, strict=True))
    per_rank = rank_loads(loads, rows)
    assert max(per_rank) <= sum(per_rank) / ep + heaviest * (1 + 1e-9)
    assert all(
        n / c <= loads[e] / (copies[e] - 1) * (1 + 1e-9)
        for n, c in zip(loads, copies, strict=True)
        if c < ep
        for e in range(len(loads))
        if copies[e] > 1
    ), "a copy went to an expert that needed it less than another"


def test_copies_even_out_what_one_expert_brings():
    alone, copied = placement(LOADS, 4), placement(LOADS, 4, redundant=4)
    assert imbalance(rank_loads(LOADS, Layout(ep=4).slots(8))) > 2.3
    assert imbalance(rank_loads(LOADS, alone)) == pytest.approx(40 / 18)
    assert imbalance(rank_loads(LOADS, copied)) < 1.2
    assert [sum(e in row for row in copied) for e in range(8)] == [1, 1, 4, 1, 1, 1, 2, 1]


def test_no_load_at_all_is_even():
    assert placement([0] * 4, 2) == ((0, 2), (1, 3))
    assert imbalance([0.0, 0.0]) == 1.0


@pytest.mark.parametrize(
    ("arguments", "facts", "words"),
    [
        (([], 2), {}, "one for each expert"),
        (([1, math.nan], 2), {}, "finite"),
        (([1, -1], 2), {}, "at least 0"),
        (([1, 1], 0), {}, "ep must be"),
        (([1, 1], 2), {"redundant": -1}, "redundant must be"),
        (([1, 1], 2), {"nodes": True}, "nodes must be"),
        (([1, 1], 3), {"nodes": 2}, "2 nodes do not hold"),
        (([1, 1, 1], 2), {"sets": 2}, "not 2 equal sets"),
        (([1, 1], 2), {"redundant": 3}, "At most 2 copies"),
    ],
)
def test_what_cannot_be_placed_is_refused(arguments, facts, words):
    with pytest.raises(SpecError, match=words):
        placement(*arguments, **facts)


def test_an_expert_comes_from_the_rank_itself_or_from_the_least_busy():
    old = [(0, 1), (1, 2), (1, 3)]
    assert senders(old, [(1, 3), (1, 0), (-1, 1)]) == [[0, 2], [1, 0], [-1, 2]]
    assert senders([(0, 1), (0, 1), (2,), (2,)], [(0,), (1,), (0, 1), (0, 1)]) == [[0], [1], [0, 1], [0, 1]]


# ---- moving


def moving(layout, weights, spec, rows, options, tokens, parameters=False):
    """Each rank's results before and after a move to `rows`, and what it holds then."""

    def main(bound):
        mine = tokens[bound.comm.rank]
        given = weights.map(lambda _, t: nn.Parameter(t, requires_grad=False)) if parameters else weights
        runner = MoERunner(spec, given, bound, options)
        names = {*dict(runner.named_parameters())}
        with torch.no_grad():
            runner.rebalance(Layout(ep=layout.ep, placement="round_robin").slots(spec.num_experts))  # the strides of what moved
            before = runner(mine)
            runner.rebalance(rows)
            runner._comm.log.clear()
            after = runner(mine)
        assert tuple(runner._comm.log) == runner.plan.collectives
        assert {*dict(runner.named_parameters())} == names
        return before, after, runner

    return simulate(layout, main)


LAYOUTS = [
    Layout(ep=4, tokens="sharded"),
    Layout(ep=2, tp=2, tokens="sharded"),
    Layout(dp=2, ep=2, tokens="sharded"),
    Layout(ep=4, tokens="sharded", placement="round_robin", redundant=3),
    Layout(ep=4, tokens="sharded", node=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("redundant", [0, 4])
@pytest.mark.parametrize("parameters", [False, True])
def test_the_same_bits_before_and_after(layout, redundant, parameters):
    rows = placement(LOADS, layout.ep, redundant=redundant)
    weights = make_weights(SPEC, 3, torch.float32)
    tokens = [torch.randn(n, 16) for n in (5, 0, 9, 2)]
    options = Options(dispatch="alltoall", backend="row_by_row")
    with row_by_row():
        answers = moving(layout, weights, SPEC, rows, options, tokens, parameters)
    assert all(torch.equal(before, after) for before, after, _ in answers)


@pytest.mark.parametrize("layout", [Layout(ep=4), Layout(ep=2, tp=2), Layout(dp=2, ep=2)], ids=str)
def test_partial_sums_stay_equal_but_for_their_order(layout):
    rows = placement(LOADS, layout.ep, redundant=4)
    weights, tokens = make_weights(SPEC, 3, torch.float32), [torch.randn(6, 16)] * 4
    for before, after, _ in moving(layout, weights, SPEC, rows, Options(), tokens):
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)


@settings(max_examples=30)
@given(spec=specs(), seed=st.integers(0, 1 << 20), data=st.data())
def test_a_moved_layer_is_the_layer_cut_anew(spec, seed, data):
    """Whatever the experts hold: moved records are those that a runner would have cut for the new placement."""
    sets = spec.routing.modalities
    size = spec.num_experts // sets
    tp, redundant = data.draw(st.integers(1, 2)), data.draw(st.integers(0, min(3, size)))
    loads = data.draw(st.lists(st.integers(0, 9), min_size=spec.num_experts, max_size=spec.num_experts))
    layout = Layout(ep=2, tp=tp, redundant=data.draw(st.integers(0, 2)))
    rows = placement(loads, 2, redundant=redundant, sets=sets)
    weights = make_weights(spec, seed, torch.float32)

    def main(bound):
        runner = MoERunner(spec, weights, bound)
        runner.rebalance(rows)
        new = dataclasses.replace(layout, placement=rows, redundant=0)
        fresh = MoERunner(spec, weights, dataclasses.replace(bound, layout=new, comm=runner._comm))
        return runner.layer_weights(), fresh.layer_weights(), runner.plan == fresh.plan

    for got, wanted, same_plan in simulate(layout, main):
        assert same_plan
        for mine, theirs in zip(got.experts, wanted.experts, strict=True):
            assert set(mine.tensors) == set(theirs.tensors)
            assert all(torch.equal(mine.tensors[n].tensor, theirs.tensors[n].tensor) for n in mine.tensors)


def test_scales_move_with_their_experts_and_strides_stay():
    full = torch.arange(8 * 6, dtype=torch.float32).reshape(8, 2, 3)
    scale = torch.arange(8, dtype=torch.float16)

    def main(bound):
        slots = SlotMap(bound.layout, 8)
        tensors = {
            "w13": ExpertTensor(full.mT.contiguous().mT, 0, 1, "gate_up"),
            "w2": ExpertTensor(full.movedim(0, 2), 2, None, "down"),
            "scale": ExpertTensor(scale, 0, None, "whole"),
            "row_norm": ExpertTensor(torch.ones(3), None, None, "whole"),
        }
        whole = ExpertWeights(tensors, format="some")
        part = {n: dataclasses.replace(e, tensor=_part(e, slots.slots[bound.comm.rank])) for n, e in tensors.items()}
        move = Move.to(((7, 0, 3, 2, 1), (4, 5, 6, 7)), bound.comm, slots, 1)
        w = move.layer(LayerWeights((dataclasses.replace(whole, tensors=part),)))
        return w.experts[0], move.after.slots[bound.comm.rank]

    for experts, held in simulate(Layout(ep=2), main):
        for slot, e in enumerate(held):
            record = experts.record(slot)
            assert torch.equal(record["w13"], full[e] if e >= 0 else torch.zeros(2, 3))
            assert torch.equal(record["w2"], full[e] if e >= 0 else torch.zeros(2, 3))
            assert record["scale"] == (scale[e] if e >= 0 else 0)
        assert experts.tensors["w13"].tensor.stride() == (6, 1, 2)
        assert experts.tensors["scale"].tensor.dtype == torch.float16
        assert torch.equal(experts.tensors["row_norm"].tensor, torch.ones(3))


def _part(entry, held):
    if entry.expert_dim is None:
        return entry.tensor
    order = torch.tensor(held)
    return (
        entry.tensor.movedim(entry.expert_dim, 0)[order].movedim(0, entry.expert_dim)
        if entry.role != "gate_up"
        else (entry.tensor.mT[order].mT)
    )


def test_copies_are_used_and_take_turns():
    rows = placement(LOADS, 4, redundant=4)
    slots = SlotMap(Layout(ep=4, placement=rows), 8)
    ids = slots.physical(TopK(torch.full((8, 1), 2), torch.ones(8, 1)))
    assert torch.bincount(ids[:, 0] // slots.per_rank).tolist() == [2] * 4
    assert slots.logical(ids).unique().tolist() == [2]
    assert slots.logical(torch.tensor([-1])).tolist() == [-1]


@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (2, 1), (1, 2)])
def test_sharded_tokens_stay_on_their_machine_where_it_has_a_copy(dp, tp):
    rows = placement(LOADS, 4, redundant=4, nodes=2)
    layout = Layout(dp=dp, ep=4, tp=tp, tokens="sharded", placement=rows, node=2 * tp)
    for rank in range(layout.world):
        slots = SlotMap(layout, 8, rank=rank)
        ids = slots.physical(TopK(torch.arange(8).repeat(6, 1), torch.ones(6, 8)))
        coordinates, own = ids // slots.per_rank, layout.coordinates(rank)["ep"] // 2
        assert torch.equal(slots.logical(ids), torch.arange(8).repeat(6, 1))
        for expert in range(8):
            everywhere = {i for i, row in enumerate(rows) if expert in row}
            here = {i for i in everywhere if i // 2 == own}
            assert set(coordinates[:, expert].tolist()) == (here or everywhere)


def test_ranks_with_the_same_tokens_choose_the_same_copies():
    layout = Layout(ep=4, placement=placement(LOADS, 4, redundant=4, nodes=2), node=2)
    ids = [SlotMap(layout, 8, rank=r).physical(TopK(torch.arange(8).repeat(6, 1), torch.ones(6, 8))) for r in range(4)]
    assert all(torch.equal(ids[0], other) for other in ids)
    with pytest.raises(SpecError, match=r"Layout\.node"):
        Layout(node=0)


def test_layers_share_ranks_but_not_placements():
    weights = make_weights(SPEC, 3, torch.float32)

    def main(bound):
        one, other = MoERunner(SPEC, weights, bound), MoERunner(SPEC, weights, bound)
        one.rebalance(((0, 2, 4, 6), (1, 3, 5, 7)))
        return one.plan.layout.placement, other.plan.layout.placement, bound.comm.layout.placement, one(torch.ones(1, 16))

    for one, other, bound, _ in simulate(Layout(ep=2), main):
        assert (one, other, bound) == (((0, 2, 4, 6), (1, 3, 5, 7)), None, None)


def test_ranks_that_were_given_different_placements_say_so():
    weights = make_weights(SPEC, 3, torch.float32)
    halves = (tuple(range(4)), tuple(range(4, 8)))

    def main(bound):
        MoERunner(SPEC, weights, bound).rebalance(halves if bound.comm.rank else halves[::-1])

    with pytest.raises(DistributedError, match="disagree"):
        simulate(Layout(ep=2), main)


def test_a_placement_that_does_not_fit_moves_nothing():
    weights = make_weights(SPEC, 3, torch.float32)

    def main(bound):
        runner = MoERunner(SPEC, weights, bound)
        before = runner.layer_weights()
        with pytest.raises(SpecError, match="without a place"):
            runner.rebalance(((0, 1), (2, 3)))
        return torch.equal(before.experts[0].w2, runner.layer_weights().experts[0].w2)

    assert simulate(Layout(ep=2), main) == [True, True]


def test_weights_of_another_module_are_not_moved():
    weights = make_weights(SPEC, 3, torch.float32)
    with pytest.raises(UnsupportedError, match="another module"):
        MoERunner(SPEC, lambda: weights).rebalance((tuple(range(8)),))


# ---- counting


def test_loads_are_counted_when_asked_for():
    weights, x = make_weights(SPEC, 3, torch.float32), torch.randn(11, 16)
    assert MoERunner(SPEC, weights).loads is None
    runner = MoERunner(SPEC, weights, options=Options(count_loads=True))
    runner(x)
    runner(x[:4])
    wanted = torch.bincount(torch.cat([runner.route(x).ids, runner.route(x[:4]).ids]).flatten(), minlength=8)
    assert torch.equal(runner.loads.counts, wanted)
    assert torch.equal(runner.loads.total(runner._comm), wanted)
    runner.loads.reset()
    assert int(runner.loads.counts.sum()) == 0


@pytest.mark.parametrize("tokens", ["replicated", "sharded"])
def test_loads_of_all_ranks_count_every_token_once(tokens):
    weights = make_weights(SPEC, 3, torch.float32)
    rows = [torch.randn(5, 16) for _ in range(4)]
    if tokens == "replicated":
        rows = [rows[0], rows[0], rows[2], rows[2]]

    def main(bound):
        runner = MoERunner(SPEC, weights, bound, Options(count_loads=True))
        runner(rows[bound.comm.rank])
        return runner.loads.total(runner._comm)

    totals = simulate(Layout(dp=2, ep=2, tokens=tokens), main)
    distinct = rows if tokens == "sharded" else rows[::2]
    one = MoERunner(SPEC, weights)
    wanted = torch.bincount(one.route(torch.cat(distinct)).ids.flatten(), minlength=8)
    assert all(torch.equal(total, wanted) for total in totals)


def test_a_choice_by_slots_is_counted_for_its_expert():
    layout = Layout(placement=((3, 1, 0, 2, 3, -1)[:5],))
    runner = MoERunner(
        dataclasses.replace(SPEC, num_experts=4),
        make_weights(dataclasses.replace(SPEC, num_experts=4), 1, torch.float32),
        dataclasses.replace(layout),
        Options(count_loads=True),
    )
    assert runner.loads is not None
    slots = SlotMap(layout, 4)
    runner.loads.add(TopK(torch.tensor([[0, 4], [1, -1]]), torch.ones(2, 2), space="physical"), slots)
    assert runner.loads.counts.tolist() == [0, 1, 0, 2]


# ---- real ranks


def on_gloo(layout, rows, seed):
    weights, bound = make_weights(SPEC, seed, torch.bfloat16), layout.bind()
    x = torch.randn(7 + 3 * bound.comm.rank, 16, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    with torch.no_grad(), row_by_row():
        runner = MoERunner(SPEC, weights, bound, Options(backend="row_by_row", dispatch="alltoall", count_loads=True))
        before = runner(x)
        counted = runner.loads.total(runner._comm).tolist()
        runner.rebalance(rows or placement(counted, layout.ep, redundant=layout.ep))
        after = runner(x)
    return torch.equal(before, after), counted, runner.plan.layout.placement


@pytest.mark.parametrize(
    ("layout", "rows"),
    [
        (Layout(ep=2, tokens="sharded"), ((7, 2, 5, 0, 1), (3, 4, 6, 2))),
        pytest.param(Layout(ep=2, tp=2, tokens="sharded"), None, marks=pytest.mark.slow),
        pytest.param(Layout(ep=4, tokens="sharded"), None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_real_ranks_move_experts_and_give_the_same_bits(layout, rows):
    answers = on_ranks(layout.world, on_gloo, layout, rows, 5)
    assert all(same for same, _, _ in answers)
    assert len({str(rest) for _, *rest in answers}) == 1, "every rank counts and places alike"
    assert sum(answers[0][1]) == 2 * sum(7 + 3 * r for r in range(layout.world))
