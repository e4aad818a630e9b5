"""The support matrix says what the entries say, and docs/families.md is the matrix."""

import dataclasses
import json
from pathlib import Path

import pytest
import transformers

from moerunner.models import Family, Joined, View, matrix, registry, words
from moerunner.models.families import LEFT_ALONE
from moerunner.spec import (
    ActivationSpec,
    ExpertsSpec,
    GroupSpec,
    Linear,
    MoESpec,
    RMSNorm,
    RoutingSpec,
    SharedSpec,
    TransformSpec,
)

ON_INPUT = "weights on the experts' input"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


def spec(routing=None, experts=None, **changes):
    changes = {"apply_routed_scale_to_output": False, **changes}
    return MoESpec(
        hidden_size=16,
        num_experts=8,
        top_k=2,
        routing=RoutingSpec(**(routing or {})),
        experts=ExpertsSpec(intermediate_size=4, **(experts or {})),
        **changes,
    )


# ---- words


@pytest.mark.parametrize(
    ("routing", "said"),
    [
        ({}, "softmax"),
        ({"score": "sigmoid", "selection_bias": True}, "sigmoid, correction bias in the choice"),
        ({"score": "softmax_topk", "choose": "logit"}, "softmax of the chosen logits"),
        ({"score": "sqrtsoftplus", "choose": "hash"}, "sqrt(softplus), chosen by a table of token ids"),
        ({"choose": "logit"}, "softmax, chosen by logit"),
        ({"groups": GroupSpec(count=4, kept=2)}, "softmax, 2 of 4 groups by their two best"),
        ({"groups": GroupSpec(count=4, kept=2, score="max")}, "softmax, 2 of 4 groups by their best"),
        ({"renormalise": "sum"}, "softmax, weights / sum"),
        ({"renormalise": "sum", "eps": 1e-20}, "softmax, weights / (sum + 1e-20)"),
        ({"renormalise": "max_sum", "eps": 0.5}, "softmax, weights / max(sum, 0.5)"),
        ({"renormalise": "p_norm", "p": 1.0}, "softmax, weights / 1-norm"),
        ({"logit_bias": True, "logit_scale": 0.5}, "softmax, bias on the logits, logits times 0.5"),
        ({"logit_softcap": 30.0}, "softmax, logits capped at 30.0"),
        (
            {"weights_on": "input", "per_expert_scale": True},
            "softmax, a learned scale per expert, weights on the experts' input",
        ),
        ({"simulate": "uniform"}, "random (uniform)"),
    ],
)
def test_a_rule_in_words(routing, said):
    assert words.routing(spec(routing)) == said


def test_the_factor_in_words():
    assert words.factor(spec()) == "none"
    assert words.factor(spec(routed_scaling_factor=2.5)) == "2.5 on the weights"
    assert words.factor(spec(routed_scaling_factor=2.5, apply_routed_scale_to_output=True)) == "2.5 on the output"
    assert words.factor(spec(routed_scaling_factor=2.5), sizes=False) == "on the weights"


def test_shared_experts_in_words():
    assert words.shared(spec()) == "none"
    assert words.shared(spec(shared=SharedSpec(width=4, count=2, gate="sigmoid"))) == "2 of width 4, sigmoid gate"
    other = SharedSpec(width=4, bias=True, activation=ActivationSpec(kind="gelu"))
    assert words.shared(spec(shared=other), sizes=False) == "yes, biases, gelu"


def test_an_activation_in_words():
    assert words.activation(ActivationSpec(), gated=True) == "silu"
    assert words.activation(ActivationSpec(kind="swigluoai"), gated=True) == "silu, alpha 1.702, beta 1, clamp at 7"
    assert words.activation(ActivationSpec(limit=2.0, clamp_after=True), gated=True) == "silu, clamp at 2 afterwards"
    assert words.activation(ActivationSpec(kind="relu2"), gated=False) == "relu2, not gated"


def test_what_few_layers_have_in_words():
    down, up = (
        TransformSpec((Linear(in_features=16, out_features=8),)),
        TransformSpec((Linear(in_features=8, out_features=16),)),
    )
    latent = spec(input_transform=down, output_transform=up, zero_experts=3, output_bias=True, experts={"bias": True})
    assert words.specials(latent) == ["latent width 8", "biases in the experts", "3 zero experts", "bias on the output"]
    assert words.transforms(latent)["input_transform"] == "Linear 16 to 8"
    normed = spec(final_transform=TransformSpec((RMSNorm(features=16),)), experts={"row_norm": RMSNorm(features=16)})
    assert words.specials(normed) == ["norm of each expert's row", "a transform after the sum"]


# ---- rows


class Config:
    """A default config of a class that Transformers does not have."""

    sub_configs: dict = {}

    def __init__(self, **values):
        keys = {"hidden_size": 16, "num_experts": 8, "top_k": 2, "num_hidden_layers": 3, "norm": False, "factor": 1.0}
        self.__dict__.update({**keys, "clamp": [None, 1.5, None], "act": "silu", **values})

    def to_dict(self):
        return dict(self.__dict__)


