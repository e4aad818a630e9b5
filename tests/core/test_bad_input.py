"""What cannot be run is refused with what, where and the next step; what is bad in one row stays in that row."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from tests.support.numerics import relative_error

from moerunner import (
    Custom,
    ExpertsSpec,
    ExpertWeights,
    LayerWeights,
    Layout,
    MoERunner,
    MoESpec,
    Options,
    PlanError,
    RoutingSpec,
    SharedSpec,
    SpecError,
    TopK,
    TransformSpec,
    UnsupportedError,
    WeightsError,
    fused_experts,
    resolve,
)
from moerunner.errors import DistributedError
from moerunner.ops.reference import reference

SPEC = MoESpec(
    hidden_size=16,
    num_experts=6,
    top_k=2,
    routing=RoutingSpec(score="sigmoid", selection_bias=True, renormalise="sum", eps=1e-20),
    experts=ExpertsSpec(intermediate_size=8),
    shared=SharedSpec(width=8),
    routed_scaling_factor=2.5,
    apply_routed_scale_to_output=True,
)
BACKENDS = ["eager", "grouped_mm"]


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {n: (torch.randn(shape) * 0.4).to(dtype) for n, shape in SPEC.weight_shapes().items()}


def test_missing_extra_and_misshaped_weights_are_all_listed() -> None:
    given = tensors()
    del given["gate"], given["w2"]
    given["w4"] = torch.zeros(1)
    with pytest.raises(WeightsError, match="missing gate, w2; not in the spec: w4") as caught:
        MoERunner(SPEC, given)
    assert "weight_shapes" in str(caught.value)
    with pytest.raises(WeightsError, match=r"gate has shape \[5, 16\], expected \[6, 16\]; w13 has shape \[6, 15, 16\]"):
        MoERunner(SPEC, {**tensors(), "gate": torch.zeros(5, 16), "w13": torch.zeros(6, 15, 16)})


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.zeros(3, 15), "hidden size is 16"),
        (torch.zeros(()), "hidden size is 16"),
        (torch.zeros(3, 16, dtype=torch.float64), "float64, the experts torch.float32"),
        (torch.zeros(3, 16, device="meta"), "on meta"),
    ],
)
def test_tokens_that_do_not_fit(x: torch.Tensor, match: str) -> None:
    with pytest.raises((SpecError, WeightsError), match=match):
        MoERunner(SPEC, tensors())(x)


@pytest.mark.parametrize("ids", [[[0, 6]], [[-2, 0]], [[1 << 40, 0]]])
def test_ids_out_of_range(ids: list) -> None:
    topk = TopK(torch.tensor(ids), torch.ones(1, 2))
    with pytest.raises(SpecError, match="allowed are -1 to 5"):
        MoERunner(SPEC, tensors())(torch.zeros(1, 16), topk=topk)
    w = tensors()
    with pytest.raises(SpecError, match="allowed are -1 to 5"):
        fused_experts(torch.zeros(1, 16), w["w13"], w["w2"], topk.weights, topk.ids)


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({"topk": TopK(torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2))}, "do not fit 3 tokens"),
        ({"router_logits": torch.zeros(3, 5)}, r"expected \[3, 6\]"),
        ({"router_input": torch.zeros(2, 16)}, r"expected \[3, 16\]"),
    ],
)
def test_routing_that_does_not_fit(inputs: dict, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        MoERunner(SPEC, tensors())(torch.zeros(3, 16), **inputs)


def test_what_a_rule_needs_is_asked_for() -> None:
    table = MoESpec(
        hidden_size=16,
        num_experts=6,
        top_k=2,
        routing=RoutingSpec(score="sqrtsoftplus", choose="hash"),
        experts=ExpertsSpec(intermediate_size=8),
        apply_routed_scale_to_output=False,
    )
    weights = {n: torch.randn(s) for n, s in table.weight_shapes(vocab_size=9).items()}
    weights["hash_table"] = torch.randint(6, (9, 2))
    with pytest.raises(SpecError, match="Pass input_ids"):
        MoERunner(table, weights)(torch.zeros(1, 16))
    outside = MoESpec(
        hidden_size=16,
        num_experts=6,
        top_k=2,
        routing=RoutingSpec(score="external"),
        experts=ExpertsSpec(intermediate_size=8),
        apply_routed_scale_to_output=False,
    )
    with pytest.raises(SpecError, match="Pass topk"):
        MoERunner(outside, {n: torch.randn(s) for n, s in outside.weight_shapes().items()})(torch.zeros(1, 16))


def test_a_factor_cannot_come_twice_with_the_caller() -> None:
    topk = TopK(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2), scaled=True)
    with pytest.raises(PlanError, match="second time") as caught:
        MoERunner(SPEC, tensors())(torch.zeros(1, 16), topk=topk)
    assert caught.value.first.startswith("topk")
    assert caught.value.second == "scale"


def test_options_and_layouts_that_cannot_be() -> None:
    with pytest.raises(SpecError, match=r"Options\.dtype"):
        Options(dtype="int8")
    with pytest.raises(SpecError, match=r"Options\.output"):
        Options(output="sum")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"no backend is called 'cutlass'.*Known: eager"):
        MoERunner(SPEC, tensors(), options=Options(backend="cutlass"))
    with pytest.raises(UnsupportedError, match="not batch invariant"):
        MoERunner(SPEC, tensors(), options=Options(backend="grouped_mm", batch_invariant=True))
    with pytest.raises(DistributedError, match=r"Layout\.bind"):
        MoERunner(SPEC, tensors(), Layout(tp=2))
    for bad in ({"ep": 0}, {"tp": 1.5}, {"tokens": "some"}, {"shared": "no"}, {"redundant": -1}, {"timeout": 0}):
        with pytest.raises(SpecError, match=f"Layout.{next(iter(bad))}"):
            Layout(**bad)
    with pytest.raises(SpecError, match=r"experts without a place: \[5\]"):
        Layout(ep=2, placement=((0, 1, 2), (3, 4))).slots(6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_bad_row_stays_alone(backend: str, poison: float) -> None:
    runner = MoERunner(SPEC, tensors(), options=Options(backend=backend))
    x = torch.randn(9, 16)
    clean = runner(x)
    bad = x.clone()
    bad[4] = poison
    y = runner(bad)
    others = [t for t in range(9) if t != 4]
    assert not torch.isfinite(y[4]).any()
    assert relative_error(y[others], clean[others]) <= 2e-6
    topk = runner.route(x)
    replayed, replayed_bad = runner(x, topk=topk), runner(bad, topk=topk)  # as many rows per expert as before
    assert torch.equal(replayed[others], replayed_bad[others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_slot_is_not_read(backend: str) -> None:
    weights = LayerWeights.of(SPEC, tensors())
    runner = MoERunner(SPEC, weights, options=Options(backend=backend))
    x = torch.randn(4, 16)
    topk = TopK(
        torch.tensor([[0, -1], [-1, -1], [2, 3], [-1, 5]]),
        torch.tensor([[0.5, torch.nan], [torch.nan] * 2, [1, 1], [torch.inf, 2]]),
    )
    clean = TopK(topk.ids, torch.nan_to_num(topk.weights, nan=7.0, posinf=7.0))
    assert relative_error(runner(x, topk=topk), reference(SPEC, weights, x, topk=clean)) <= 2e-6


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (16,), (1, 16), (2, 3, 16), (1, 2, 3, 16)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_leading_shape(shape: tuple[int, ...], backend: str) -> None:
    weights = LayerWeights.of(SPEC, tensors())
    x = torch.randn(shape)
    before = x.clone()
    y = MoERunner(SPEC, weights, options=Options(backend=backend))(x)
    assert y.shape == x.shape
    assert torch.equal(x, before)
    if y.numel():
        assert relative_error(y, reference(SPEC, weights, x)) <= 2e-6


def test_the_runner_is_a_module() -> None:
    given = {n: torch.nn.Parameter(t) for n, t in tensors().items()}
    runner, x = MoERunner(SPEC, given), torch.randn(5, 16)
    y = runner(x)
    assert {n for n, _ in runner.named_parameters()} == set(SPEC.weight_shapes())
    again = MoERunner(SPEC, tensors())
    again.load_state_dict(runner.state_dict())
    assert relative_error(again(x), y) <= 2e-6  # by other kernels: nothing of it is trained
    twin = copy.deepcopy(runner)
    assert torch.equal(pickle.loads(pickle.dumps(twin))(x), y)
    with torch.no_grad():
        given["w2"].mul_(0)
    assert not torch.equal(runner(x), y)
    assert torch.equal(twin(x), y)
    half = runner.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(WeightsError, match=r"tokens are torch\.float32, the experts torch\.bfloat16"):
        half(x)


def test_weights_that_live_elsewhere_are_read_at_each_call() -> None:
    home = {"now": LayerWeights.of(SPEC, tensors())}
    runner, x = MoERunner(SPEC, lambda: home["now"]), torch.randn(3, 16)
    assert not list(runner.parameters())
    for _ in range(2):
        assert relative_error(runner(x), reference(SPEC, home["now"], x)) <= 2e-6
        home["now"] = LayerWeights.of(SPEC, tensors())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"w13": torch.zeros(6, 16, 15)}, "w13 has shape"),
        ({"w2": torch.zeros(6, 16)}, "3 dimensions"),
        ({"x": torch.zeros(3, 15)}, "x has width 15"),
        ({"x": torch.zeros(3, 16, dtype=torch.float64)}, "x is torch.float64"),
        ({"topk_ids": torch.zeros(2, 2, dtype=torch.int64)}, "do not fit x"),
        ({"topk_ids": torch.zeros(3, 2)}, "whole numbers"),
        ({"b2": torch.zeros(6, 15)}, r"b2 has shape \[6, 15\]"),
        ({"activation": "tanh"}, r"ActivationSpec\.kind"),
        ({"limit": -1.0}, r"ActivationSpec\.limit"),
        ({"backend": "none"}, "no backend is called"),
        ({"gate_up": "none"}, "w13 has shape"),
    ],
)
def test_the_function_refuses_what_does_not_fit(change: dict, match: str) -> None:
    w = tensors()
    given = {
        "x": torch.zeros(3, 16),
        "w13": w["w13"],
        "w2": w["w2"],
        "topk_weights": torch.ones(3, 2),
        "topk_ids": torch.zeros(3, 2, dtype=torch.int64),
    }
    with pytest.raises((WeightsError, SpecError, UnsupportedError), match=match):
        fused_experts(**{**given, **change})


def test_experts_with_names_that_are_none() -> None:
    with pytest.raises(WeightsError, match="no expert tensor is called w3"):
        ExpertWeights.of({"w3": torch.zeros(1)})


# ---- what used to pass silently, or ended in an IndexError far from its cause


def simple(**changes) -> MoESpec:
    base = {
        "hidden_size": 16,
        "num_experts": 6,
        "top_k": 2,
        "routing": RoutingSpec(),
        "experts": ExpertsSpec(intermediate_size=8),
        "apply_routed_scale_to_output": False,
    }
    return MoESpec(**{**base, **changes})


def weights_for(spec: MoESpec) -> dict:
    given = {n: torch.randn(s) for n, s in spec.weight_shapes(vocab_size=9).items()}
    if "hash_table" in given:
        given["hash_table"] = torch.randint(spec.num_experts, (9, spec.top_k))
    return given


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gate": None}, "gate is a NoneType, expected a tensor"),
        ({"gate": [[0.0] * 16] * 6}, "gate is a list, expected a tensor"),
        ({"w13": None}, "w13 is a NoneType"),
        ({"gate": lambda x: x}, "missing gate; function gate is not in the spec"),
        ({"w2": torch.zeros(6, 24, 8)}, r"w13 has shape \[6, 16, 16\], expected \[6, 16, 24\]"),
        ({"w13": torch.zeros(6, 16, 24)}, r"w13 has shape \[6, 16, 24\], expected \[6, 16, 16\]"),
        ({"w2": torch.zeros(6, 12, 8)}, r"w2 has shape \[6, 12, 8\], expected \[6, 16, 8\]"),
        ({"w2": torch.zeros(6, 16)}, r"w2 has shape \[6, 16\], expected \[6, 16, 8\]"),
        ({"w13": torch.zeros(6, 16, 16, dtype=torch.bfloat16)}, "w13 is torch.bfloat16, w2 is torch.float32"),
        ({"gate": torch.zeros(6, 16, dtype=torch.int64)}, "gate is torch.int64, expected floating point"),
    ],
)
def test_weights_that_are_no_weights(change: dict, match: str) -> None:
    spec = simple()
    with pytest.raises(WeightsError, match=match):
        MoERunner(spec, {**weights_for(spec), **change})


def test_everything_that_is_wrong_is_in_one_message() -> None:
    spec = simple(final_transform=TransformSpec((Custom(in_features=16, out_features=16, linear=False),)))
    given = {"gate": torch.zeros(5, 16), "w13": torch.zeros(6, 16, 16), "w4": torch.zeros(1), "final_transform.1": abs}
    with pytest.raises(WeightsError) as caught:
        MoERunner(spec, given)
    for part in ("missing w2", "not in the spec: w4", "gate has shape [5, 16]", "function final_transform.0 is missing"):
        assert part in str(caught.value)
    assert "function final_transform.1 is not in the spec" in str(caught.value)


def test_expert_sets_must_be_alike_and_as_many_as_the_spec_says() -> None:
    spec = simple(routing=RoutingSpec(modalities=2))
    given = weights_for(spec)
    sets = [ExpertWeights.of({n: given.pop(f"{n}.{i}") for n in ("w13", "w2")}) for i in range(2)]
    LayerWeights.of(spec, {**given, "experts": sets})
    with pytest.raises(WeightsError, match="1 expert sets given, the spec has 2"):
        LayerWeights.of(spec, {**given, "experts": sets[0]})
    sets[1] = dataclasses.replace(sets[1], gate_up="interleaved")
    with pytest.raises(WeightsError, match="differ in gate_up"):
        LayerWeights.of(spec, {**given, "experts": sets})


@pytest.mark.parametrize(
    ("topk", "match"),
    [
        (TopK(torch.zeros(3, 2), torch.ones(3, 2)), "are torch.float32, expected whole numbers"),
        (TopK(torch.zeros(3, 2, dtype=torch.bool), torch.ones(3, 2)), "are torch.bool, expected whole numbers"),
        (TopK(torch.zeros(3, 2, dtype=torch.int64), torch.ones(2, 3)), "do not fit 3 tokens"),
        (TopK(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)), "do not fit 3 tokens"),
        (TopK(torch.zeros(3, dtype=torch.int64), torch.ones(3)), "do not fit 3 tokens"),
        (TopK(torch.zeros((), dtype=torch.int64), torch.ones(())), "do not fit 3 tokens"),
        (TopK(torch.zeros(3, 0, dtype=torch.int64), torch.ones(3, 0)), "do not fit 3 tokens"),
    ],
)
def test_routing_that_is_no_routing(topk: TopK, match: str) -> None:
    spec = simple()
    with pytest.raises(SpecError, match=match):
        MoERunner(spec, weights_for(spec))(torch.zeros(3, 16), topk=topk)


@pytest.mark.parametrize("shape", [(3, 1), (1, 2), (3, 3), (2, 3)])
def test_weights_of_shared_experts_fit_the_tokens(shape: tuple[int, int]) -> None:
    spec = simple(routing=RoutingSpec(score="sigmoid"), shared=SharedSpec(width=4, count=2, gate="router"))
    runner, ids = MoERunner(spec, weights_for(spec)), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(SpecError, match=r"expected \[3, 2\]"):
        runner(torch.zeros(3, 16), topk=TopK(ids, torch.ones(3, 2), shared_weights=torch.ones(shape)))
    with pytest.raises(SpecError, match="Pass shared_weights"):
        runner(torch.zeros(3, 16), topk=TopK(ids, torch.ones(3, 2)))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (torch.tensor([0, 9, 1]), "input_ids: ids reach from 0 to 9, allowed are 0 to 8"),
        (torch.tensor([0, -1, 1]), "input_ids: ids reach from -1 to 1"),
        (torch.zeros(3), "input_ids: are torch.float32"),
        (torch.zeros(2, dtype=torch.int64), "input_ids: has 2 entries for 3 tokens"),
    ],
)
def test_token_ids_that_the_table_does_not_have(values: torch.Tensor, match: str) -> None:
    spec = simple(routing=RoutingSpec(choose="hash"))
    with pytest.raises(SpecError, match=match):
        MoERunner(spec, weights_for(spec))(torch.zeros(3, 16), input_ids=values)


@pytest.mark.parametrize("value", [-1, 6])
def test_a_table_of_experts_that_do_not_exist(value: int) -> None:
    spec = simple(routing=RoutingSpec(choose="hash"))
    table = torch.zeros(9, 2, dtype=torch.int64)
    table[4, 1] = value
    with pytest.raises(WeightsError, match="hash_table holds ids from"):
        MoERunner(spec, {**weights_for(spec), "hash_table": table})
    with pytest.raises(WeightsError, match=r"hash_table is torch.float32, expected whole numbers"):
        MoERunner(spec, {**weights_for(spec), "hash_table": torch.zeros(9, 2)})


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (None, "Pass token_types"),
        (torch.tensor([0, 2, 1]), "token_types: ids reach from 0 to 2, allowed are 0 to 1"),
        (torch.tensor([0, -1, 1]), "token_types: ids reach from -1"),
        (torch.zeros(3), "token_types: are torch.float32"),
        (torch.zeros(4, dtype=torch.int64), "token_types: has 4 entries for 3 tokens"),
    ],
)
def test_token_types_that_no_set_is_for(values: torch.Tensor | None, match: str) -> None:
    spec = simple(routing=RoutingSpec(modalities=2))
    with pytest.raises(SpecError, match=match):
        MoERunner(spec, weights_for(spec))(torch.zeros(3, 16), token_types=values)


@pytest.mark.parametrize(
    ("placement", "match"),
    [
        ([[0, 1, 2], [3, 4, 5]], "tuple of experts for each rank"),
        ((0, 1), "tuple of experts for each rank"),
        ((("a",), ("b",)), "tuple of experts for each rank"),
        ("random", "'linear', 'round_robin'"),
        (((0, 1, 2, 3, 4, 5),), "lists 1 ranks, ep is 2"),
    ],
)
def test_placements_that_are_none(placement: object, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        Layout(ep=2, placement=placement)  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), "1", True, None])
def test_a_timeout_is_a_time(timeout: object) -> None:
    with pytest.raises(SpecError, match=r"Layout\.timeout"):
        Layout(timeout=timeout)  # type: ignore[arg-type]


def test_a_plan_needs_both_products() -> None:
    spec = simple()
    meta = LayerWeights.of(spec, weights_for(spec)).meta()
    for name in ("experts.0.w13", "experts.0.w2"):
        with pytest.raises(WeightsError, match=r"experts\.0\.w13 and experts\.0\.w2"):
            resolve(spec, None, {n: m for n, m in meta.items() if n != name}, "cpu")
    with pytest.raises(UnsupportedError, match="not on tpu"):
        resolve(spec, None, meta, "tpu")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("backend", 3),
        ("backend", None),
        ("grad", "yes"),
        ("grad", 1),
        ("deterministic", None),
        ("batch_invariant", 1),
        ("capturable", "no"),
        ("dtype", torch.int8),
        ("dtype", 32),
        ("reduce_dtype", "float8_e4m3fn"),
        ("output", None),
        ("dispatch", "broadcast"),
    ],
)
def test_options_are_of_their_type(field: str, value: object) -> None:
    with pytest.raises(SpecError, match=rf"Options\.{field}"):
        Options(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, "torch.bfloat16", "bfloat16"])
def test_a_dtype_has_one_name(dtype: object) -> None:
    assert Options(dtype=dtype) == Options(dtype="bfloat16")
