"""Every family of the table, in configurations that switch its options, against Transformers and the float64 oracle.

One case of each family and a tenth of the others, another one in each run, are in the fast tier; `make test-all` has them all.
"""

import copy
import importlib
import os
import statistics
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import relative

from moerunner.models import families, patch, registry, runners
from moerunner.models.adapt import restored, routers, unpatch
from moerunner.models.block import forward_of
from moerunner.ops.reference import reference
from moerunner.verify.capture import recorded
from moerunner.verify.layer import Comparison
from moerunner.verify.tiny import tiny_inputs, tiny_model

CASES: dict[str, tuple[str, dict[str, Any]]] = {}
for file in sorted((Path(__file__).parent / "family_cases").glob("*.py")):
    CASES |= importlib.import_module(f"family_cases.{file.stem}").CASES
FIRST = {family: case for case, (family, _) in reversed(CASES.items())}
TURN = int(os.environ["MOERUNNER_SEED"]) % 10


def tiered(cases, always=()):
    mine = {c for c in cases if c in always or (zlib.crc32(c.encode()) + TURN) % 10 == 0}
    return [pytest.param(c, marks=() if c in mine else pytest.mark.slow) for c in cases]


def build(case, dtype=torch.float32, **changes):
    """Drawn anew in every run."""
    family, own = CASES[case]
    if family not in CONFIGS:
        pytest.skip(f"this Transformers has no {family}")
    for key in {"swiglu_alpha", "swiglu_limit"} & {*own, *changes}:  # once they were numbers in the code
        if not hasattr(CONFIGS[family](), key):
            pytest.skip(f"{family} has no {key} in this Transformers")
    return tiny_model(family, seed=int(torch.randint(2**31, ())), dtype=dtype, **{**own, **changes})


def _configs():
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING


CONFIGS = _configs()


