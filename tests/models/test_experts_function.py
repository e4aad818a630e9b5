"""`experts_implementation="moerunner"`: the experts alone, through Transformers' own registry."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from tiny import build, prompt, relative
from torch import nn

from moerunner import UnsupportedError
from moerunner.models import registry
from moerunner.models.experts_function import is_experts_module, run_experts
from moerunner.verify import tiny_model

EXPERTS, HIDDEN, WIDTH, TOP_K, TOKENS = 4, 16, 12, 2, 9


def experts(*, transposed=False, bias=False, gate=True, interleaved=False, act="silu", apply_gate=None):
    """An experts module as Transformers' decorator makes them."""
    from transformers.activations import ACT2FN
    from transformers.integrations.moe import use_experts_implementation

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = EXPERTS, ACT2FN[act]
            rows, name = (2 * WIDTH, "gate_up_proj") if gate else (WIDTH, "up_proj")
            shapes = {name: (EXPERTS, HIDDEN, rows) if transposed else (EXPERTS, rows, HIDDEN)}
            shapes["down_proj"] = (EXPERTS, WIDTH, HIDDEN) if transposed else (EXPERTS, HIDDEN, WIDTH)
            if bias:
                shapes |= {f"{name}_bias": (EXPERTS, rows), "down_proj_bias": (EXPERTS, HIDDEN)}
            for key, shape in shapes.items():
                setattr(self, key, nn.Parameter(torch.randn(shape) * 0.4))

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise NotImplementedError

    if apply_gate is not None:
        Experts._apply_gate = apply_gate
    decorate = use_experts_implementation(
        is_transposed=transposed, has_bias=bias, has_gate=gate, is_concatenated=not interleaved
    )
    config = type("Config", (), {"_experts_implementation": "moerunner"})()
    return decorate(Experts)(config)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
    return torch.randn(TOKENS, HIDDEN), ids, torch.rand(TOKENS, TOP_K)


