"""The result does not depend on the layout, and every layout issues the collectives that its plan names, no more."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.numerics import assert_close
from tests.support.running import check, collected, expected, rank_tokens, run
from tests.support.strategies import Storage, Tokens, layouts, make_weights, problems, replayed, token_counts

from moerunner import (
    DistributedError,
    ExpertsSpec,
    LayerWeights,
    Layout,
    Linear,
    MoERunner,
    MoESpec,
    Options,
    PlanError,
    RMSNorm,
    RoutingSpec,
    SharedSpec,
    SpecError,
    TransformSpec,
    UnsupportedError,
)
from moerunner.ops.reference import reference
from moerunner.parallel.comm import simulate
from moerunner.parallel.cut import local_part
from moerunner.parallel.pairs import SlotMap
from moerunner.parallel.rows import pack, unpack

LINEAR = TransformSpec((Linear(in_features=8, out_features=16),))
NORMED = TransformSpec((RMSNorm(features=8), Linear(in_features=8, out_features=16)))
BASE = MoESpec(
    hidden_size=16,
    num_experts=6,
    top_k=2,
    routing=RoutingSpec(score="sigmoid", renormalise="sum", selection_bias=True),
    experts=ExpertsSpec(intermediate_size=12, bias=True),
    apply_routed_scale_to_output=True,
    routed_scaling_factor=2.5,
    shared=SharedSpec(width=10, bias=True),
    output_bias=True,
)
LATENT = dataclasses.replace(
    BASE, input_transform=TransformSpec((Linear(in_features=16, out_features=8),)), output_transform=LINEAR
)


@settings(max_examples=50)
@given(problems(4))
def test_every_layout_equals_the_oracle(problem):
    check(*problem, torch.float32)


@pytest.mark.slow
@settings(max_examples=800)
@given(problems(8))
def test_every_layout_equals_the_oracle_long(problem):
    check(*problem, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=25)
@given(problems(4))
def test_every_layout_in_low_precision(dtype, problem):
    *rest, rows = problem
    check(*rest, [n + 8 for n in rows], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=300)
@given(problems(8))
def test_every_layout_in_low_precision_long(dtype, problem):
    *rest, rows = problem
    check(*rest, [n + 8 for n in rows], dtype)


@settings(max_examples=25)
@given(problems(4))
def test_own_routing_is_the_same_on_every_rank(problem):
    """Without replay: ranks that hold the same tokens route alike, and the whole equals one rank bit for bit in its ids."""
    spec, layout, options, seed, storage, rows = problem
    weights = make_weights(spec, seed, torch.float32, storage)
    tokens = rank_tokens(spec, layout, seed + 1, token_counts(layout, rows), torch.float32)
    one = MoERunner(spec, weights)

    def alone(t):
        with torch.no_grad():
            return one(t.x, **t.inputs).double()

    answers = run(spec, weights, layout, options, tokens)
    got, wanted = collected(layout, options, answers), expected(spec, weights, layout, options, tokens, alone)
    assert_close(torch.cat(got), torch.cat(wanted))


# ---- the number of collectives


def collectives(spec: MoESpec, layout: Layout, **options) -> list[str]:
    weights = make_weights(spec, 0)
    return [kind for kind, _ in _plan(spec, weights, layout, **options).collectives]


def _plan(spec: MoESpec, weights: LayerWeights, layout: Layout, **options):
    return simulate(layout, lambda bound: MoERunner(spec, weights, bound, Options(**options)).plan)[0]


@pytest.mark.parametrize("axes", [{"tp": 2}, {"ep": 2}, {"ep": 2, "tp": 2}])
@pytest.mark.parametrize("shared", ["sharded", "replicated"])
@pytest.mark.parametrize("spec", [BASE, LATENT], ids=["plain", "latent"])
def test_replicated_tokens_take_one_reduction(axes, shared, spec):
    """A linear output transform runs before the one reduction, a replicated shared expert needs none of its own."""
    assert collectives(spec, Layout(**axes, shared=shared)) == ["all_reduce"]
    assert collectives(spec, Layout(**axes, shared=shared), output="shard") == ["reduce_scatter"]
    assert collectives(spec, Layout(**axes, shared=shared), output="partial") == []


@pytest.mark.parametrize("axes", [{"tp": 2}, {"ep": 2, "tp": 2}])
def test_a_transform_that_is_not_linear_waits_for_the_reduction(axes):
    spec = dataclasses.replace(LATENT, output_transform=NORMED)
    assert collectives(spec, Layout(**axes, shared="replicated")) == ["all_reduce"]
    plan = _plan(spec, make_weights(spec, 0), Layout(**axes, shared="sharded"))
    assert [kind for kind, _ in plan.collectives] == ["all_reduce", "all_reduce"]
    assert [s.value for s in plan.steps if s.verb == "reduce"] == ["routed", "shared"]


def test_sharded_tokens_take_two_collectives():
    layout = Layout(ep=2, tokens="sharded")
    assert collectives(BASE, layout, dispatch="allgather") == ["all_gather", "reduce_scatter"]
    assert collectives(BASE, layout, dispatch="alltoall") == ["all_to_all", "all_to_all"]
    both = Layout(ep=2, tp=2, tokens="sharded")
    assert collectives(BASE, both, dispatch="allgather") == ["all_gather", "reduce_scatter"]
    assert sorted(collectives(BASE, both, dispatch="alltoall")) == [
        "all_gather",
        "all_to_all",
        "all_to_all",
        "reduce_scatter",
    ]


@pytest.mark.parametrize("tokens", ["replicated", "sharded"])
def test_copies_talk_to_no_one(tokens):
    assert collectives(BASE, Layout(dp=2, tokens=tokens)) == []


def test_exchange_of_counts_stands_beside_the_plan():
    """The log holds what moves rows; the row counts of uneven ranks travel before and are not part of the plan."""
    layout = Layout(ep=2, tokens="sharded")
    weights = make_weights(BASE, 0)
    for dispatch in ("allgather", "alltoall"):
        options = Options(dispatch=dispatch)
        for rows in ([3, 0], [0, 0], [1, 4]):
            tokens = rank_tokens(BASE, layout, 1, rows, torch.float32)
            answers = run(BASE, weights, layout, options, tokens)
            assert all(a.issued == a.plan.collectives for a in answers), rows
            got, wanted = collected(layout, options, answers), expected(BASE, weights, layout, options, tokens)
            assert_close(torch.cat(got), torch.cat(wanted))


# ---- bytes


def bytes_of(spec: MoESpec, layout: Layout, **options) -> float:
    return _plan(spec, make_weights(spec, 0), layout, **options).bytes_per_token()


def test_bytes_follow_the_ring_formulas():
    row = 16 * 4
    assert bytes_of(BASE, Layout(dp=2)) == 0
    assert bytes_of(BASE, Layout(tp=2)) == row * 2 * 1 / 2
    assert bytes_of(BASE, Layout(ep=2, tp=2)) == row * 2 * 3 / 4
    assert bytes_of(BASE, Layout(ep=2, tp=2), output="shard") == row * 3 / 4
    assert bytes_of(BASE, Layout(ep=2), output="partial") == 0
    gathered = bytes_of(BASE, Layout(ep=2, tokens="sharded"), dispatch="allgather")
    assert gathered == row + row  # to the one other rank, there and back
    sent = bytes_of(BASE, Layout(ep=2, tokens="sharded"), dispatch="alltoall")
    assert sent == 2 * BASE.top_k * row / 2  # half of the pairs leave the rank, there and back


def test_bytes_follow_the_dtype_that_travels():
    weights = make_weights(BASE, 0, torch.bfloat16)
    narrow = _plan(BASE, weights, Layout(tp=2)).bytes_per_token()
    wide = _plan(BASE, weights, Layout(tp=2), reduce_dtype=torch.float32).bytes_per_token()
    half = _plan(BASE, make_weights(BASE, 0, torch.float16), Layout(tp=2)).bytes_per_token()
    assert wide == 2 * narrow
    assert half == wide, "float16 partial sums travel in float32"


# ---- what single faults would break


@pytest.mark.parametrize("axes", [{"tp": 2}, {"ep": 2}, {"ep": 2, "tp": 2}, {"tp": 4}])
@pytest.mark.parametrize("shared", ["sharded", "replicated"])
def test_float16_sums_beyond_its_range_are_right(axes, shared):
    """The routed and the shared part overflow float16 apart, on every rank, and their sum does not."""
    spec = dataclasses.replace(BASE, routing=RoutingSpec(score="sigmoid", renormalise="sum"), output_bias=False)
    weights = make_weights(spec, 3, torch.float16)
    layout = Layout(**axes, shared=shared)
    tokens = [replayed(spec, weights, t) for t in rank_tokens(spec, layout, 4, [4] * layout.world, torch.float16)]
    big, experts = 60000.0, weights.experts[0]
    for name, value in (("w13", 0.0), ("b13", 0.0), ("w2", 0.0), ("b2", big / 2)):
        experts.tensors[name].tensor.fill_(value)
    weights.tensors["shared_w2"].zero_()
    weights.tensors["shared_b2"].fill_(-big)
    wanted = reference(spec, weights, tokens[0].x, **tokens[0].inputs)
    assert 2.5 * big / 2 > torch.finfo(torch.float16).max
    assert float(wanted.abs().max()) < torch.finfo(torch.float16).max
    answers = run(spec, weights, layout, Options(), tokens)
    for answer in answers:
        assert_close(answer.y, wanted, 1e-3)


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_travels_arrives(rows: int, dtype: torch.dtype) -> None:
    parts = torch.randn(rows, 5).to(dtype), torch.rand(rows, 3), torch.randint(-1, 9, (rows, 3)).int()
    for some in (parts, parts[:1]):
        got = unpack(pack(some), some)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, some, strict=True))


# ---- ids of slots, weights of a rank, and ranks that disagree


@settings(max_examples=25)
@given(problems(4))
def test_ids_of_slots_reach_the_experts_in_them(problem):
    """A caller who knows the placement may choose among an expert's copies himself."""
    spec, layout, options, seed, storage, rows = problem
    if spec.zero_experts:
        return
    weights = make_weights(spec, seed, torch.float32, storage)
    logical = [
        replayed(spec, weights, t) for t in rank_tokens(spec, layout, seed + 1, token_counts(layout, rows), torch.float32)
    ]
    slots = SlotMap(layout, spec.num_experts, spec.routing.modalities)
    everywhere = {}
    for slot, expert in enumerate(e for row in slots.slots for e in row):
        everywhere.setdefault(expert, []).append(slot)

    def last_copy(t: Tokens) -> Tokens:
        top = t.inputs["topk"]
        ids = top.ids.clone().apply_(lambda e: -1 if e < 0 else everywhere[e][-1])
        return Tokens(t.x, {"topk": dataclasses.replace(top, ids=ids, space="physical")})

    answers = run(spec, weights, layout, options, [last_copy(t) for t in logical])
    got, wanted = collected(layout, options, answers), expected(spec, weights, layout, options, logical)
    assert_close(torch.cat(got), torch.cat(wanted))


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(ep=3, placement="round_robin"), Layout(ep=2, tp=2, redundant=1)])
def test_a_function_gives_the_weights_of_its_rank(layout):
    weights = make_weights(BASE, 0)
    x = torch.randn(5, 16)
    wanted = reference(BASE, weights, x)

    def main(bound):
        slots = SlotMap(layout, BASE.num_experts)
        own = local_part(weights, BASE, bound.comm, slots)
        with torch.no_grad():
            return MoERunner(BASE, lambda: own, bound)(x)

    for y in simulate(layout, main):
        assert_close(y, wanted)


