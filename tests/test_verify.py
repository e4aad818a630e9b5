"""verify() says ok for what is right, and finds, names and bounds what is wrong."""

import json
import math
import re

import pytest
import torch

transformers = pytest.importorskip("transformers")

from moerunner import models  # noqa: E402
from moerunner.errors import CheckpointError, SpecError, UnsupportedError  # noqa: E402
from moerunner.models import adapt  # noqa: E402
from moerunner.runner import MoERunner  # noqa: E402
from moerunner.values import TopK  # noqa: E402
from moerunner.verify import damaged_weights, difference, tiny_model, verify  # noqa: E402

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3")
FEW = {"num_tokens": 24, "oracle_tokens": 4}


def blocks_of(model):
    report = adapt.patch(model)
    adapt.unpatch(model)
    return [r.name for r in report.replaced]


def down_of(model, name):
    return model.get_submodule(name).experts.down_proj


def break_runner(monkeypatch, change, only=None):
    """Changes what the runner returns: everywhere, or where it runs on these weights."""
    right = MoERunner.forward

    def wrong(self, x, **inputs):
        y = right(self, x, **inputs)
        mine = only is None or self.layer_weights().experts[0].w2.data_ptr() == only.data_ptr()
        return change(y.clone()) if mine else y

    monkeypatch.setattr(MoERunner, "forward", wrong)


# ---- right


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_right_in_float32(family):
    report = verify(family=family, **FEW)
    assert report.ok, str(report)
    assert report.dtype == "float32"
    assert len(report.layers) == (3 if family == "mixtral" else 2)
    for layer in report.layers:
        assert layer.family == family
        assert layer.vs_transformers.max < 2e-6
        assert layer.vs_oracle.max < 2e-6
        assert layer.same_experts == 1.0
        assert layer.oracle_tokens >= 4
        assert sum(layer.load) == 24 * 2
    assert report.logits.max < 1e-5
    assert report.same_top_token == report.tokens == 24


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_the_oracle_as_transformers(family, dtype):
    report = verify(family=family, dtype=dtype, **FEW)
    assert report.ok, str(report)
    for layer in report.layers:
        assert 0 < layer.transformers_vs_oracle.max < 4 * torch.finfo(dtype).eps
        assert layer.vs_oracle.max <= 2 * layer.transformers_vs_oracle.max + 1e-6


def test_the_report_goes_to_json_and_to_text():
    report = verify(family="mixtral", **FEW)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is True
    assert [layer["name"] for layer in data["layers"]] == [layer.name for layer in report.layers]
    assert str(report).startswith("ok: 3 MoE layers, 24 tokens, float32 on cpu")


def test_the_seed_gives_the_tokens_and_is_printed():
    model = tiny_model("mixtral")
    first, again, other = (verify(model, seed=seed, **FEW) for seed in (1, 1, 2))
    assert first.sample == "random tokens, seed 1"
    assert first.layers == again.layers
    assert first.layers != other.layers


def with_pairs(family, nudge=1.0):
    """A model whose experts come in pairs with (almost) equal logits; three are chosen, so that a pair is split."""
    model = tiny_model(family)
    gates = [model.get_submodule(name).gate for name in blocks_of(model)]
    model.config.num_experts_per_tok = 3
    for gate in gates:
        gate.top_k = 3
        gate.weight.data[1::2] = gate.weight.data[::2]
        gate.weight.data[1::2, 0] *= nudge
        if hasattr(gate, "e_score_correction_bias"):
            gate.e_score_correction_bias[1::2] = gate.e_score_correction_bias[::2]
    return model


def test_exact_ties_are_no_mismatch():
    report = verify(with_pairs("deepseek_v3"), num_tokens=64)
    assert report.ok, str(report)
    assert all(layer.same_experts == 1.0 for layer in report.layers)
    assert any(layer.tied for layer in report.layers), "both break ties alike: this proves nothing"
    assert report.judged_tokens < 64