def entry(**changes):
    def read(c):
        return MoESpec(
            hidden_size=c("hidden_size"),
            num_experts=c("num_experts"),
            top_k=c("top_k"),
            routing=RoutingSpec(score="sigmoid", renormalise="sum" if c("norm") else "none"),
            experts=ExpertsSpec(intermediate_size=4, activation=ActivationSpec(kind=c("act"), limit=c("clamp")[c.layer or 0])),
            routed_scaling_factor=c("factor"),
            apply_routed_scale_to_output=True,
        )

    return Family(name="toy", blocks=("somewhere.Block",), spec=read, weights={}, **changes)


@pytest.fixture
def default(monkeypatch):
    """Makes this the default config of every model type."""
    return lambda config: monkeypatch.setattr(transformers.AutoConfig, "for_model", lambda _: config)


def test_a_row_names_the_keys_that_change_it(default):
    default(Config())
    row = matrix.row(entry(gate_up="interleaved", aliases=("other",)))
    assert row.score == "sigmoid"
    assert row.renormalise == "weights / sum [norm]"
    assert row.factor == "on the output [factor]"
    assert row.activation == "silu or silu, clamp at 1.5 [act]"
    assert row.shared == row.groups == "none"
    assert row.specials == ["gate and up rows interleaved"]
    cells = ["toy, other", "sigmoid", "weights / sum [norm]", "on the output [factor]", "", row.activation, *row.specials]
    assert row.cells() == [*cells, ""]


def test_keys_that_only_work_together_are_named_together(default):
    default(Config(n_group=None, topk_group=None))

    def grouped(c):
        count, kept = c("n_group"), c("topk_group")
        groups = GroupSpec(count=count, kept=kept) if count and kept else None
        return dataclasses.replace(entry().spec(c), routing=RoutingSpec(groups=groups))

    assert matrix.row(dataclasses.replace(entry(), spec=grouped)).groups == "groups by their two best [n_group, topk_group]"


def test_a_row_of_a_tower_and_one_of_a_config_that_leaves_sizes_open(default):
    tower = Config(top_k=None)
    outer = Config()
    del outer.num_experts
    outer.sub_configs, outer.text_config = {"text_config": Config}, tower
    default(outer)
    assert matrix.row(entry()).reason == ""
    assert matrix.row(entry()).score == "sigmoid"


@pytest.mark.parametrize(
    ("stored", "said"), [("experts.w", []), (View("experts.w", "transposed"), ["weights stored transposed"])]
)
def test_a_row_says_how_weights_are_stored(default, stored, said):
    default(Config())
    assert matrix.row(dataclasses.replace(entry(), weights={"w13": stored})).specials == said
    joined = Joined((stored,))
    assert matrix.row(dataclasses.replace(entry(), weights={"w13": joined})).specials == said


def test_a_family_that_transformers_does_not_have_is_listed_with_that_reason():
    row = matrix.row(entry())
    assert row.reason == f"Transformers {transformers.__version__} does not have it"
    assert row.cells()[:2] == ["toy", row.reason]


def test_a_family_whose_config_says_too_little_is_listed_with_that_reason(default):
    default(Config(num_experts=0))
    assert "num_experts" in matrix.row(entry()).reason


def test_releases_between_which_none_is_missing_are_a_span(monkeypatch):
    known = ["5.17.0", "5.18.0", "5.20.2", "5.23.0"]
    monkeypatch.setattr(matrix.reference, "releases", lambda: known)
    for releases, said in ((known[1:], "5.18.0 to 5.23.0"), (known[3:], "5.23.0"), (known[::2], "5.17.0, 5.20.2"), ([], "")):
        assert matrix.Row("toy", [], [], verified=releases).cells()[-1] == said
        assert matrix.Row("toy", [], [], verified=releases, reason="absent").cells()[-1] == said


# ---- the whole


@pytest.fixture(scope="module")
def whole():
    return matrix.collect()


def test_every_family_of_the_table_can_be_put_in_words(whole):
    assert [row.name for row in whole.rows] == [family.name for family in registry.registered()]
    absent = [row for row in whole.rows if row.reason and "does not have it" not in row.reason]
    assert not absent
    assert set(whole.left_alone) == {name.rpartition(".")[2] for name in LEFT_ALONE}


def test_the_matrix_goes_to_json(whole):
    data = json.loads(json.dumps(whole.to_dict()))
    assert {row["name"] for row in data["rows"]} == {row.name for row in whole.rows}


def test_a_bar_in_a_cell_does_not_end_it():
    row = matrix.Row("a|b", [], [], score="softmax")
    assert "| a\\|b | softmax |" in matrix.Matrix("5.0", [row], {}).markdown()


def test_the_page_of_families_is_the_matrix(whole):
    page = PAGE.read_text(encoding="utf-8")
    if f"in Transformers {transformers.__version__}," not in page:
        pytest.skip("docs/families.md was made with another release of Transformers, whose defaults may differ")
    assert page == whole.markdown(), "make it again: moerunner families --markdown > docs/families.md"