@pytest.mark.parametrize(
    "other",
    [
        {"spec": dataclasses.replace(BASE, routed_scaling_factor=1.0)},
        {"spec": dataclasses.replace(BASE, top_k=3)},
        {"spec": dataclasses.replace(BASE, experts=ExpertsSpec(intermediate_size=14, bias=True))},
        {"options": Options(reduce_dtype="float64")},
    ],
)
def test_ranks_that_disagree_are_told_before_the_first_collective(other):
    def main(bound):
        odd = other if bound.comm.rank == 1 else {}
        spec = odd.get("spec", BASE)
        runner = MoERunner(spec, make_weights(spec, 0), bound, odd.get("options", Options()))
        with torch.no_grad(), pytest.raises(DistributedError, match="rank 1 disagrees with rank 0"):
            runner(torch.randn(2, 16))
        return tuple(bound.comm.log)

    assert simulate(Layout(tp=2), main) == [(), ()]


# ---- what cannot be


def build(layout: Layout, spec: MoESpec = BASE, **options) -> None:
    weights = make_weights(spec, 0)
    simulate(layout, lambda bound: MoERunner(spec, weights, bound, Options(**options)))


def test_contradictions_of_layouts_are_refused_by_name():
    with pytest.raises(PlanError, match="needs the whole value on ep") as caught:
        build(Layout(ep=2, tokens="sharded", shared="sharded"))
    assert caught.value.second == "shared"
    with pytest.raises(PlanError, match="partial sums of sharded tokens") as caught:
        build(Layout(ep=2, tokens="sharded"), output="partial")
    assert (caught.value.first, caught.value.second) == ("Layout.tokens", "Options.output")
    with pytest.raises(UnsupportedError, match="tokens are not sharded, 'alltoall' has nothing to do"):
        build(Layout(ep=2), dispatch="alltoall")
    with pytest.raises(UnsupportedError, match="needs ep above 1"):
        build(Layout(tp=2, tokens="sharded"), dispatch="alltoall")
    with pytest.raises(SpecError, match=r"experts without a place: \[3, 4, 5\]"):
        build(Layout(ep=2, placement=((0, 1), (2,))))
    with pytest.raises(SpecError, match="do not exist"):
        build(Layout(ep=2, placement=((0, 1, 2), (3, 4, 5, 6))))