def inputs_of(model, tokens=40):
    """What the model is called with: tokens, with types where it asks for them; or what stands in for them."""
    if model.main_input_name == "pixel_values":
        patches = torch.randn(16, 3 * model.config.patch_size**2)
        return {"pixel_values": patches.to(model.dtype), "grid_thw": torch.tensor([[1, 4, 4]])}
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (2, tokens // 2))
    given = tiny_inputs(model, ids)
    if hasattr(model, "codec_embedding"):  # its forward asks for an embedding that it does not have
        return {"inputs_embeds": model.codec_embedding(ids).detach()}
    if "moe_mm_token_type_ids" in model.forward.__code__.co_varnames:
        given["moe_mm_token_type_ids"] = torch.randint(0, 3, ids.shape)
    return given


def run(model, inputs):
    """Logits or last hidden states."""
    output = model(**inputs)
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output[0]


def patched_and_plain(model, inputs=None):
    """What each block did in Transformers, and the model's outputs without and with the runner; it is patched then."""
    inputs = inputs_of(model) if inputs is None else inputs
    report = patch(model)
    assert not [s for s in report.skipped if s.reason not in families.LEFT_ALONE.values()]
    with torch.no_grad():
        with restored(model):
            inside = routers(model)
            unpatch(model)
            with recorded(model, inside) as calls:
                expected = run(model, inputs)
        actual = run(model, inputs)
    assert set(calls) == {r.name for r in report.replaced}
    return report, calls, expected, actual


@pytest.mark.parametrize("case", tiered(CASES, always=FIRST.values()))
def test_float32_is_equal_to_transformers_and_to_the_oracle(case):
    model = build(case)
    inputs = inputs_of(model)
    report, calls, expected, actual = patched_and_plain(model, inputs)
    name = CASES[case][0]
    assert {r.family for r in report.replaced} == {name}
    assert not any(r.copied_bytes for r in report.replaced) or name in COPY
    ties = 0
    for name, call in calls.items():
        block = model.get_submodule(name)
        comparison = Comparison(name, block, call, torch.float32)
        check, first_tie = comparison.check(name, "", oracle_tokens=4)
        assert not check.problems, (name, check.problems)
        ties += first_tie < len(comparison.x_TH)
        forward = forward_of(block)
        with torch.no_grad():
            y = call.repeat(block)
            x, _, given = forward.inputs(*call.args, **call.kwargs)
            oracle = reference(forward.runner.spec, forward.runner.layer_weights(), x, **given)
        assert y.dtype == call.output.dtype
        assert y.shape == call.output.shape
        if not check.tied:
            assert relative(y, call.output) <= 2e-6, name
            assert relative(y, oracle.reshape(y.shape)) <= 2e-6, name
    if not ties and relative(actual, expected) > 1e-5:  # of right blocks: a model that makes much of every last digit
        unpatch(model)
        wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
        for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
            config._experts_implementation = "eager"  # of Transformers' ways the one that knows float64
        with torch.no_grad():
            exact = run(model.double(), wide)
        assert relative(actual, exact) <= 2 * relative(expected, exact) + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", tiered(CASES))
def test_half_precision_is_at_most_twice_as_far_from_the_oracle_as_transformers(case, dtype):
    """Or, after a draw in which Transformers was nearer by luck, in the median of others."""
    problems, _ = in_half_precision(case, dtype)
    if problems:
        assert all("from the oracle, where Transformers is" in problem for problem in problems), problems
        ratios = [in_half_precision(case, dtype)[1] for _ in range(15)]
        assert statistics.median(ratios) <= 2, (problems, sorted(ratios))


def in_half_precision(case, dtype):
    """What is wrong with a layer, and how many times as far from the oracle as Transformers' the worst one is."""
    model = build(case, dtype)
    _, calls, expected, actual = patched_and_plain(model)
    assert actual.dtype == expected.dtype
    assert torch.isfinite(actual).all()
    problems, ratio = [], 0.0
    for name, call in calls.items():
        check, _ = Comparison(name, model.get_submodule(name), call, dtype).check(name, "", oracle_tokens=4)
        problems += check.problems
        ratio = max(ratio, check.vs_oracle.max / max(check.transformers_vs_oracle.max, 1e-9))
    return problems, ratio


@pytest.mark.parametrize("case", tiered(FIRST.values()))
def test_cached_decode_gives_the_tokens_of_transformers(case):
    model = build(case)
    if not model.can_generate():
        pytest.skip("has no head")
    ids = torch.randint(3, 250, (2, 9))
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    report = patch(model)
    assert report.replaced
    got = model.generate(ids, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert got.sequences.tolist() == wanted.sequences.tolist()
    for ours, theirs in zip(got.logits, wanted.logits, strict=True):
        assert relative(ours, theirs) <= 1e-5


def gradients(model, inputs, towards):
    model.zero_grad()
    (run(model, inputs) * towards).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def far_apart(case, found, expected):
    """The names of those that differ by more than rounding."""
    least, names = 1e-2 * max(float(grad.abs().max()) for grad in expected.values() if grad is not None), []
    for name, grad in found.items():
        wanted = expected[name]
        if wanted is None:  # an expert that nobody chose; where all are put together, it gets a gradient of 0
            right = grad is None or (CASES[case][0] in COPY and not grad.any())
        else:  # much smaller ones are what is left of large ones that cancel, and so is a number that sums over all tokens
            limit = 1e-4 if wanted.numel() <= 8 else 2e-5
            right = grad is not None and float((grad - wanted).abs().max()) <= limit * max(least, float(wanted.abs().max()))
        names += [] if right else [name]
    return names


def nudged(model):
    """A copy with weights changed by little more than rounding, which moves smooth gradients by a third of what is allowed."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 2e-7 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("case", tiered(FIRST.values()))
def test_gradients_of_every_parameter_equal_those_of_transformers(case):
    """Or, where a value lies at a limit, all of those that Transformers has on its other side, where a third of nudges end."""
    plain = build(case)
    inputs = inputs_of(plain)
    patched = copy.deepcopy(plain)
    patch(patched)
    with torch.no_grad():
        towards = torch.randn_like(run(plain, inputs))  # a norm at the end would make the gradient of a square vanish
    found = gradients(patched, inputs, towards)
    names = far_apart(case, found, gradients(plain, inputs, towards))
    assert not names or any(not far_apart(case, found, gradients(nudged(plain), inputs, towards)) for _ in range(32)), names


@pytest.mark.parametrize("case", tiered(FIRST.values()))
def test_a_copy_that_is_saved_and_unpatched_is_the_model_it_was(case, tmp_path):
    model = build(case)
    inputs = inputs_of(model)
    with torch.no_grad():
        before = run(model, inputs)
        names = list(model.state_dict())
        patch(model)
        twin = copy.deepcopy(model)
        assert runners(twin)
        assert relative(run(twin, inputs), before) <= 1e-5
        unpatch(model)
        assert torch.equal(run(model, inputs), before)
    assert list(twin.state_dict()) == names


@pytest.mark.parametrize("family", [f.name for f in families.TABLE])
def test_every_family_has_cases(family):
    assert [c for c, (name, _) in CASES.items() if name == family]
    assert registry.of_model_type(family) is not None


def test_half_of_the_cases_change_what_is_computed():
    """A case that changes nothing tests nothing: no two cases of a family have the same spec."""
    for family in FIRST:
        own = [c for c in CASES if CASES[c][0] == family]
        assert len({repr(sorted(CASES[c][1].items(), key=str)) for c in own}) == len(own), family


COPY = {"dbrx", "switch_transformers", "ernie4_5_vl_moe_text"}  # keep what the layer has as one tensor apart