FORMS = [
    {},
    {"transposed": True},
    {"bias": True},
    {"gate": False},
    {"transposed": True, "bias": True},
    {"gate": False, "bias": True, "act": "relu2"},
    {"act": "gelu"},
    {"act": "gelu_pytorch_tanh"},
    {"act": "quick_gelu"},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_way_to_store_experts_gives_what_transformers_gives(form, inputs):
    from transformers.integrations.moe import batched_mm_experts_forward

    module = experts(**form)
    with torch.no_grad():
        assert relative(module(*inputs), batched_mm_experts_forward(module, *inputs)) <= 2e-6


def test_experts_of_other_ranks_add_nothing(inputs):
    """Under expert parallelism an id beyond the local experts means another rank."""
    module = experts()
    x, ids, weights = inputs
    here = ids < 2
    foreign = torch.where(here, ids, EXPERTS)
    weights = weights.clone()
    weights[~here] = torch.nan
    module.gate_up_proj.data[2:] = torch.nan
    with torch.no_grad():
        y = module(x, foreign, weights)
        expected = module(x, torch.where(here, ids, 0), torch.where(here, weights, 0.0))
    assert relative(y, expected) <= 2e-6


def test_gradients_reach_tokens_weights_and_experts(inputs):
    from transformers.integrations.moe import grouped_mm_experts_forward

    module = experts()
    grads = []
    for run in (run_experts, grouped_mm_experts_forward):
        x, ids, weights = (t.clone().requires_grad_(t.is_floating_point()) for t in inputs)
        module.zero_grad()
        run(module, x, ids, weights).square().sum().backward()
        grads.append([x.grad, weights.grad, *(p.grad.clone() for p in module.parameters())])
    for got, wanted in zip(*grads, strict=True):
        assert relative(got, wanted) <= 1e-5


def test_tokens_in_another_dtype_than_the_weights_come_back_in_theirs(inputs):
    x, ids, weights = inputs
    module = experts().bfloat16()
    with torch.no_grad():
        assert module(x, ids, weights).dtype == torch.float32


def test_a_gate_of_its_own_is_refused(inputs):
    module = experts(apply_gate=lambda self, h: h[..., :WIDTH])
    with pytest.raises(UnsupportedError, match="_apply_gate"):
        module(*inputs)


def test_alternating_rows_without_a_gate_for_them_are_refused(inputs):
    with pytest.raises(UnsupportedError, match="alternate"):
        experts(interleaved=True)(*inputs)


REFUSED = {"inkling2_text": "caps softly", "muse_spark_text": "norms the experts' output"}


@pytest.mark.rotating(3)
@pytest.mark.parametrize("family", [family.name for family in registry.registered()])
def test_the_experts_of_every_family(family):
    """Each kind of experts module that a family has, by our function and by its own forward; clamps bite."""
    try:
        model = tiny_model(family)
    except UnsupportedError as reason:
        pytest.skip(str(reason))
    modules = {type(m): m for m in model.modules() if is_experts_module(m)}
    if not modules:
        pytest.skip("its experts are no module of Transformers' interface")
    for module in modules.values():
        hidden = module.down_proj.shape[2 if module.is_transposed else 1]
        count = module.down_proj.shape[0]
        ids = torch.stack([torch.randperm(count)[: min(3, count)] for _ in range(TOKENS)])
        inputs = torch.randn(TOKENS, hidden) * 3, ids, torch.rand(ids.shape)
        with torch.no_grad():
            model.set_experts_implementation("eager")
            expected = module(*inputs)
            model.set_experts_implementation("moerunner")
            if family in REFUSED:
                with pytest.raises(UnsupportedError, match=REFUSED[family]):
                    module(*inputs)
            else:
                assert relative(module(*inputs), expected) <= 2e-6


def gpt_oss(**changes):
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = GptOssConfig(vocab_size=96, num_experts_per_tok=2, **sizes, **heads, **changes)
    model = GptOssForCausalLM(config).eval()
    model.set_experts_implementation("moerunner")
    return model


def test_a_gate_of_a_known_family_follows_its_config():
    model = gpt_oss(swiglu_limit=0.01)
    with torch.no_grad():
        clamped = model(prompt()).logits
        model.set_experts_implementation("eager")
        assert relative(clamped, model(prompt()).logits) <= 1e-5
        assert relative(clamped, gpt_oss()(prompt()).logits) > 1e-3


def test_a_known_gate_with_another_source_or_another_limit_is_refused(monkeypatch):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    model = gpt_oss()
    model.model.layers[0].mlp.experts.limit = 3.0
    with pytest.raises(UnsupportedError, match="built with: limit"):
        model(prompt())
    monkeypatch.setattr(GptOssExperts, "_apply_gate", lambda self, gate_up: gate_up[..., ::2])
    with pytest.raises(UnsupportedError, match="no family was verified with"):
        gpt_oss()(prompt())


def test_a_norm_of_the_experts_output_is_refused(inputs):
    module = experts()
    module.has_post_expert_norm = True
    with pytest.raises(UnsupportedError, match="norms"):
        module(*inputs)


def test_an_activation_that_is_not_offered_is_refused(inputs):
    with pytest.raises(UnsupportedError, match="MishActivation"):
        experts(act="mish")(*inputs)


def test_quantised_weights_are_refused(inputs):
    module = experts()
    module.gate_up_proj = nn.Parameter(module.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedError, match="float8"):
        module(*inputs)


@pytest.mark.parametrize("case", ["mixtral-top2", "qwen3_moe-renormalised", "deepseek_v2-groups", "deepseek_v3-groups"])
def test_from_pretrained_takes_the_name(case, tmp_path):
    from transformers import AutoModelForCausalLM

    model = build(case)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moerunner")
    assert loaded.get_experts_implementation()[""] == "moerunner"
    with torch.no_grad():
        assert relative(loaded(prompt()).logits, model(prompt()).logits) <= 1e-5
    tokens = loaded.generate(prompt(1, 6), max_new_tokens=6, do_sample=False)
    assert torch.equal(tokens, model.generate(prompt(1, 6), max_new_tokens=6, do_sample=False))


ORDERS = {
    "moerunner first": "import moerunner\nassert 'transformers' not in sys.modules\nimport transformers",
    "transformers first": "import transformers\nimport moerunner",
    "registry first": "import transformers.integrations.moe\nimport moerunner",
}


@pytest.mark.rotating(3)
@pytest.mark.parametrize("order", ORDERS)
def test_the_name_is_known_whoever_is_imported_first(order):
    program = f"import sys\n{ORDERS[order]}\n" + textwrap.dedent("""
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        print(ALL_EXPERTS_FUNCTIONS["moerunner"].__name__)
        assert "_AfterImport" not in [type(f).__name__ for f in sys.meta_path]
    """)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["run_experts"]