def test_the_first_rank_that_fails_ends_the_others():
    def main(bound):
        if bound.comm.rank == 1:
            raise ValueError("rank 1 is ill")
        return bound.comm.all_reduce(torch.ones(1), ("tp",))

    with pytest.raises(ValueError, match="rank 1 is ill"):
        simulate(Layout(tp=3, timeout=30.0), main)


def test_sets_of_experts_have_equally_many_slots_each():
    """A set is found by its place: text, text, text | vision, vision, - on one rank, text, -, - | vision, ... on the other."""
    slots = Layout(ep=2, placement=((0, 1, 2, 4, 5), (3, 6, 7, 3))).slots(8, sets=2)
    assert slots == ((0, 1, 2, 4, 5, -1), (3, 3, -1, 6, 7, -1))
    spec = dataclasses.replace(
        BASE, num_experts=8, routing=RoutingSpec(modalities=2), experts=ExpertsSpec(intermediate_size=(6, 10))
    )
    layout = Layout(ep=2, placement=((0, 1, 2, 4, 5), (3, 6, 7, 3)))
    check(spec, layout, Options(), 1, Storage(), [7], torch.float32)


@settings(max_examples=40)
@given(layouts(6, world=8), st.integers(0, 20))
def test_tokens_and_experts_are_dealt_out_whole(layout, tokens):
    counts = layout.token_counts(tokens)
    assert len(counts) == layout.ep * layout.tp
    assert sum(counts) == tokens
    assert min(counts) >= 0
    slots = layout.slots(6)
    assert len(slots) == layout.ep
    assert len({len(row) for row in slots}) == 1
    assert {e for row in slots for e in row} - {-1} == set(range(6))
    for rank in range(layout.world):
        group = layout.group(rank, ("ep", "tp"))
        assert rank in group
        assert len(group) == layout.ep * layout.tp
        at = layout.coordinates(rank)
        assert (at["dp"] * layout.ep + at["ep"]) * layout.tp + at["tp"] == rank
