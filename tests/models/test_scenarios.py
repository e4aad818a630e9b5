"""What people do with a model around the forward, for every family: before the patch and after it the same."""

import copy
import filecmp
import warnings

import pytest
import torch
from test_parity import CASES, FIRST, build, inputs_of, run, tiered
from tiny import relative

from moerunner.errors import MoEError
from moerunner.models import load, patch, runners, unpatch

EACH = tiered(FIRST.values())


@pytest.fixture(autouse=True)
def no_fallback():
    """A patched block that runs its own forward warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a patched")
        yield


@pytest.mark.parametrize("case", EACH)
def test_router_logits_are_recorded_as_before(case):
    model = build(case)
    inputs = inputs_of(model)
    if "router_logits" not in (getattr(model, "_can_record_outputs", None) or {}):
        pytest.skip("Transformers records none for this model")
    with torch.no_grad():
        try:
            plain = model(**inputs, output_router_logits=True)
        except (TypeError, IndexError, RuntimeError) as error:
            pytest.skip(f"Transformers itself fails: {error}")
        patch(model)
        patched = model(**inputs, output_router_logits=True)
    wanted, got = plain.router_logits, patched.router_logits
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        if theirs.is_floating_point():
            assert relative(ours, theirs) <= 2e-5
    if getattr(plain, "aux_loss", None) is not None:
        assert relative(torch.as_tensor(patched.aux_loss), torch.as_tensor(plain.aux_loss)) <= 1e-5


@pytest.mark.parametrize("case", EACH)
def test_hooks_on_router_and_block_see_what_they_saw(case):
    model = build(case)
    inputs = inputs_of(model)

    def watch():
        seen, hooks = [], []
        for name in names:
            block = model.get_submodule(name)
            router = next((m for n, m in block.named_children() if n in ("gate", "router")), None)
            for module in filter(None, (block, router)):
                hooks.append(
                    module.register_forward_hook(lambda m, args, y, n=name: seen.append((n, type(m).__name__, tensors(y))))
                )
        with torch.no_grad():
            run(model, inputs)
        for hook in hooks:
            hook.remove()
        return seen

    names = [r.name for r in patch(model).replaced]
    after = watch()
    unpatch(model)
    before = watch()
    assert [(n, k, len(y)) for n, k, y in after] == [(n, k, len(y)) for n, k, y in before]
    for (_, _, ours), (_, _, theirs) in zip(after, before, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def tensors(answer):
    parts = answer if isinstance(answer, tuple) else (answer,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


@pytest.mark.parametrize("case", EACH)
def test_inference_mode_and_weights_from_a_state_dict(case):
    model, other = build(case), build(case)
    inputs = inputs_of(model)
    patch(model)
    model.load_state_dict(copy.deepcopy(other.state_dict()))
    with torch.inference_mode():
        assert relative(run(model, inputs), run(other, inputs)) <= 1e-5


@pytest.mark.parametrize("case", EACH)
def test_a_patched_model_saves_the_same_files_and_they_load(case, tmp_path):
    model = build(case)
    inputs = inputs_of(model)
    model.save_pretrained(tmp_path / "plain")
    patch(model)
    model.save_pretrained(tmp_path / "patched")
    files = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert filecmp.cmpfiles(tmp_path / "plain", tmp_path / "patched", files, shallow=False)[0] == files
    theirs = type(model).from_pretrained(tmp_path / "plain").eval()  # not every family reloads what it had
    with torch.no_grad():
        try:
            again = load(tmp_path / "plain")
        except MoEError as error:
            pytest.skip(f"cannot be loaded, and says so: {error}")
        assert runners(again) or not runners(model)
        assert set(again.state_dict()) == set(model.state_dict())
        assert relative(run(again, inputs), run(theirs, inputs)) <= 1e-5


@pytest.mark.parametrize("case", EACH)
def test_no_token_and_one_token(case):
    model = build(case)
    report = patch(model)
    for name in [r.name for r in report.replaced]:
        block = model.get_submodule(name)
        spec = runners(model)[name].spec
        if len(block.forward.source.family.takes) > 1:
            continue  # what else it takes, only its model knows
        for tokens in (0, 1):
            x = torch.randn(1, tokens, spec.hidden_size)
            with torch.no_grad():
                y = block(x)
                y = y[0] if isinstance(y, tuple) else y
            assert y.numel() == x.numel()
            assert torch.isfinite(y).all()


def test_cases_of_all_families_are_here():
    assert {CASES[c][0] for c in FIRST.values()} == set(FIRST)
