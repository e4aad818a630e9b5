"""The algebra of states, one method at a time, and how an expert's tensors are cut and named."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.strategies import STORAGES, make_weights, specs

from moerunner import ExpertWeights, PlanError, WeightsError
from moerunner.values import ExpertTensor, LayerWeights, Partial, Replicate, Shard, ValueState, cut_width

WHOLE = (Replicate(), Replicate(), Replicate())
PART = {"tp": (Replicate(), Replicate(), Partial()), "ep": (Replicate(), Partial(), Replicate())}


def state(**changes) -> ValueState:
    facts = {"weighted": False, "summed": False, "scaled": False, "dtype": "float32", "placements": WHOLE}
    return ValueState(**{"width": 8, "padded_to": 8, **facts, **changes})


def done(**changes) -> ValueState:
    return state(**{"weighted": True, "summed": True, "scaled": True, **changes})


# ---- what a step changes, and nothing else


@pytest.mark.parametrize(
    ("step", "before", "after"),
    [
        (lambda s: s.pad("p", 11), state(), state(padded_to=11)),
        (lambda s: s.pad("p", 8), state(), state()),
        (lambda s: s.trim("t", 8), state(padded_to=11), state()),
        (lambda s: s.transform("f", 8, 5, linear=False), state(), state(width=5, padded_to=5)),
        (
            lambda s: s.transform("f", 8, 5, linear=True),
            done(placements=PART["tp"]),
            done(width=5, padded_to=5, placements=PART["tp"]),
        ),
        (lambda s: s.row_norm("n"), state(placements=PART["ep"]), state(placements=PART["ep"])),
        (lambda s: s.weigh("w"), state(), state(weighted=True)),
        (lambda s: s.sum_slots("s"), state(weighted=True), state(weighted=True, summed=True)),
        (lambda s: s.scale("x"), state(), state(scaled=True)),
        (lambda s: s.round("r"), done(), done(rounded=True)),
        (lambda s: s.trim("t", 8), done(padded_to=11, rounded=True), done(rounded=True)),
        (lambda s: s.make_partial("e", ("tp",)), state(), state(placements=PART["tp"])),
        (lambda s: s.select("c", ("ep",)), state(), state(placements=PART["ep"])),
        (lambda s: s.reduce("r", ("tp",)), state(placements=PART["tp"]), state()),
        (
            lambda s: s.reduce("r", ("tp",), scatter=True),
            state(placements=PART["tp"]),
            state(placements=(Replicate(), Replicate(), Shard(0))),
        ),
        (
            lambda s: s.gather("g", ("ep",)),
            state(placements=(Shard(0), Shard(0), Replicate())),
            state(placements=(Shard(0), Replicate(), Replicate())),
        ),
        (lambda s: s.take_shard("h", ("tp",)), state(), state(placements=(Replicate(), Replicate(), Shard(0)))),
        (lambda s: s.add("j", done()), done(), done()),
        (lambda s: s.add("j", done(placements=PART["tp"])), done(placements=PART["tp"]), done(placements=PART["tp"])),
    ],
)
def test_a_step_changes_what_it_says(step: Callable[[ValueState], ValueState], before: ValueState, after: ValueState) -> None:
    assert step(before) == after


# ---- every contradiction names the step that made the fact and the one that breaks on it


def by(start: ValueState, *steps: Callable[[ValueState], ValueState]) -> ValueState:
    for step in steps:
        start = step(start)
    return start


SHARDED = state(placements=(Replicate(), Shard(0), Replicate()))
CONTRADICTIONS = [
    ("pads twice", by(state(), lambda s: s.pad("one", 9)), lambda s: s.pad("two", 11), "one", "already padded to 9"),
    ("pads to less", state(), lambda s: s.pad("two", 7), "the input", "would cut it"),
    ("trims what is not padded", state(), lambda s: s.trim("two", 8), "the input", "no padding"),
    (
        "trims twice",
        by(state(), lambda s: s.pad("p", 9), lambda s: s.trim("one", 8)),
        lambda s: s.trim("two", 8),
        "one",
        "no padding",
    ),
    (
        "trims too much",
        by(state(), lambda s: s.transform("one", 8, 8, linear=True), lambda s: s.pad("p", 9)),
        lambda s: s.trim("two", 7),
        "one",
        "the true width is 8",
    ),
    (
        "transforms padding",
        by(state(), lambda s: s.pad("one", 9)),
        lambda s: s.transform("two", 8, 8, linear=True),
        "one",
        "9 features of which 8 are true",
    ),
    (
        "transforms another width",
        by(state(), lambda s: s.transform("one", 8, 5, linear=True)),
        lambda s: s.transform("two", 8, 8, linear=True),
        "one",
        "takes width 8, the value has 5",
    ),
    (
        "not linear on a partial sum",
        by(state(), lambda s: s.make_partial("one", ("tp",))),
        lambda s: s.transform("two", 8, 8, linear=False),
        "one",
        "partial sum over tp",
    ),
    ("norms weighted rows", by(state(), lambda s: s.weigh("one")), lambda s: s.row_norm("two"), "one", "already weighted"),
    (
        "norms a sum",
        by(state(), lambda s: s.weigh("w"), lambda s: s.sum_slots("one")),
        lambda s: s.row_norm("two"),
        "one",
        "already summed",
    ),
    ("norms padding", by(state(), lambda s: s.pad("one", 9)), lambda s: s.row_norm("two"), "one", "of which 8 are true"),
    (
        "norms partial rows",
        by(state(), lambda s: s.make_partial("one", ("tp",))),
        lambda s: s.row_norm("two"),
        "one",
        "partial sums over tp",
    ),
    ("weighs twice", by(state(), lambda s: s.weigh("one")), lambda s: s.weigh("two"), "one", "weights a second time"),
    (
        "sums twice",
        by(state(), lambda s: s.weigh("w"), lambda s: s.sum_slots("one")),
        lambda s: s.sum_slots("two"),
        "one",
        "sums the chosen experts a second time",
    ),
    ("sums without weights", state(), lambda s: s.sum_slots("two"), "the input", "have not been weighted"),
    ("scales twice", by(state(), lambda s: s.scale("one")), lambda s: s.scale("two"), "one", "factor a second time"),
    (
        "reduces twice",
        by(state(), lambda s: s.make_partial("e", ("tp",)), lambda s: s.reduce("one", ("tp",))),
        lambda s: s.reduce("two", ("tp",)),
        "one",
        r"reduces over tp a value that is Replicate\(\)",
    ),
    ("reduces what is whole", state(), lambda s: s.reduce("two", ("ep",)), "the input", "reduces over ep"),
    ("reduces other tokens", SHARDED, lambda s: s.reduce("two", ("ep",)), "the input", r"is Shard\(dim=0\)"),
    (
        "a share of a share",
        by(state(), lambda s: s.make_partial("one", ("tp",))),
        lambda s: s.make_partial("two", ("tp",)),
        "one",
        "needs the whole value on tp",
    ),
    ("a share of other tokens", SHARDED, lambda s: s.make_partial("two", ("ep",)), "the input", "needs the whole value on ep"),
    (
        "selects a share",
        by(state(), lambda s: s.make_partial("one", ("ep",))),
        lambda s: s.select("two", ("ep",)),
        "one",
        "needs the whole value on ep",
    ),
    ("rounds rows", by(state(), lambda s: s.weigh("w")), lambda s: s.round("two"), "the input", "has not been summed"),
    *(
        (f"{does} what is rounded", by(done(placements=PART["tp"]), lambda s: s.round("one")), step, "one", "rounded already")
        for does, step in {
            "scales": lambda s: s.scale("two"),
            "transforms": lambda s: s.transform("two", 8, 8, linear=True),
            "reduces": lambda s: s.reduce("two", ("tp",)),
            "adds": lambda s: s.add("two", done(placements=PART["tp"])),
        }.items()
    ),
    ("gathers what is whole", state(), lambda s: s.gather("two", ("ep",)), "the input", "gathers tokens over ep"),
    (
        "splits a partial sum",
        by(state(), lambda s: s.make_partial("one", ("ep",))),
        lambda s: s.take_shard("two", ("ep",)),
        "one",
        "takes its tokens over ep",
    ),
]


@pytest.mark.parametrize(
    ("value", "step", "first", "what"), [c[1:] for c in CONTRADICTIONS], ids=[c[0] for c in CONTRADICTIONS]
)
def test_a_contradiction_names_both_steps(
    value: ValueState, step: Callable[[ValueState], ValueState], first: str, what: str
) -> None:
    with pytest.raises(PlanError, match=what) as caught:
        step(value)
    assert (caught.value.first, caught.value.second) == (first, "two")
    assert "step 'two' after step" in str(caught.value)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("odd", "what", "first"),
    [
        (by(done(), lambda s: s.pad("maker", 9)), "padded value", "maker"),
        (done(weighted=False), "never been weighted", "the input"),
        (done(summed=False), "never been summed", "the input"),
        (done(scaled=False), "never been scaled", "the input"),
        (by(done(), lambda s: s.transform("maker", 8, 5, linear=True)), "adds widths", None),
        (by(done(), lambda s: s.make_partial("maker", ("tp",))), "over tp", "maker"),
        (by(done(), lambda s: s.make_partial("maker", ("ep",))), "over ep", "maker"),
        (done(placements=(Shard(0), Replicate(), Replicate())), "over dp", "the input"),
    ],
)
def test_only_like_values_are_added(odd: ValueState, what: str, first: str | None, swap: bool) -> None:
    one, other = (odd, done()) if swap else (done(), odd)
    with pytest.raises(PlanError, match=what) as caught:
        one.add("join", other)
    assert caught.value.second == "join"
    if first is not None:
        assert caught.value.first == first


def test_partial_sums_add_only_over_the_same_axes() -> None:
    for mine, theirs in itertools.product(itertools.product((Replicate(), Partial()), repeat=2), repeat=2):
        one, other = done(placements=(Replicate(), *mine)), done(placements=(Replicate(), *theirs))
        if mine == theirs:
            assert one.add("join", other) == one
        else:
            with pytest.raises(PlanError):
                one.add("join", other)


def test_how_a_value_came_to_be_is_no_part_of_what_it_is() -> None:
    assert by(state(), lambda s: s.scale("a")) == by(state(), lambda s: s.scale("b"))
    assert by(state(), lambda s: s.scale("a")).maker("scaled") == "a"
    assert state().maker("scaled") == "the input"


# ---- tensors


@settings(max_examples=60)
@given(
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from([(1, 1), (2, 1), (1, 2)]),
    st.integers(0, 2),
)
def test_slices_of_a_width_make_up_the_whole(width: int, size: int, parts_unit: tuple[int, int], dim: int) -> None:
    """What the ranks hold, put together in rank order, is the tensor followed by zeros; every rank holds equally much."""
    parts, unit = parts_unit
    shape = [2, 3, 2]
    shape[dim] = width * parts * unit
    whole = torch.randn(shape)
    pieces = [cut_width(whole, dim, rank, size, parts=parts, unit=unit) for rank in range(size)]
    assert len({p.shape for p in pieces}) == 1
    for block in range(parts):
        together = torch.cat([p.chunk(parts, dim)[block] for p in pieces], dim)
        assert torch.equal(together.narrow(dim, 0, width * unit), whole.chunk(parts, dim)[block])
        assert not together.narrow(dim, width * unit, together.shape[dim] - width * unit).any()
    step = pieces[0].shape[dim] // parts
    assert step % unit == 0
    assert step * size - width * unit < size * unit, "more padding than a rank's share can need"


@settings(max_examples=25)
@given(specs().filter(lambda s: s.routing.modalities == 1), STORAGES, st.integers(1, 3), st.data())
def test_a_shard_holds_its_experts_and_its_slice(spec, storage, tp, data) -> None:
    experts = make_weights(spec, 0, storage=storage).experts[0]
    chosen = data.draw(st.lists(st.integers(-1, spec.num_experts - 1), min_size=1, max_size=4))
    for rank in range(tp):
        part = experts.shard(chosen, rank, tp)
        assert part.gate_up == experts.gate_up
        assert part.num_experts == len(chosen)
        for slot, expert in enumerate(chosen):
            if expert < 0:
                assert all(not t.any() for t in part.record(slot).values()), "an empty slot holds something"
                continue
            alone = experts.shard([expert], rank, tp)
            for name, tensor in part.record(slot).items():
                assert torch.equal(tensor.nan_to_num(), alone.record(0)[name].nan_to_num())
                assert tensor.shape == alone.record(0)[name].shape
    everything = experts.shard(None, 0, 1)
    assert all(everything.tensors[n].tensor is e.tensor for n, e in experts.tensors.items()), "one rank copies nothing"


def test_the_record_of_an_expert_is_all_that_is_its_own() -> None:
    tensors = {"w13": torch.randn(3, 4, 5), "w2": torch.randn(3, 5, 2), "b2": torch.randn(3, 5), "row_norm": torch.randn(5)}
    experts = ExpertWeights.of(tensors)
    scale = ExpertTensor(torch.randn(2, 3), expert_dim=1, tp_dim=None, role="down")
    experts = ExpertWeights({**experts.tensors, "w2_scale": scale}, format="some")
    record = experts.record(2)
    assert set(record) == {"w13", "w2", "b2", "w2_scale"}
    assert torch.equal(record["w2_scale"], scale.tensor[:, 2])
    record["w13"].zero_()
    assert not tensors["w13"][2].any(), "views, so that an expert can be moved in place"


def test_experts_are_named_and_counted() -> None:
    experts = ExpertWeights.of({"w13": torch.zeros(3, 4, 5), "w2": torch.zeros(3, 5, 2), "b13": None})
    assert experts.num_experts == 3
    assert experts.get("b13") is None
    assert experts.w13.shape == (3, 4, 5)
    assert set(experts.tensors) == {"w13", "w2"}
    with pytest.raises(WeightsError, match="no expert tensor is called w1, w3"):
        ExpertWeights.of({"w3": torch.zeros(1), "w1": torch.zeros(1)})


@settings(max_examples=25)
@given(specs(), STORAGES)
def test_metadata_says_everything_but_the_numbers(spec, storage) -> None:
    weights = make_weights(spec, 0, storage=storage)
    meta = weights.meta()
    assert {n for n in meta if not n.startswith("experts.")} == set(weights.tensors)
    for index, one in enumerate(weights.experts):
        for name, entry in one.tensors.items():
            found = meta[f"experts.{index}.{name}"]
            assert found.shape == tuple(entry.tensor.shape)
            assert found.stride == tuple(entry.tensor.stride())
            assert (found.dtype, found.format, found.gate_up) == ("float32", "none", one.gate_up)


@settings(max_examples=25)
@given(specs())
def test_map_reaches_every_tensor_once_by_a_name_without_dots(spec) -> None:
    weights = make_weights(spec, 0)
    seen: list[str] = []

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        seen.append(name)
        return tensor + 1 if tensor.is_floating_point() else tensor

    changed = weights.map(change)
    assert len(seen) == len(set(seen)) == len(weights.meta())
    assert not any("." in name for name in seen)
    for name, tensor in weights.tensors.items():
        assert torch.equal(changed.tensors[name], tensor + 1 if tensor.is_floating_point() else tensor)
    assert changed.functions == weights.functions
    assert LayerWeights(changed.experts).experts[0].gate_up == weights.experts[0].gate_up
