"""Patched models compute what Transformers computes, and what the float64 oracle says."""

import copy

import pytest
import torch
from tiny import CASES, FIRST, ONE_PER_FAMILY, SLOW, blocks, build, prompt, relative, run_and_watch

from moerunner.models import patch, runners, unpatch
from moerunner.ops.reference import reference
from moerunner.ops.route import gate_logits
from moerunner.values import TopK

slow = pytest.mark.slow
EVERY = [pytest.param(case, marks=slow) if case in SLOW else case for case in CASES]
GRADIENTS = [*ONE_PER_FAMILY, *FIRST.values()]
RUNS = [*ONE_PER_FAMILY, *(pytest.param(case, marks=slow) for case in FIRST.values())]


@pytest.fixture(params=EVERY)
def case(request):
    return request.param


def test_float32_logits_equal_those_of_transformers(case):
    model, ids = build(case), prompt()
    expected, _ = run_and_watch(model, ids)
    report = patch(model)
    assert [r.name for r in report.replaced] == list(blocks(model))
    assert not report.skipped
    assert not any(r.copied_bytes for r in report.replaced)
    with torch.no_grad():
        assert relative(model(ids).logits, expected) <= 1e-5


def test_float32_blocks_equal_transformers_and_the_oracle_on_the_same_input(case):
    model = build(case)
    _, seen = run_and_watch(model, prompt())
    patch(model)
    for name, runner in runners(model).items():
        was = seen[name]
        with torch.no_grad():
            y = blocks(model)[name](was.x)
            oracle = reference(runner.spec, runner.layer_weights(), was.x)
        assert y.shape == was.y.shape
        assert relative(y, was.y) <= 2e-6, name
        assert relative(y, oracle) <= 2e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.rotating(3)
def test_half_precision_is_at_most_twice_as_far_from_the_oracle_as_transformers(case, dtype):
    model = build(case, dtype=dtype)
    _, seen = run_and_watch(model, prompt())
    patch(model)
    for name, runner in runners(model).items():
        was = seen[name]
        _, weights, ids = was.routed
        topk = TopK(ids, weights.float(), scaled=not runner.spec.apply_routed_scale_to_output)
        with torch.no_grad():
            y = runner(was.x, topk=topk)
            oracle = reference(runner.spec, runner.layer_weights(), was.x, topk=topk)
        assert y.dtype == dtype
        assert relative(y, oracle) <= 2 * relative(was.y, oracle), name


def test_the_gate_rounds_where_transformers_rounds(case):
    """In bfloat16 a product in another precision picks other experts: the logits must be the same numbers."""
    model = build(case, dtype=torch.bfloat16)
    _, seen = run_and_watch(model, prompt())
    patch(model)
    for name, runner in runners(model).items():
        x, logits = seen[name].x.flatten(0, 1), seen[name].routed[0]
        with torch.no_grad():
            ours = gate_logits(x, runner.layer_weights().tensors["gate"], None, runner.spec.routing)
        assert relative(ours, logits) <= 1e-6, name


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_of_every_parameter_equal_those_of_transformers(case):
    """As near as Transformers' two ways to run the experts are to each other: where terms cancel that is 2e-5, not 1e-6."""
    plain = build(case).train()
    patched, looped = copy.deepcopy(plain), copy.deepcopy(plain)
    patch(patched)
    looped.set_experts_implementation("eager")
    losses, gradients = [], []
    for model in (plain, patched, looped):
        loss = model(prompt()).logits.square().mean()
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert relative(losses[1], losses[0]) <= 1e-6
    wanted, got, other = gradients
    for name in wanted:
        assert (got[name] is None) == (wanted[name] is None), name
        if wanted[name] is not None:
            assert relative(got[name], wanted[name]) <= 5e-6 + 4 * relative(other[name], wanted[name]), name


@pytest.mark.parametrize("case", RUNS)
def test_greedy_generation_gives_the_same_tokens(case):
    model = build(case)
    wanted = model.generate(prompt(1, 8), max_new_tokens=12, do_sample=False)
    patch(model)
    got = model.generate(prompt(1, 8), max_new_tokens=12, do_sample=False)
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("case", RUNS)
def test_one_token_alone_and_no_token_at_all(case):
    model = build(case)
    patch(model)
    for block in blocks(model).values():
        x = torch.randn(1, 1, model.config.hidden_size)
        y = block(x)
        assert block(torch.cat([x, x], 1)).shape == (1, 2, model.config.hidden_size)
        unpatch(model)
        assert relative(y, block(x)) <= 2e-6
        patch(model)
        assert block(x[:, :0]).shape == (1, 0, model.config.hidden_size)
