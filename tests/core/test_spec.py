"""Specs: impossible values are refused with the field named, and JSON loses nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.strategies import specs

from moerunner import (
    ActivationSpec,
    Custom,
    ExpertsSpec,
    GroupSpec,
    Linear,
    MoESpec,
    RMSNorm,
    RoutingSpec,
    SharedSpec,
    SpecError,
    TransformSpec,
)

BASE: dict[str, Any] = {
    "hidden_size": 16,
    "num_experts": 8,
    "top_k": 2,
    "routing": RoutingSpec(),
    "experts": ExpertsSpec(intermediate_size=8),
    "apply_routed_scale_to_output": False,
}
NORM8 = RMSNorm(features=8)
NOT_COUNTS = [0, -1, 1.5, True, "8", None]
NOT_NUMBERS = [math.nan, math.inf, -math.inf, "1", True, 10**400, [1.0]]


def layer(**changes: Any) -> MoESpec:
    return MoESpec(**{**BASE, **changes})


def routing(**changes: Any) -> MoESpec:
    return layer(routing=RoutingSpec(**changes))


@given(spec=specs())
@settings(max_examples=60, deadline=None)
def test_json_round_trip(spec: MoESpec) -> None:
    assert MoESpec.from_json(spec.to_json()) == spec
    assert MoESpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("value", NOT_COUNTS)
@pytest.mark.parametrize("name", ["hidden_size", "num_experts", "top_k"])
def test_sizes_are_counts(name: str, value: object) -> None:
    with pytest.raises(SpecError, match=f"MoESpec.{name}"):
        layer(**{name: value})


@pytest.mark.parametrize("value", NOT_COUNTS)
@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda v: ExpertsSpec(intermediate_size=v), "intermediate_size"),
        (lambda v: ExpertsSpec(intermediate_size=(8, v)), "intermediate_size"),
        (lambda v: SharedSpec(width=v), "width"),
        (lambda v: SharedSpec(width=4, count=v), "count"),
        (lambda v: GroupSpec(count=v, kept=1), "count"),
        (lambda v: GroupSpec(count=4, kept=v), "kept"),
        (lambda v: RoutingSpec(modalities=v), "modalities"),
        (lambda v: Linear(in_features=v, out_features=4), "in_features"),
        (lambda v: Custom(in_features=4, out_features=v, linear=True), "out_features"),
        (lambda v: RMSNorm(features=v), "features"),
    ],
)
def test_counts_of_parts(build: Any, field: str, value: object) -> None:
    with pytest.raises(SpecError, match=field):
        build(value)


REQUIRED_NUMBERS = {
    "routed_scaling_factor": lambda: layer(routed_scaling_factor=None),
    "RoutingSpec.eps": lambda: RoutingSpec(eps=None),
    "logit_scale": lambda: RoutingSpec(logit_scale=None),
    "RoutingSpec.p": lambda: RoutingSpec(p=None),
    "jitter": lambda: RoutingSpec(jitter=None),
    "RMSNorm.eps": lambda: RMSNorm(features=4, eps=None),
}


@pytest.mark.parametrize("field", REQUIRED_NUMBERS)
def test_a_number_with_a_default_is_not_none(field: str) -> None:
    with pytest.raises(SpecError, match=field):
        REQUIRED_NUMBERS[field]()


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda v: layer(routed_scaling_factor=v), "routed_scaling_factor"),
        (lambda v: RoutingSpec(renormalise="sum", eps=v), "eps"),
        (lambda v: RoutingSpec(logit_scale=v), "logit_scale"),
        (lambda v: RoutingSpec(logit_softcap=v), "logit_softcap"),
        (lambda v: RoutingSpec(renormalise="p_norm", p=v), "p"),
        (lambda v: RoutingSpec(jitter=v), "jitter"),
        (lambda v: ActivationSpec(limit=v), "limit"),
        (lambda v: ActivationSpec(alpha=v), "alpha"),
        (lambda v: ActivationSpec(beta=v), "beta"),
        (lambda v: ActivationSpec(gate_softcap=v), "gate_softcap"),
        (lambda v: ActivationSpec(up_softcap=v), "up_softcap"),
        (lambda v: RMSNorm(features=4, eps=v), "eps"),
    ],
)
def test_numbers_are_finite(build: Any, field: str, value: object) -> None:
    with pytest.raises(SpecError, match=field):
        build(value)


@pytest.mark.parametrize("value", [1, 0, "yes", None])
@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda v: layer(apply_routed_scale_to_output=v), "apply_routed_scale_to_output"),
        (lambda v: layer(output_bias=v), "output_bias"),
        (lambda v: RoutingSpec(selection_bias=v), "selection_bias"),
        (lambda v: RoutingSpec(logit_bias=v), "logit_bias"),
        (lambda v: RoutingSpec(per_expert_scale=v), "per_expert_scale"),
        (lambda v: RoutingSpec(global_scale=v), "global_scale"),
        (lambda v: ActivationSpec(limit=1.0, clamp_after=v), "clamp_after"),
        (lambda v: ExpertsSpec(intermediate_size=4, gated=v), "gated"),
        (lambda v: ExpertsSpec(intermediate_size=4, bias=v), "bias"),
        (lambda v: SharedSpec(width=4, gated=v), "gated"),
        (lambda v: Linear(in_features=4, out_features=4, bias=v), "bias"),
        (lambda v: Custom(in_features=4, out_features=4, linear=v), "linear"),
        (lambda v: RMSNorm(features=4, weight=v), "weight"),
        (lambda v: RMSNorm(features=4, centred=v), "centred"),
        (lambda v: RMSNorm(features=4, weight_first=v), "weight_first"),
    ],
)
def test_flags_are_true_or_false(build: Any, field: str, value: object) -> None:
    with pytest.raises(SpecError, match=field):
        build(value)


@pytest.mark.parametrize("value", ["other", None, 3, ""])
@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda v: RoutingSpec(score=v), "score"),
        (lambda v: RoutingSpec(choose=v), "choose"),
        (lambda v: RoutingSpec(renormalise=v), "renormalise"),
        (lambda v: RoutingSpec(weights_on=v), "weights_on"),
        (lambda v: RoutingSpec(logits_dtype=v), "logits_dtype"),
        (lambda v: ActivationSpec(kind=v), "kind"),
        (lambda v: GroupSpec(count=2, kept=1, score=v), "score"),
        (lambda v: GroupSpec(count=2, kept=1, fill=v), "fill"),
        (lambda v: SharedSpec(width=4, gate=v), "gate"),
        (lambda v: layer(join=v), "join"),
    ],
)
def test_names_are_of_a_list(build: Any, field: str, value: object) -> None:
    with pytest.raises(SpecError, match=f"{field}: must be one of"):
        build(value)


IMPOSSIBLE = {
    "more chosen than there are": (lambda: layer(top_k=9), "top_k"),
    "groups do not divide": (lambda: routing(groups=GroupSpec(count=3, kept=1)), "GroupSpec.count"),
    "more groups kept than there are": (lambda: GroupSpec(count=2, kept=3), "GroupSpec.kept"),
    "kept groups hold too few": (
        lambda: layer(top_k=4, routing=RoutingSpec(groups=GroupSpec(count=4, kept=1))),
        "GroupSpec.kept",
    ),
    "two best of groups of one": (lambda: layer(top_k=1, routing=RoutingSpec(groups=GroupSpec(count=8, kept=4))), "top2_sum"),
    "factor of nothing": (lambda: layer(routed_scaling_factor=0.0), "routed_scaling_factor"),
    "negative number of zero experts": (lambda: layer(zero_experts=-1), "zero_experts"),
    "average of one": (lambda: layer(join="average"), "join"),
    "chosen logits chosen by score": (lambda: RoutingSpec(score="softmax_topk"), "choose"),
    "max without a floor": (lambda: RoutingSpec(renormalise="max_sum"), "eps"),
    "eps that nothing reads": (lambda: RoutingSpec(eps=1e-3), "eps"),
    "bias beside a table": (lambda: RoutingSpec(choose="hash", selection_bias=True), "selection_bias"),
    "groups beside a table": (lambda: RoutingSpec(choose="hash", groups=GroupSpec(count=2, kept=1)), "groups"),
    "sparsemixer renormalised": (lambda: RoutingSpec(score="sparsemixer", renormalise="sum"), "renormalise"),
    "sparsemixer of three": (lambda: layer(top_k=3, routing=RoutingSpec(score="sparsemixer")), "top_k"),
    "external with groups": (lambda: RoutingSpec(score="external", groups=GroupSpec(count=2, kept=1)), "groups"),
    "sets that do not divide": (lambda: layer(num_experts=7, routing=RoutingSpec(modalities=2)), "num_experts"),
    "widths for other sets": (lambda: layer(experts=ExpertsSpec(intermediate_size=(8, 4))), "intermediate_size"),
    "sets and zero experts": (lambda: layer(routing=RoutingSpec(modalities=2), zero_experts=2), "zero_experts"),
    "sets and groups": (lambda: RoutingSpec(modalities=2, groups=GroupSpec(count=2, kept=1)), "modalities"),
    "input weights and a bias": (
        lambda: layer(routing=RoutingSpec(weights_on="input"), experts=ExpertsSpec(intermediate_size=4, bias=True)),
        "weights_on",
    ),
    "shared by router of softmax": (lambda: layer(shared=SharedSpec(width=4, gate="router")), "SharedSpec.gate"),
    "factor on output, shared by router": (
        lambda: layer(
            routing=RoutingSpec(score="sigmoid"), shared=SharedSpec(width=4, gate="router"), apply_routed_scale_to_output=True
        ),
        "apply_routed_scale_to_output",
    ),
    "alpha of relu": (lambda: ActivationSpec(kind="relu", alpha=1.0), "alpha"),
    "soft-cap of gelu": (lambda: ActivationSpec(kind="gelu", gate_softcap=2.0), "gate_softcap"),
    "clamp after no limit": (lambda: ActivationSpec(clamp_after=True), "clamp_after"),
    "beta without a gate": (
        lambda: ExpertsSpec(intermediate_size=4, gated=False, activation=ActivationSpec(beta=1.0)),
        "activation",
    ),
    "one more than no weight": (lambda: RMSNorm(features=4, weight=False, centred=True), "weight"),
    "no weight first": (lambda: RMSNorm(features=4, weight=False, weight_first=True), "weight"),
    "an empty transform": (lambda: TransformSpec(()), "ops"),
    "a broken chain": (lambda: TransformSpec((Linear(in_features=16, out_features=8), RMSNorm(features=16))), "ops"),
    "latent without a way back": (
        lambda: layer(input_transform=TransformSpec((Linear(in_features=16, out_features=8),))),
        "output_transform",
    ),
    "transform of another width": (lambda: layer(input_transform=TransformSpec((NORM8,))), "input_transform"),
    "final transform that narrows": (
        lambda: layer(final_transform=TransformSpec((Linear(in_features=16, out_features=8),))),
        "final_transform",
    ),
    "row norm of another width": (lambda: layer(experts=ExpertsSpec(intermediate_size=8, row_norm=NORM8)), "row_norm"),
    "gate input of another width": (
        lambda: routing(input_transform=TransformSpec((Linear(in_features=16, out_features=8),))),
        "input_transform",
    ),
    "groups as a dict": (lambda: RoutingSpec(groups={"count": 2, "kept": 1}), "RoutingSpec.groups"),
    "a gate transform that is none": (lambda: RoutingSpec(input_transform="norm"), "RoutingSpec.input_transform"),
    "shared experts as a dict": (lambda: layer(shared={"width": 4}), "MoESpec.shared"),
    "experts as a dict": (lambda: layer(experts={"intermediate_size": 4}), "MoESpec.experts"),
    "an activation as a name": (lambda: ExpertsSpec(intermediate_size=4, activation="silu"), "ExpertsSpec.activation"),
    "a shared activation as a dict": (lambda: SharedSpec(width=4, activation={}), "SharedSpec.activation"),
    "a row norm as a number": (lambda: ExpertsSpec(intermediate_size=4, row_norm=16), "ExpertsSpec.row_norm"),
    "an operation as a name": (lambda: TransformSpec(("linear",)), "TransformSpec.ops"),
    "operations as dicts": (lambda: TransformSpec(({}, {})), "TransformSpec.ops"),
    "operations as a list": (lambda: TransformSpec([NORM8]), "TransformSpec.ops"),
    "a routing that is none": (lambda: layer(routing="softmax"), "routing"),
    "a transform that is none": (lambda: layer(final_transform=RMSNorm(features=16)), "final_transform"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_specs_are_refused(name: str) -> None:
    build, field = IMPOSSIBLE[name]
    with pytest.raises(SpecError, match=field):
        build()


def test_scale_place_has_no_default() -> None:
    with pytest.raises(TypeError, match="apply_routed_scale_to_output"):
        MoESpec(**{k: v for k, v in BASE.items() if k != "apply_routed_scale_to_output"})


def test_specs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer().top_k = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not JSON"),
        ("[]", "expects an object"),
        ('{"hidden_size": 16}', "missing"),
        ('{"version": 99}', "version"),
        (json.dumps({**layer().to_dict(), "version": True}), "version"),
        ("[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (None, "not JSON"),
        ('{"top_k": ' + "1" * 5000 + "}", "MoESpec"),
        (json.dumps({**layer().to_dict(), "routed_scaling_factor": 10**400}), "routed_scaling_factor"),
        (json.dumps({**layer().to_dict(), "routed_scaling_factor": None}), "routed_scaling_factor"),
        (json.dumps({**layer().to_dict(), "top_p": 1}), "no field top_p"),
        (json.dumps({**layer().to_dict(), "routing": {"scores": "softmax"}}), "no field scores"),
        (json.dumps({**layer().to_dict(), "routing": 3}), "expects an object"),
        (json.dumps({**layer().to_dict(), "final_transform": {"ops": [{"op": "Tanh"}]}}), "Tanh"),
        (json.dumps({**layer().to_dict(), "final_transform": {"ops": 3}}), "expects a list"),
    ],
)
def test_bad_json_is_refused(text: str, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        MoESpec.from_json(text)


@given(spec=specs())
@settings(max_examples=60, deadline=None)
def test_mutated_json_is_read_or_refused(spec: MoESpec) -> None:
    draw = random.Random(zlib.crc32(spec.to_json().encode()))
    junk = [None, -1, 0, 1.5, "x", [], {}, True, [1, "a"], {"op": "Linear"}, math.nan]

    def mutate(value: Any) -> Any:
        if draw.random() < 0.05:
            return draw.choice(junk)
        if isinstance(value, dict):
            kept = {k: mutate(v) for k, v in value.items() if draw.random() > 0.02}
            return {**kept, "extra": 1} if draw.random() < 0.02 else kept
        return [mutate(v) for v in value] if isinstance(value, list) else value

    for _ in range(20):
        try:
            read = MoESpec.from_dict(mutate(spec.to_dict()))
        except SpecError:
            continue
        assert MoESpec.from_json(read.to_json()) == read


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.just(10**400),
    st.floats(),
    st.sampled_from(["", "silu", "sum", "-inf"]),
)
KEYS = st.sampled_from(["op", "kind", "eps", "ops"])
ANY_JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=4
)


@settings(max_examples=150)
@given(specs(), st.data())
def test_any_value_in_any_place_is_read_or_refused(spec: MoESpec, data: st.DataObject) -> None:
    """One value somewhere in the tree becomes arbitrary JSON, or one key is renamed or lost."""
    tree = spec.to_dict()
    place: Any = tree
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            break
        place = inner
    how = data.draw(st.sampled_from(["replace", "replace", "rename", "lose"]))
    if how == "replace":
        place[key] = data.draw(ANY_JSON)
    else:
        value = place.pop(key)
        if how == "rename" and isinstance(place, dict):
            place[key + "s"] = value
    try:
        read = MoESpec.from_json(json.dumps(tree))
    except SpecError as refused:
        where = refused.where
    else:
        where = "MoESpec"
        assert MoESpec.from_json(read.to_json()) == read
    assert where


@settings(max_examples=60)
@given(specs(), st.data())
def test_damaged_text_is_read_or_refused(spec: MoESpec, data: st.DataObject) -> None:
    text = spec.to_json()
    start = data.draw(st.integers(0, len(text)))
    stop = min(len(text), start + data.draw(st.integers(0, 30)))
    damaged = text[:start] + data.draw(st.text(max_size=4)) + text[stop:]
    try:
        MoESpec.from_json(damaged)
    except SpecError:
        return


def test_shapes_of_a_latent_layer() -> None:
    spec = layer(
        experts=ExpertsSpec(intermediate_size=6, gated=False, activation=ActivationSpec(kind="relu2")),
        shared=SharedSpec(width=5, count=2),
        input_transform=TransformSpec((Linear(in_features=16, out_features=8), NORM8)),
        output_transform=TransformSpec((Linear(in_features=8, out_features=16, bias=True),)),
    )
    assert spec.weight_shapes() == {
        "gate": (8, 16),
        "w13": (8, 6, 8),
        "w2": (8, 8, 6),
        "shared_w13": (20, 16),
        "shared_w2": (16, 10),
        "input_transform.0.weight": (8, 16),
        "input_transform.1.weight": (8,),
        "output_transform.0.weight": (16, 8),
        "output_transform.0.bias": (16,),
    }
