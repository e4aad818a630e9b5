"""What `patch` leaves alone: tensors, names, copies, saving, and every block that it cannot be sure of."""

import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
from tiny import ONE_PER_FAMILY, VOCAB, blocks, build, prompt, relative
from torch import nn

from moerunner import Layout, SpecError, UnsupportedError
from moerunner.models import patch, registry, runners, unpatch


@pytest.fixture(params=ONE_PER_FAMILY)
def model(request):
    return build(request.param)


@pytest.fixture
def mixtral():
    return build("mixtral-top2")


@pytest.fixture
def deepseek():
    return build("deepseek_v3-groups")


def logits(model):
    with torch.no_grad():
        return model(prompt()).logits


def calls_of_experts(model, run):
    """How often the blocks' own experts modules are called: never, by a patched block."""
    calls = []
    originals = {m.experts: type(m.experts).forward for m in blocks(model).values()}
    kinds = {type(experts): forward for experts, forward in originals.items()}
    for kind, forward in kinds.items():
        kind.forward = lambda self, *args, _forward=forward: calls.append(1) or _forward(self, *args)
    try:
        run()
    finally:
        for kind, forward in kinds.items():
            kind.forward = forward
    return len(calls)


def test_a_patched_block_does_not_call_its_experts_module_and_an_unpatched_one_does(model):
    count = len(blocks(model))
    assert calls_of_experts(model, lambda: logits(model)) == count
    patch(model)
    assert calls_of_experts(model, lambda: logits(model)) == 0


def test_weights_are_the_models_own_tensors(model):
    report = patch(model)
    own = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    for runner in runners(model).values():
        assert not list(runner.parameters())
        assert not list(runner.buffers())
        weights = runner.layer_weights()
        tensors = [*weights.tensors.values(), weights.experts[0].w13, weights.experts[0].w2]
        assert {t.data_ptr() for t in tensors} <= own
    assert {r.copied_bytes for r in report.replaced} == {0}


def test_modules_names_and_state_dict_stay_the_same(model):
    before = [name for name, _ in model.named_modules()], list(model.state_dict()), repr(model)
    patch(model)
    assert ([name for name, _ in model.named_modules()], list(model.state_dict()), repr(model)) == before


def test_patching_twice_changes_nothing_and_says_so(model):
    first = patch(model)
    forwards = [block.forward for block in blocks(model).values()]
    second = patch(model)
    assert [block.forward for block in blocks(model).values()] == forwards
    assert [(r.name, r.family, r.backend) for r in second.replaced] == [(r.name, r.family, r.backend) for r in first.replaced]
    assert not any(r.already for r in first.replaced)
    assert all(r.already for r in second.replaced)
    assert "already patched" in str(second)
    assert "already patched" not in str(first)


def test_unpatch_restores_exactly(model):
    expected = logits(model)
    before = {name: dict(block.__dict__) for name, block in blocks(model).items()}
    patch(model)
    unpatch(model)
    after = {name: dict(block.__dict__) for name, block in blocks(model).items()}
    assert after == before
    assert torch.equal(logits(model), expected)
    unpatch(model)
    assert not runners(model)


def test_a_copy_of_a_patched_model_uses_its_own_weights(model):
    patch(model)
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), expected)
    assert not logits(twin).any()
    assert all(forward.source.block is block for block in blocks(twin).values() for forward in [block.forward])


def test_a_copy_of_one_block_works_without_the_model():
    mixtral = build("mixtral-top2")
    patch(mixtral)
    block = mixtral.model.layers[0].mlp
    x = torch.randn(1, 5, 32)
    expected = block(x)
    twin = copy.deepcopy(block)
    del mixtral, block
    assert torch.equal(twin(x), expected)


def test_a_patched_model_survives_pickling(model):
    patch(model)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin), logits(model))
    assert list(runners(twin)) == list(runners(model))
    assert calls_of_experts(twin, lambda: logits(twin)) == 0


def test_a_patched_model_is_freed_without_the_garbage_collector():
    mixtral = build("mixtral-top2")
    patch(mixtral)
    logits(mixtral)
    block = weakref.ref(mixtral.model.layers[0].mlp)
    gc.disable()
    try:
        weight = weakref.ref(mixtral.model.layers[0].mlp.experts.gate_up_proj)
        del mixtral
        assert block() is None
        assert weight() is None
    finally:
        gc.enable()


