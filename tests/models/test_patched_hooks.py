"""Whoever listens to the router, or to anything else in a block, hears what he heard before the patch."""

import copy
import warnings

import pytest
import torch
from tiny import ONE_PER_FAMILY, blocks, build, prompt, relative
from torch import nn

from moerunner.models import patch, unpatch


@pytest.fixture(params=ONE_PER_FAMILY)
def model(request):
    return build(request.param)


@pytest.fixture
def deepseek():
    return build("deepseek_v3-groups")


def run(model, **options):
    with torch.no_grad():
        return model(prompt(), **options)


@pytest.fixture(autouse=True)
def no_warnings():
    """A patched block that runs its own forward warns; the tests that expect it say so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a patched")
        yield


def test_router_logits_are_recorded_as_before(model):
    plain = run(copy.deepcopy(model), output_router_logits=True)
    if not hasattr(plain, "router_logits"):
        pytest.skip("older releases of Transformers do not record them for this family")
    assert len(plain.router_logits) == len(blocks(model))
    patch(model)
    patched = run(model, output_router_logits=True)
    assert len(patched.router_logits) == len(plain.router_logits)
    for got, wanted in zip(patched.router_logits, plain.router_logits, strict=True):
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        assert relative(got, wanted) <= 2e-5
    if getattr(plain, "aux_loss", None) is not None:
        assert relative(patched.aux_loss, plain.aux_loss) <= 1e-5
    assert relative(patched.logits, plain.logits) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_recording_does_not_change_the_result(model, dtype):
    model.to(dtype)
    patch(model)
    silent = run(model).logits
    assert torch.equal(run(model, output_router_logits=True).logits, silent)
    assert torch.equal(run(model).logits, silent)


def test_recorded_logits_are_the_ones_that_are_routed_by(model, monkeypatch):
    patch(model)
    run(model, output_router_logits=True)
    if not any(block.gate._forward_hooks for block in blocks(model).values()):
        pytest.skip("older releases of Transformers do not record them for this family")
    monkeypatch.setattr("moerunner.execute.gate_logits", None)
    run(model)


def test_a_hook_on_the_router_sees_the_call_that_it_saw_before(model):
    def watch(net):
        heard = []
        hooks = [
            b.gate.register_forward_hook(lambda _, args, out: heard.append((args[0].shape, *out))) for b in blocks(net).values()
        ]
        run(net)
        for hook in hooks:
            hook.remove()
        return heard

    before = watch(model)
    patch(model)
    after = watch(model)
    assert len(after) == len(before) == len(blocks(model))
    for (shape, *got), (wanted_shape, *wanted) in zip(after, before, strict=True):
        assert shape == wanted_shape
        assert all(relative(g, w) <= 2e-5 for g, w in zip(got[:2], wanted[:2], strict=True))
        assert torch.equal(got[2], wanted[2])


def test_a_hook_that_changes_the_routing_is_obeyed(model):
    def steer(module, args, out):
        logits, weights, ids = out
        return logits, weights * 0.5, torch.zeros_like(ids) + torch.arange(ids.shape[1])

    for block in blocks(model).values():
        block.gate.register_forward_hook(steer)
    expected = run(model).logits
    patch(model)
    assert relative(run(model).logits, expected) <= 1e-5


def test_a_router_with_a_forward_of_its_own_is_obeyed(model):
    for block in blocks(model).values():
        own = block.gate.forward

        def forward(x, own=own):
            logits, weights, ids = own(x)
            return logits, weights.flip(-1), ids

        block.gate.forward = forward
    expected = run(model).logits
    patch(model)
    assert relative(run(model).logits, expected) <= 1e-5


def test_hooks_on_the_block_itself_fire(model):
    patch(model)
    seen = []
    for name, block in blocks(model).items():
        block.register_forward_hook(lambda _, args, out, name=name: seen.append(name))
    run(model)
    assert seen == list(blocks(model))


@pytest.mark.parametrize("path", ["experts", "experts.act_fn", "shared_experts", "shared_experts.up_proj"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_on_what_the_runner_passes_over_make_the_block_run_its_own_forward(deepseek, path, kind):
    expected = run(deepseek).logits
    patch(deepseek)
    calls = []
    hooks = [getattr(block.get_submodule(path), kind)(lambda *args: calls.append(path)) for block in blocks(deepseek).values()]
    with pytest.warns(UserWarning, match=f"{path} has hooks"):
        logits = deepseek(prompt()).logits
    logits.sum().backward()
    assert len(calls) == 2
    assert relative(logits, expected) <= 1e-5
    for hook in hooks:
        hook.remove()
    assert relative(run(deepseek).logits, expected) <= 1e-5


def test_it_warns_once_per_block(deepseek):
    patch(deepseek)
    for block in blocks(deepseek).values():
        block.experts.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="experts has hooks") as told:
        run(deepseek)
    assert len(told) == len(blocks(deepseek))
    run(deepseek)  # a warning would be an error here


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) * 1.5


def test_an_adapter_that_is_added_after_the_patch_has_its_effect(deepseek):
    patch(deepseek)
    for block in blocks(deepseek).values():
        block.shared_experts.down_proj = Adapter(block.shared_experts.down_proj)
    with pytest.warns(UserWarning, match="shared_experts.down_proj is now a Adapter"):
        patched = run(deepseek).logits
    unpatch(deepseek)
    assert torch.equal(patched, run(deepseek).logits)


@pytest.mark.parametrize(("path", "value"), [("gate.top_k", 1), ("gate.routed_scaling_factor", 1.0)])
def test_a_setting_of_the_block_that_is_changed_after_the_patch_has_its_effect(deepseek, path, value):
    patch(deepseek)
    for block in blocks(deepseek).values():
        setattr(block.gate, path.removeprefix("gate."), value)
    with pytest.warns(UserWarning, match=f"{path} is now {value}"):
        patched = run(deepseek).logits
    unpatch(deepseek)
    assert torch.equal(patched, run(deepseek).logits)


def test_a_router_that_is_listened_to_is_called_once_where_the_block_runs_its_own_forward(deepseek):
    patch(deepseek)
    calls = []
    for block in blocks(deepseek).values():
        block.gate.register_forward_hook(lambda *args: calls.append(1))
        block.experts.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="experts has hooks"):
        run(deepseek)
    assert len(calls) == len(blocks(deepseek))


def test_a_tensor_that_is_no_plain_one_any_more_makes_the_block_run_its_own_forward(deepseek):
    class Quantised(torch.Tensor):
        pass

    expected = run(deepseek).logits
    patch(deepseek)
    for block in blocks(deepseek).values():
        weight = block.experts._parameters.pop("down_proj")
        block.experts.down_proj = weight.data.as_subclass(Quantised)
    with pytest.warns(UserWarning, match="down_proj is now a Quantised"):
        assert relative(run(deepseek).logits.as_subclass(torch.Tensor), expected) <= 1e-5


def test_arguments_are_taken_by_name_too_and_unknown_ones_are_passed_on(deepseek):
    block = deepseek.model.layers[1].mlp
    x = torch.randn(1, 4, 32)
    expected = block(x)
    patch(deepseek)
    assert relative(block(hidden_states=x), expected) <= 2e-6
    with pytest.warns(UserWarning, match="'padding_mask'"), pytest.raises(TypeError, match="padding_mask"):
        block(x, padding_mask=x)


def test_models_that_accelerate_places_are_patched_inside_its_wrapper(deepseek):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.hooks import remove_hook_from_submodules

    expected = run(deepseek).logits
    accelerate.dispatch_model(deepseek, {"": "cpu"}, main_device="cpu", force_hooks=True)
    report = patch(deepseek)
    assert len(report.replaced) == 2
    assert all(r.already for r in patch(deepseek).replaced)
    assert relative(run(deepseek).logits, expected) <= 1e-5
    unpatch(deepseek)
    assert torch.equal(run(deepseek).logits, expected)
    remove_hook_from_submodules(deepseek)
    assert torch.equal(run(deepseek).logits, expected)


def test_accelerate_may_come_after_the_patch(deepseek):
    accelerate = pytest.importorskip("accelerate")
    expected = run(deepseek).logits
    patch(deepseek)
    accelerate.dispatch_model(deepseek, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert relative(run(deepseek).logits, expected) <= 1e-5
    assert all(r.already for r in patch(deepseek).replaced)
    unpatch(deepseek)
    assert torch.equal(run(deepseek).logits, expected)


def test_a_hook_that_was_there_before_the_patch_keeps_its_block(deepseek):
    heard = []
    first, *_ = blocks(deepseek).values()
    first.experts.register_forward_hook(lambda *call: heard.append(1))
    wanted = run(deepseek).logits
    report = patch(deepseek)
    assert [skipped.reason for skipped in report.skipped] == ["experts has hooks, which the runner would pass over"]
    assert len(report.replaced) == 1
    assert relative(run(deepseek).logits, wanted) <= 1e-5
    assert len(heard) == 2