def test_experts_that_rounding_makes_equal_are_ties():
    model = with_pairs("mixtral", nudge=1.02)  # far more than float32 loses, less than bfloat16 logits can tell
    report = verify(model, dtype=torch.float32, num_tokens=64)
    assert report.ok, str(report)
    assert not any(layer.tied for layer in report.layers)
    report = verify(model, dtype=torch.bfloat16, num_tokens=64)
    assert report.ok, str(report)
    assert any(layer.tied for layer in report.layers), "both break ties alike: this proves nothing"


def test_the_selection_bias_is_not_rounded_and_a_rounded_one_is_told():
    assert not any(layer.notes for layer in verify(family="deepseek_v3", dtype=torch.bfloat16, **FEW).layers)
    report = verify(tiny_model("deepseek_v3").to(torch.bfloat16), **FEW)
    assert report.ok, str(report)
    assert all("rounded" in layer.notes[0] for layer in report.layers)


# ---- wrong


def test_a_wrong_layer_is_a_mismatch_and_the_only_one_named(monkeypatch):
    model = tiny_model("deepseek_v3")
    first, second = blocks_of(model)
    break_runner(monkeypatch, lambda y: 2 * y, only=down_of(model, second))
    report = verify(model, **FEW)
    assert not report.ok
    assert [layer.name for layer in report.layers if layer.problems] == [second]
    assert any(second in reason and "worst token" in reason for reason in report.reasons())
    assert not any(first in reason for reason in report.reasons())
    assert any(reason.startswith("logits") for reason in report.reasons())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_token_is_found_and_named(monkeypatch, dtype):
    def change(y):
        y.view(-1, y.shape[-1])[17] *= 1.5
        return y

    break_runner(monkeypatch, change)
    report = verify(family="mixtral", dtype=dtype, **FEW)
    assert [layer.worst_token for layer in report.layers if layer.problems] == [17, 17, 17]


