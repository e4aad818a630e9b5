"""The table of families and its language: what an entry must state, and what it cannot leave unsaid."""

import dataclasses
import inspect
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
from tiny import CASES, build
from torch import nn

import moerunner
from moerunner import SpecError, UnsupportedError
from moerunner.models import families, registry
from moerunner.models.entry import UNIVERSAL, Family, Keys, MissingKey, activation, groups, renormalised
from moerunner.spec import ActivationSpec, GroupSpec, MoESpec


class Config:
    """As much of a Transformers config as an entry sees."""

    attribute_map = {"num_experts": "num_local_experts"}

    def __init__(self, **values):
        self.__dict__.update(values)

    def __getattr__(self, name):
        if name in type(self).attribute_map:
            return getattr(self, type(self).attribute_map[name])
        raise AttributeError(name)

    def to_dict(self):
        return dict(self.__dict__)


class Nested:
    """A config inside a config."""

    def __init__(self, **values):
        self.__dict__.update(values)


def unread(config, *read, ignored=()):
    keys = Keys(config)
    for name in read:
        keys(name)
    return keys.unread(dict.fromkeys(ignored, "because"))


@pytest.mark.parametrize(
    "key",
    [
        "num_experts",
        "EXPERT_bias",
        "router_bias",
        "routed_scaling_factor",
        "moe_layers",
        "routing_method",
        "norm_topk_prob",
        "top_k_experts",
        "n_group",
        "route_scale",
        "swiglu_limit",
        "some_scaling",
        "logits_scale",
    ],
)
def test_a_key_that_may_change_the_layer_must_be_read_or_ignored(key):
    config = Config(**{key: 1})
    config.attribute_map = {}
    assert unread(config) == [key]
    assert unread(config, key) == []
    assert unread(config, ignored=[key]) == []


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "rms_norm_eps", "layer_types", "attention_bias", *UNIVERSAL])
def test_other_keys_say_nothing_about_the_layer(key):
    assert unread(Config(**{key: 1})) == []


def test_a_key_may_be_read_under_its_alias():
    config = Config(num_local_experts=8)
    assert Keys(config)("num_experts") == 8
    assert unread(config, "num_experts") == []
    assert unread(config, ignored=["num_experts"]) == []


def test_a_nested_config_is_looked_into_once_it_is_read():
    ffn = {"moe_top_k": 2, "moe_num_experts": 8, "hidden": 1}
    config = Config(ffn_config=ffn, vision_config={"num_experts": 3})
    assert unread(config) == []
    assert Keys(config)("ffn_config.moe_top_k") == 2
    assert unread(config, "ffn_config.moe_top_k") == ["ffn_config.moe_num_experts"]
    assert unread(config, "ffn_config.moe_top_k", "ffn_config.moe_num_experts") == []
    assert Keys(Config(ffn_config=Nested(moe_top_k=4)))("ffn_config.moe_top_k") == 4


@pytest.mark.parametrize("name", ["gone", "ffn_config.gone", "number.gone"])
def test_a_key_that_is_not_there_is_named(name):
    with pytest.raises(MissingKey, match=re.escape(repr(name))):
        Keys(Config(ffn_config={}, number=3))(name)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("silu", ActivationSpec(kind="silu")),
        ("gelu", ActivationSpec(kind="gelu")),
        ("gelu_pytorch_tanh", ActivationSpec(kind="gelu_tanh")),
        ("quick_gelu", ActivationSpec(kind="silu", alpha=1.702)),
        ("relu2", ActivationSpec(kind="relu2")),
    ],
)
def test_activations_by_their_name(name, spec):
    assert activation(name) == spec


def test_an_activation_that_is_not_offered():
    with pytest.raises(UnsupportedError, match="'mish'"):
        activation("mish")


def test_groups_and_renormalisation_only_where_the_config_has_them():
    assert groups(None, None, experts=16, top_k=4) is None
    assert groups(1, 1, experts=16, top_k=4) is None
    assert groups(8, 4, experts=16, top_k=4) == GroupSpec(count=8, kept=4)
    assert renormalised(None) == renormalised(False) == {}
    assert renormalised(True, eps=1e-20) == {"renormalise": "sum", "eps": 1e-20}


def test_groups_limit_nothing_where_every_expert_is_chosen():
    assert groups(2, 1, experts=8, top_k=8) is None
    for top_k, how in ((5, {}), (8, {"weighs_lost": False})):
        with pytest.raises(
            UnsupportedError, match=f"1 of 2 groups of 8 experts are kept, which hold fewer than the {top_k} chosen"
        ):
            groups(2, 1, experts=8, top_k=top_k, **how)