def test_saving_writes_the_same_files_and_loading_them_gives_the_same_model(model, tmp_path):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    def keys(folder):
        with safe_open(folder / "model.safetensors", "pt") as file:
            return sorted(file.keys())

    model.save_pretrained(tmp_path / "plain")
    patch(model)
    model.save_pretrained(tmp_path / "patched")
    assert keys(tmp_path / "patched") == keys(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert relative(logits(again), logits(model)) <= 1e-5


def test_changes_of_weights_after_the_patch_are_seen(model):
    patch(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    changed = logits(model)
    unpatch(model)
    assert relative(changed, logits(model)) <= 1e-5
    patch(model)
    model.load_state_dict({name: torch.zeros_like(t) for name, t in model.state_dict().items()})
    assert not logits(model).any()


def test_conversion_to_another_dtype_after_the_patch(model):
    patch(model)
    logits(model)
    model.to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    block, x = next(iter(blocks(model).values())), torch.randn(1, 200, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        converted = block(x)
        unpatch(model)
        own = block(x)
    per_token = (converted - own).float().abs().amax(-1) / own.float().abs().max()
    assert (per_token <= 2e-2).float().mean() >= 0.95  # logits that tie in bfloat16 may fall the other way
    patch(model)
    model.to(torch.float32)
    again = logits(model)
    unpatch(model)
    assert relative(again, logits(model)) <= 1e-5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_gradient_mode(mixtral, mode):
    patch(mixtral)
    with mode():
        out = mixtral(prompt()).logits
    assert out.requires_grad == (mode is torch.enable_grad)
    assert relative(out.detach().clone(), logits(mixtral)) <= 1e-5  # kernels with backward, and others


def test_autocast(model):
    """Transformers' own block under autocast is the yardstick; a tie of two logits may fall the other way."""
    block, x = next(iter(blocks(model).values())), torch.randn(1, 200, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        own = block(x).float()
        patch(model)
        patched = block(x).float()
    per_token = (patched - own).abs().amax(-1) / own.abs().max()
    assert (per_token <= 2e-2).float().mean() >= 0.95


def test_gradient_checkpointing(mixtral):
    mixtral.train()
    patch(mixtral)
    grads = []
    for enable in (mixtral.gradient_checkpointing_disable, mixtral.gradient_checkpointing_enable):
        enable()
        mixtral.zero_grad()
        mixtral(prompt()).logits.square().mean().backward()
        grads.append(mixtral.model.layers[0].mlp.experts.down_proj.grad.clone())
    assert torch.equal(*grads)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_move_to_the_gpu_after_the_patch(model):
    patch(model)
    expected = logits(model)
    model.to("cuda")
    with torch.no_grad():
        out = model(prompt().cuda()).logits.cpu()
    unpatch(model)
    with torch.no_grad():
        own = model(prompt().cuda()).logits.cpu()
    assert relative(out, own) <= 1e-4
    assert relative(out, expected) <= 1e-2


def test_the_backend_is_the_callers_choice(mixtral):
    expected = logits(mixtral)
    report = patch(mixtral, backend="grouped_mm")
    assert {r.backend for r in report.replaced} == {"grouped_mm"}
    assert relative(logits(mixtral), expected) <= 1e-5


def test_a_backend_that_does_not_exist_is_refused(mixtral):
    with pytest.raises(UnsupportedError, match="no backend is called 'cuda9'"):
        patch(mixtral, backend="cuda9")
    assert not runners(mixtral)


def test_a_layout_of_one_rank_is_none(mixtral):
    report = patch(mixtral, layout=Layout(tokens="sharded"))
    assert report.layout is None
    assert not any(runner.plan.collectives for runner in runners(mixtral).values())


def test_report_as_text_and_as_data(deepseek):
    deepseek.model.layers[2].mlp.experts.down_proj = nn.Parameter(torch.zeros(16, 32, 25))
    report = patch(deepseek)
    assert json.loads(json.dumps(report.to_dict())) == {
        "replaced": [
            {
                "name": "model.layers.1.mlp",
                "family": "deepseek_v3",
                "backend": report.replaced[0].backend,
                "copied_bytes": 0,
                "already": False,
            }
        ],
        "skipped": [
            {
                "name": "model.layers.2.mlp",
                "reason": "experts.down_proj has shape [16, 32, 25], its config asks for [16, 32, 24]",
            }
        ],
        "notes": [],
        "layout": None,
        "rank": 0,
        "tp_plan": [],
    }
    heads = [line.split("  ")[0] for line in str(report).splitlines()]
    assert heads == ["replaced", "model.layers.1.mlp", "", "left as it is", "model.layers.2.mlp"]


def test_a_model_without_experts_is_reported_as_such():
    report = patch(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert not report.replaced
    assert not report.skipped
    assert str(report) == "The model has no mixture-of-experts block."


def test_a_block_by_itself_is_a_model_too(mixtral):
    block = mixtral.model.layers[0].mlp
    x = torch.randn(1, 3, 32)
    expected = block(x)
    report = patch(block)
    assert [r.name for r in report.replaced] == [""]
    assert "(the model)" in str(report)
    assert relative(block(x), expected) <= 2e-6
    assert len(runners(mixtral)) == 1


class Wrapper(nn.Module):
    """A vision-language model in small: its config holds the tower's as text_config."""

    def __init__(self, tower):
        super().__init__()
        self.vision, self.language_model = nn.Linear(4, 4), tower
        self.config = type("WrapperConfig", (), {"text_config": tower.config, "model_type": "wrapper"})()


def test_towers_inside_a_wrapper_are_found_by_their_class(model):
    expected = logits(model)
    wrapper = Wrapper(model)
    report = patch(wrapper)
    assert [r.name for r in report.replaced] == [f"language_model.{name}" for name in blocks(model)]
    assert relative(logits(model), expected) <= 1e-5


def test_a_config_that_only_the_wrapper_holds_is_found(mixtral):
    config, layers = mixtral.config, mixtral.model.layers
    for layer in layers:
        del layer.mlp.experts.config
    wrapper = Wrapper(mixtral)
    holder = nn.ModuleList(layers)  # without the tower's own config
    holder.config = wrapper.config
    assert wrapper.config.text_config is config
    assert len(patch(holder).replaced) == 3


def test_a_block_without_a_config_is_left_as_it_is(mixtral):
    block = mixtral.model.layers[0].mlp
    del block.experts.config
    (skipped,) = patch(block).skipped
    assert "no config around it has the keys of the family 'mixtral'" in skipped.reason


@pytest.fixture
def without_olmoe():
    entry = registry.of_model_type("olmoe")
    registry.unregister("olmoe")
    yield
    registry.register(entry)


def unknown():
    from transformers import OlmoeConfig, OlmoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4}
    return OlmoeForCausalLM(OlmoeConfig(vocab_size=VOCAB, num_hidden_layers=2, num_experts=8, **sizes)).eval()


def test_of_a_family_that_is_not_in_the_table_the_experts_are_run_alone(without_olmoe):
    olmoe = unknown()
    before = logits(olmoe)
    report = patch(olmoe)
    assert [r.name for r in report.replaced] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert {r.family for r in report.replaced} == {"olmoe (experts only)"}
    assert not report.skipped
    assert relative(logits(olmoe), before) <= 1e-5
    assert "forward" not in olmoe.model.layers[0].mlp.__dict__
    experts, x = olmoe.model.layers[0].mlp.experts, torch.randn(5, 32)
    ids = torch.tensor([[0, 7], [3, 8], [8, 8], [1, 5], [6, 2]])
    weights = torch.rand(5, 2)
    y = experts(x, ids, weights)
    unpatch(olmoe)
    here = ids < 8  # 8 marks an expert of another rank, and adds nothing
    assert relative(y, experts(x, torch.where(here, ids, 0), torch.where(here, weights, 0.0))) <= 2e-6


def test_experts_with_a_gate_of_their_own_are_left_as_they_are(without_olmoe, monkeypatch):
    olmoe = unknown()
    kind = type(olmoe.model.layers[0].mlp.experts)
    monkeypatch.setattr(kind, "_apply_gate", lambda self, h: h.chunk(2, -1)[0])
    before = logits(olmoe)
    report = patch(olmoe)
    assert not report.replaced
    assert "OlmoeExperts: has a gate of its own" in report.skipped[0].reason
    assert torch.equal(logits(olmoe), before)


class Lookalike(nn.Module):
    """Has experts, and no family."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(2, 2)])

    def forward(self, x):
        return self.experts[0](x)


def test_an_unknown_module_with_experts_is_reported():
    report = patch(nn.Sequential(Lookalike()))
    assert [s.name for s in report.skipped] == ["0"]
    assert "Lookalike" in report.skipped[0].reason


def damaged(change, model):
    """The reasons why blocks of a changed model are skipped; the model still runs its own forward."""
    for block in blocks(model).values():
        change(block)
    report = patch(model)
    assert not report.replaced
    assert not runners(model)
    assert len({s.reason for s in report.skipped}) == 1
    return report.skipped[0].reason


def test_weights_of_another_dtype_are_not_touched(deepseek):
    def to_fp8(block):
        block.experts.gate_up_proj.data = block.experts.gate_up_proj.data.to(torch.float8_e4m3fn)

    assert "torch.float32, torch.float8_e4m3fn" in damaged(to_fp8, deepseek)


def test_weights_of_several_dtypes_are_not_touched(deepseek):
    reason = damaged(lambda block: block.shared_experts.to(torch.bfloat16), deepseek)
    assert "torch.bfloat16, torch.float32" in reason


def test_weights_without_data_are_not_touched(deepseek):
    assert "meta device" in damaged(lambda block: block.to("meta"), deepseek)


def test_weights_of_another_shape_are_not_touched(deepseek):
    def cut(block):
        block.gate.weight = nn.Parameter(block.gate.weight[:-1].clone())

    assert "gate.weight has shape [15, 32]" in damaged(cut, deepseek)


def test_weights_that_are_gone_are_named(deepseek):
    def drop(block):
        del block.experts.gate_up_proj

    assert "no tensor experts.gate_up_proj" in damaged(drop, deepseek)


def test_tensor_subclasses_are_not_touched(deepseek):
    class Quantised(torch.Tensor):
        pass

    def quantise(block):
        del block.experts._parameters["down_proj"]
        block.experts.down_proj = torch.zeros(16, 32, 24).as_subclass(Quantised)

    assert "experts.down_proj is a Quantised" in damaged(quantise, deepseek)


class Adapter(nn.Module):
    """What an adapter library puts in place of a Linear: the base weight is reachable, the result is another."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight = base, base.weight

    def forward(self, x):
        return self.base(x) + 1


def test_modules_of_other_libraries_inside_a_block_are_not_passed_over(deepseek, monkeypatch):
    monkeypatch.setattr(Adapter, "__module__", "adapters.layers")

    def adapt(block):
        block.shared_experts.up_proj = Adapter(block.shared_experts.up_proj)

    assert "shared_experts.up_proj is a adapters.layers.Adapter" in damaged(adapt, deepseek)


def test_a_forward_that_somebody_replaced_is_not_overwritten(mixtral):
    def replace(block):
        block.forward = torch.zeros_like

    assert "its forward was replaced by" in damaged(replace, mixtral)
    assert mixtral.model.layers[0].mlp.forward is torch.zeros_like


def test_a_subclass_with_a_forward_of_its_own_is_another_block(mixtral):
    kind = type(mixtral.model.layers[0].mlp)
    block = mixtral.model.layers[0].mlp
    block.__class__ = type("Inherits", (kind,), {})
    assert len(patch(block).replaced) == 1
    unpatch(block)
    block.__class__ = type("Overrides", (kind,), {"forward": lambda self, x: x})
    assert patch(block).replaced[0].name == "experts"


@pytest.mark.parametrize(
    ("key", "value", "held"),
    [("num_experts_per_tok", 3, "gate.top_k"), ("routed_scaling_factor", 9.0, "gate.routed_scaling_factor")],
)
def test_a_config_that_no_longer_says_how_the_block_was_built_is_noticed(deepseek, key, value, held):
    setattr(deepseek.config, key, value)
    reason = patch(deepseek).skipped[0].reason
    assert held in reason
    assert key in reason


def test_an_unknown_key_that_may_matter_is_an_error_and_nothing_is_patched(model):
    model.config.expert_output_multiplier = 2.0
    with pytest.raises(SpecError, match="expert_output_multiplier") as error:
        patch(model)
    assert "ignored" in error.value.next_step
    assert not runners(model)


def test_an_unknown_topk_method_leaves_the_blocks_as_they_are():
    reason = patch(build("deepseek_v2-greedy", topk_method="noaux_tc")).skipped[0].reason
    assert "topk_method 'noaux_tc'" in reason


def test_an_activation_that_is_not_offered_leaves_the_blocks_as_they_are():
    assert "'mish'" in patch(build("mixtral-top2", hidden_act="mish")).skipped[0].reason


def test_noise_in_training_is_refused_and_evaluation_is_not():
    model = build("mixtral-top2", router_jitter_noise=0.1)
    expected = logits(model)
    patch(model)
    assert relative(logits(model), expected) <= 1e-5
    with pytest.raises(UnsupportedError, match="jitter_noise"):
        model.train()(prompt())
    for block in blocks(model).values():
        block.jitter_noise = 0.0
    model(prompt())