@pytest.mark.parametrize(("dtype", "part"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_a_small_error_everywhere_is_found(monkeypatch, dtype, part):
    break_runner(monkeypatch, lambda y: (y.float() * (1 + part)).to(dtype))
    report = verify(family="mixtral", dtype=dtype, **FEW)
    assert all(layer.problems for layer in report.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_that_is_not_finite_is_a_mismatch(monkeypatch, dtype):
    def change(y):
        y.view(-1, y.shape[-1])[3, 5] = math.nan
        return y

    break_runner(monkeypatch, change)
    report = verify(family="mixtral", dtype=dtype, **FEW)
    assert not report.ok
    assert all(layer.vs_transformers.max == math.inf for layer in report.layers)
    assert report.layers[0].worst_token == 3
    assert report.problems == ["logits: not all are finite"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_spec_that_does_not_fit_is_found_though_the_oracle_shares_it(monkeypatch, dtype):
    right = adapt.patch

    def wrong(model, **options):
        report = right(model, **options)
        for runner in adapt.runners(model).values():
            object.__setattr__(runner.spec, "routed_scaling_factor", 3.4)
        return report

    monkeypatch.setattr(adapt, "patch", wrong)
    report = verify(family="deepseek_v3", dtype=dtype, **FEW)
    assert all(layer.vs_oracle.max < 0.02 for layer in report.layers), "the runner and the oracle agree"
    assert all(layer.problems for layer in report.layers)
    if dtype == torch.float32:
        assert all(any("the spec does not describe it" in p for p in layer.problems) for layer in report.layers)


def test_routing_by_other_rules_is_found(monkeypatch):
    right = MoERunner.route

    def wrong(self, x, **inputs):
        top = right(self, x, **inputs)
        return TopK((top.ids + 1) % self.spec.num_experts, top.weights, scaled=top.scaled)

    monkeypatch.setattr(MoERunner, "route", wrong)
    for dtype in (torch.float32, torch.bfloat16):
        report = verify(family="deepseek_v3", dtype=dtype, **FEW)
        assert not report.ok
        told = [re.search(r"chooses other experts than Transformers on (\d+) tokens", reason) for reason in report.reasons()]
        assert any(match and int(match[1]) >= 20 for match in told)  # of 24; a few may be tied


def test_routing_weights_that_are_off_are_found(monkeypatch):
    right = MoERunner.route

    def wrong(self, x, **inputs):
        top = right(self, x, **inputs)
        return TopK(top.ids, top.weights * 1.05, scaled=top.scaled)

    monkeypatch.setattr(MoERunner, "route", wrong)
    report = verify(family="qwen3_moe", dtype=torch.bfloat16, **FEW)
    assert any("routing weights" in reason for reason in report.reasons())


@pytest.mark.filterwarnings("ignore:a patched")
def test_a_block_that_falls_back_on_transformers_proves_nothing(monkeypatch):
    model = tiny_model("mixtral")
    first = blocks_of(model)[0]
    right, hooks = adapt.patch, []

    def hooked(model, **options):
        while hooks:
            hooks.pop().remove()
        report = right(model, **options)
        hooks.append(model.get_submodule(first).experts.register_forward_hook(lambda *_: None))
        return report

    monkeypatch.setattr(adapt, "patch", hooked)
    report = verify(model, **FEW)
    assert report.reasons() == [f"{first}: the patched block ran Transformers' own code, not moerunner"]


def test_what_is_compared_with_is_transformers_own_code(monkeypatch):
    ran = []
    right = MoERunner.forward
    monkeypatch.setattr(MoERunner, "forward", lambda self, x, **i: ran.append(i.get("topk")) or right(self, x, **i))
    verify(family="mixtral", **FEW)
    assert len(ran) == 2 * 3, "once end to end and once on the captured input, for each of three layers"


# ---- loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("deepseek_v3").save_pretrained(path)
    return path


def test_a_folder_is_loaded_as_transformers_does(folder):
    report = verify(folder, **FEW)
    assert report.ok, str(report)
    assert report.model == str(folder)


def test_a_tensor_that_was_loaded_otherwise_is_named(monkeypatch, folder):
    name = "model.layers.1.mlp.experts.down_proj"
    right = models.load

    def wrong(path, **options):
        model = right(path, **options)
        model.get_parameter(name).data[0] = model.get_parameter(name).data[1]
        return model

    monkeypatch.setattr(models, "load", wrong)
    report = verify(folder, **FEW)
    assert report.reasons() == [f"{name}: loaded otherwise than by Transformers"]


def test_a_computed_buffer_that_was_left_out_is_named(monkeypatch, folder):
    name = "model.rotary_emb.inv_freq"
    right = models.load

    def wrong(path, **options):
        model = right(path, **options)
        model.get_buffer(name).zero_()
        return model

    monkeypatch.setattr(models, "load", wrong)
    assert verify(folder, **FEW).reasons() == [f"{name}: loaded otherwise than by Transformers"]


# ---- damage and bad input


def test_a_weight_that_is_not_a_number_is_named():
    model = tiny_model("mixtral")
    name = f"{blocks_of(model)[1]}.experts.down_proj"
    model.get_parameter(name).data[3, 1, 2] = math.nan
    report = verify(model, **FEW)
    assert not report.ok
    assert report.layers == []
    assert report.reasons() == [f"{name}: 1 of 49152 values are not finite"]


def test_an_infinite_correction_bias_is_named():
    model = tiny_model("deepseek_v3")
    name = blocks_of(model)[0]
    model.get_submodule(name).gate.e_score_correction_bias[0] = math.inf
    assert damaged_weights(model) == [f"{name}.gate.e_score_correction_bias: 1 of 8 values are not finite"]


def test_a_model_that_transformers_cannot_run_is_bad_input(monkeypatch):
    model = tiny_model("mixtral")
    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", lambda **_: torch.ones(2) + torch.ones(3))
    with pytest.raises(CheckpointError, match="MixtralForCausalLM: does not run with Transformers' own code: RuntimeError"):
        verify(model)


def test_a_model_without_moe_blocks_is_not_supported():
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM"):
        verify(tiny_model("llama"))


@pytest.mark.parametrize("name", ["no_such_family", "vit"])
def test_a_family_that_cannot_be_built_is_not_supported(name):
    with pytest.raises(UnsupportedError, match=name):
        verify(family=name)


def test_a_model_or_a_family():
    with pytest.raises(SpecError):
        verify()
    with pytest.raises(SpecError):
        verify(tiny_model("mixtral"), family="mixtral")


def test_a_text_needs_a_tokenizer():
    with pytest.raises(SpecError, match="tokenizer"):
        verify(tiny_model("mixtral"), text="hello")


# ---- the model is left as it was


@pytest.mark.parametrize("patched", [True, False])
def test_the_model_is_left_as_it_was(patched):
    model = tiny_model("mixtral").train()
    if patched:
        adapt.patch(model)
    verify(model, **FEW)
    assert bool(adapt.runners(model)) is patched
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
def test_the_runners_that_a_model_has_are_the_ones_that_are_verified_and_kept(backend):
    model = tiny_model("mixtral")
    adapt.patch(model, backend=backend)
    before = adapt.runners(model)
    report = verify(model, **FEW)
    assert {layer.backend for layer in report.layers} == {backend}
    after = adapt.runners(model)
    assert all(after[name] is runner for name, runner in before.items())
    assert list(after) == list(before)


def test_blocks_that_were_not_patched_are_not_patched_afterwards():
    model = tiny_model("mixtral")
    adapt.patch(model.model.layers[1])
    assert len(verify(model, **FEW).layers) == 3
    assert list(adapt.runners(model)) == ["model.layers.1.mlp"]


def test_the_model_is_left_as_it_was_when_something_fails(monkeypatch):
    model = tiny_model("mixtral")

    def wrong(self, x, **inputs):
        raise RuntimeError("broken kernel")

    monkeypatch.setattr(MoERunner, "forward", wrong)
    with pytest.raises(RuntimeError, match="broken kernel"):
        verify(model, **FEW)
    assert not adapt.runners(model)


# ---- the measure


def test_difference_is_relative_to_the_reference():
    ref = torch.tensor([[4.0, 0.0], [0.0, -2.0]])
    found = difference(ref + torch.tensor([[0.0, 0.0], [0.0, 1.0]]), ref)
    assert found.max == 1 / 4
    assert found.rms == pytest.approx(math.sqrt(1 / 20))


@pytest.mark.parametrize(
    ("y", "ref", "expected"),
    [([0.0], [0.0], 0.0), ([1.0], [0.0], math.inf), ([math.nan], [1.0], math.inf), ([1.0], [math.inf], math.inf), ([], [], 0)],
)
def test_difference_at_the_edges(y, ref, expected):
    assert difference(torch.tensor(y), torch.tensor(ref)).max == expected


def test_a_logit_at_the_threshold_of_sparsemixer_is_a_tie_and_a_wrong_threshold_is_not(monkeypatch):
    ties = 0
    for seed in (8, 9):
        model = tiny_model("phimoe", seed=seed, dtype=torch.float16, router_jitter_noise=0.05)
        report = verify(model, num_tokens=128, oracle_tokens=2)
        assert report.ok, str(report)
        ties += sum(layer.tied for layer in report.layers)
    right = MoERunner.route

    def wrong(self, x, **inputs):
        top = right(self, x, **inputs)
        return TopK(top.ids, top.weights.flip(-1), scaled=top.scaled)

    monkeypatch.setattr(MoERunner, "route", wrong)
    assert any("routing weights" in reason for reason in verify(model, num_tokens=32, oracle_tokens=2).reasons())
    assert ties, "none of these models has a logit at the threshold"