def test_every_entry_states_where_the_factor_goes():
    """MoESpec has no default for it, so that no entry can leave it out."""
    field = next(f for f in dataclasses.fields(MoESpec) if f.name == "apply_routed_scale_to_output")
    assert field.default is dataclasses.MISSING
    for family in families.TABLE:
        assert "apply_routed_scale_to_output=" in inspect.getsource(family.spec)


def test_every_entry_gives_a_reason_for_what_it_ignores():
    assert all(reason.strip() for family in families.TABLE for reason in family.ignored.values())


def test_the_names_of_families_stand_in_no_other_file():
    names = {f.name for f in families.TABLE} | {b.rpartition(".")[2] for f in families.TABLE for b in f.blocks}
    root = Path(moerunner.__file__).parent
    code = {p: p.read_text() for p in root.rglob("*.py") if p.name != "families.py" and p.parts[-2] in ("models", "moerunner")}
    found = [(p.name, n) for p, text in code.items() for n in names if re.search(rf"\b{n}\b", text)]
    assert not found


@pytest.mark.parametrize("case", CASES)
def test_the_blocks_of_a_family_are_found_by_their_class(case):
    family = registry.of_model_type(CASES[case][0])
    assert family is not None
    found = [m for m in build(case).modules() if registry.find(type(m)) is family]
    assert found
    assert registry.find(nn.Linear) is None


REAL = {
    "mixtral": {"router_aux_loss_coef": 0.02, "output_router_logits": False, "router_jitter_noise": 0.0},
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001},
    "deepseek_v2": {
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "seq_aux": True,
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
    },
    "deepseek_v3": {
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 1,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "topk_method": "noaux_tc",
    },
}


@pytest.mark.parametrize("name", REAL)
def test_the_keys_of_published_configs_are_all_known(name):
    from transformers import AutoConfig

    family = registry.of_model_type(name)
    assert family is not None
    config = AutoConfig.for_model(name, **{"num_experts_per_tok": 6, **REAL[name]})
    assert family.read(config, layer=1).top_k == 6


@pytest.fixture
def mixtral():
    return registry.of_model_type("mixtral")


def test_a_block_class_belongs_to_one_entry(mixtral):
    registry.register(mixtral)
    with pytest.raises(SpecError, match="taken by the family 'mixtral'"):
        registry.register(dataclasses.replace(mixtral, name="other"))
    with pytest.raises(SpecError, match="taken by the family 'mixtral'"):
        registry.register(dataclasses.replace(mixtral, blocks=("somewhere.Block",)))


class Points:
    """Entry points of one installed package."""

    found = ()

    def __call__(self, *, group):
        assert group == "moerunner.families"
        return self.found


@pytest.fixture
def installed(monkeypatch):
    points = Points()
    monkeypatch.setattr(registry, "entry_points", points)
    monkeypatch.setattr(registry, "_plugins_loaded", False)
    return points


def test_installed_packages_add_families(mixtral, installed, monkeypatch):
    one = dataclasses.replace(mixtral, name="one", blocks=("third.party.One",))
    two = dataclasses.replace(mixtral, name="two", blocks=("third.party.Two",), aliases=("deux",))
    package = ModuleType("third_party")
    package.__dict__.update(ONE=one, MORE=[two])
    monkeypatch.setitem(sys.modules, "third_party", package)
    installed.found = (
        EntryPoint("one", "third_party:ONE", registry.GROUP),
        EntryPoint("more", "third_party:MORE", registry.GROUP),
    )
    try:
        assert {"one", "two", "mixtral"} <= {f.name for f in registry.registered()}
        assert registry.of_model_type("deux") is two
    finally:
        registry.unregister("one")
        registry.unregister("two")
    assert registry.of_model_type("one") is None


def test_an_entry_point_that_does_not_load_is_named_and_harms_nobody(installed):
    installed.found = (EntryPoint("broken", "no_such_package:FAMILY", registry.GROUP),)
    with pytest.warns(UserWarning, match="no_such_package"):
        assert registry.of_model_type("mixtral") is not None


def test_entries_are_data():
    for family in families.TABLE:
        assert dataclasses.replace(family) == family
        assert isinstance(family, Family)


def test_an_entry_point_that_raises_anything_harms_nobody(installed, monkeypatch):
    class Raises(ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("registered twice")

    monkeypatch.setitem(sys.modules, "raises", Raises("raises"))
    installed.found = (EntryPoint("broken", "raises:FAMILY", registry.GROUP),)
    with pytest.warns(UserWarning, match="raises:FAMILY.*RuntimeError: registered twice"):
        assert registry.of_model_type("mixtral") is not None
