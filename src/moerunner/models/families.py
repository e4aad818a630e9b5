"""The table of model families: one entry each, nowhere else a family's name. What the fields mean: `entry.Family`.

Every entry was compared with Transformers' modelling source, block by block (tests/models).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any

from moerunner.errors import SpecError, UnsupportedError
from moerunner.models.entry import Family, Keys, Router, View, activation, groups, hf, renormalised
from moerunner.spec import ExpertsSpec, MoESpec, RoutingSpec, SharedSpec

_EXPERTS = {"gate": "gate.weight", "w13": "experts.gate_up_proj", "w2": "experts.down_proj"}
_SHARED = {
    "shared_gate_proj": "shared_experts.gate_proj.weight",
    "shared_up_proj": "shared_experts.up_proj.weight",
    "shared_w2": "shared_experts.down_proj.weight",
}
_GATED_SHARED = {
    "shared_gate_proj": "shared_expert.gate_proj.weight",
    "shared_up_proj": "shared_expert.up_proj.weight",
    "shared_w2": "shared_expert.down_proj.weight",
    "shared_gate": "shared_expert_gate.weight",
}
_CORRECTED = _EXPERTS | _SHARED | {"selection_bias": "gate.e_score_correction_bias"}
_AT_ROUTER = _EXPERTS | {"gate": "router.weight"}
_HOLDS_NORM = {"gate.top_k": "num_experts_per_tok", "gate.norm_topk_prob": "norm_topk_prob"}
_HOLDS_GROUPS = _HOLDS_NORM | {
    "gate.routed_scaling_factor": "routed_scaling_factor",
    "gate.num_group": "n_group",
    "gate.topk_group": "topk_group",
}
_PLACEMENT = "which layers are MoE; blocks are found by their class"


def _mixtral(c: Keys) -> MoESpec:
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("num_local_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(score="softmax", logits_dtype="model", renormalise="sum"),
        experts=ExpertsSpec(intermediate_size=c("intermediate_size"), activation=activation(c("hidden_act"))),
        apply_routed_scale_to_output=False,
    )


def _softmax(c: Keys, width: str, shared: SharedSpec | None = None, *, apply_routed_scale_to_output: bool) -> MoESpec:
    """Softmax of logits in the model's dtype, as in OLMoE and Qwen. width: the key of the experts' intermediate size."""
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("num_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(score="softmax", logits_dtype="model", **renormalised(c("norm_topk_prob"))),
        experts=ExpertsSpec(intermediate_size=c(width), activation=activation(c("hidden_act"))),
        shared=shared,
        apply_routed_scale_to_output=apply_routed_scale_to_output,
    )


def _olmoe(c: Keys) -> MoESpec:
    return _softmax(c, "intermediate_size", apply_routed_scale_to_output=False)


def _qwen3_moe(c: Keys) -> MoESpec:
    return _softmax(c, "moe_intermediate_size", apply_routed_scale_to_output=False)


def _qwen2_moe(c: Keys) -> MoESpec:
    width = c("shared_expert_intermediate_size")
    shared = SharedSpec(width=width, gate="sigmoid", activation=activation(c("hidden_act")))
    return _softmax(c, "moe_intermediate_size", shared, apply_routed_scale_to_output=False)


def _deepseek_v2(c: Keys) -> MoESpec:
    limits = groups(c("n_group"), c("topk_group"), score="max", fill="zero")
    method = c("topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise UnsupportedError(f"topk_method {method!r} is not defined by this family's own code")
    if c("mlp_bias"):
        raise UnsupportedError("shared experts whose gate and up projections have a bias are not offered")
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("n_routed_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(score="softmax", groups=limits if method == "group_limited_greedy" else None),
        experts=ExpertsSpec(intermediate_size=c("moe_intermediate_size"), activation=activation(c("hidden_act"))),
        shared=_plain_shared(c, "n_shared_experts"),
        routed_scaling_factor=c("routed_scaling_factor"),
        apply_routed_scale_to_output=False,
    )


def _grouped_sigmoid(c: Keys, experts: str, shared: str, *, apply_routed_scale_to_output: bool) -> MoESpec:
    """DeepSeek-V3's routing, which many families took over under other keys for the number of routed and shared experts."""
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c(experts),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(
            score="sigmoid",
            selection_bias=True,
            groups=groups(c("n_group"), c("topk_group")),
            **renormalised(c("norm_topk_prob"), eps=1e-20),
        ),
        experts=ExpertsSpec(intermediate_size=c("moe_intermediate_size"), activation=activation(c("hidden_act"))),
        shared=_plain_shared(c, shared),
        routed_scaling_factor=c("routed_scaling_factor"),
        apply_routed_scale_to_output=apply_routed_scale_to_output,
    )


def _deepseek_v3(c: Keys) -> MoESpec:
    return _grouped_sigmoid(c, "n_routed_experts", "n_shared_experts", apply_routed_scale_to_output=False)


def _exaone_moe(c: Keys) -> MoESpec:
    return _grouped_sigmoid(c, "num_experts", "num_shared_experts", apply_routed_scale_to_output=False)


def _ernie4_5_moe(c: Keys) -> MoESpec:
    if c("use_bias"):
        raise UnsupportedError("shared experts whose gate and up projections have a bias are not offered")
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("moe_num_experts"),
        top_k=c("moe_k"),
        routing=RoutingSpec(score="softmax", selection_bias=True, renormalise="max_sum", eps=c("moe_norm_min")),
        experts=ExpertsSpec(intermediate_size=c("moe_intermediate_size"), activation=activation(c("hidden_act"))),
        shared=_plain_shared(c, "moe_num_shared_experts") if c("moe_num_shared_experts") else None,
        apply_routed_scale_to_output=False,
    )


def _jamba(c: Keys) -> MoESpec:
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("num_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(score="softmax", logits_dtype="model"),
        experts=ExpertsSpec(intermediate_size=c("intermediate_size"), activation=activation(c("hidden_act"))),
        apply_routed_scale_to_output=False,
    )


def _granitemoe(c: Keys) -> MoESpec:
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("num_local_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(score="softmax_topk", choose="logit", logits_dtype="model"),
        experts=ExpertsSpec(intermediate_size=c("intermediate_size"), activation=activation(c("hidden_act"))),
        apply_routed_scale_to_output=False,
    )


def _plain_shared(c: Keys, count: str) -> SharedSpec:
    return SharedSpec(width=c("moe_intermediate_size"), count=c(count), activation=activation(c("hidden_act")))


TABLE = (
    Family(
        name="mixtral",
        blocks=hf("mixtral", "MixtralSparseMoeBlock"),
        spec=_mixtral,
        weights=_EXPERTS,
        router=Router(flat=True),
        holds={"gate.top_k": "num_experts_per_tok"},
        training_noise="jitter_noise",
        ignored={"router_jitter_noise": "noise in training only: see training_noise"},
    ),
    Family(
        name="qwen3_moe",
        blocks=hf("qwen3_moe", "Qwen3MoeSparseMoeBlock"),
        spec=_qwen3_moe,
        weights=_EXPERTS,
        router=Router(flat=True),
        holds=_HOLDS_NORM,
    ),
    Family(
        name="deepseek_v2",
        blocks=hf("deepseek_v2", "DeepseekV2Moe"),
        spec=_deepseek_v2,
        weights=_EXPERTS | _SHARED,
        holds={
            "gate.top_k": "num_experts_per_tok",
            "gate.routed_scaling_factor": "routed_scaling_factor",
            "gate.topk_method": "topk_method",
            "gate.num_group": "n_group",
            "gate.topk_group": "topk_group",
        },
        ignored={"norm_topk_prob": "Transformers never renormalises in this family", "moe_layer_freq": _PLACEMENT},
    ),
    Family(
        name="deepseek_v3",
        blocks=hf("deepseek_v3", "DeepseekV3MoE"),
        spec=_deepseek_v3,
        weights=_CORRECTED,
        holds=_HOLDS_GROUPS,
        ignored={"topk_method": "Transformers knows one method in this family", "moe_layer_freq": _PLACEMENT},
    ),
    Family(
        name="olmoe",
        blocks=hf("olmoe", "OlmoeSparseMoeBlock"),
        spec=_olmoe,
        weights=_EXPERTS,
        router=Router(flat=True),
        holds=_HOLDS_NORM,
    ),
    Family(
        name="qwen2_moe",
        blocks=hf("qwen2_moe", "Qwen2MoeSparseMoeBlock"),
        spec=_qwen2_moe,
        weights=_EXPERTS | _GATED_SHARED,
        router=Router(flat=True),
        holds=_HOLDS_NORM,
    ),
    Family(
        name="qwen3_next",
        blocks=hf("qwen3_next", "Qwen3NextSparseMoeBlock"),
        spec=_qwen2_moe,
        weights=_EXPERTS | _GATED_SHARED,
        router=Router(flat=True),
        holds=_HOLDS_NORM,
    ),
    Family(
        name="glm4_moe",
        blocks=hf("glm4_moe", "Glm4MoeMoE"),
        spec=_deepseek_v3,
        weights=_CORRECTED,
        holds=_HOLDS_GROUPS,
    ),
    Family(
        name="glm4_moe_lite",
        blocks=hf("glm4_moe_lite", "Glm4MoeLiteMoE"),
        spec=_deepseek_v3,
        weights=_CORRECTED,
        holds=_HOLDS_GROUPS,
    ),
    Family(
        name="exaone_moe",
        blocks=hf("exaone_moe", "ExaoneMoeSparseMoEBlock"),
        spec=_exaone_moe,
        weights=_CORRECTED,
        holds=_HOLDS_GROUPS,
    ),
    Family(
        name="kimi_linear",
        blocks=hf("kimi_linear", "KimiLinearMoE"),
        spec=_exaone_moe,
        weights=_CORRECTED,
        holds=_HOLDS_GROUPS,
    ),
    Family(
        name="ernie4_5_moe",
        blocks=hf("ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock"),
        spec=_ernie4_5_moe,
        weights=_EXPERTS | _SHARED | {"selection_bias": View("gate.moe_statics.e_score_correction_bias", "reshaped")},
        router=Router(flat=True),
        holds={"gate.top_k": "moe_k", "gate.norm_min": "moe_norm_min"},
        ignored=dict.fromkeys(("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"), _PLACEMENT),
    ),
    Family(
        name="flex_olmo",
        blocks=hf("flex_olmo", "FlexOlmoSparseMoeBlock"),
        spec=_olmoe,
        weights=_EXPERTS,
        router=Router(flat=True),
        holds=_HOLDS_NORM,
    ),
    Family(
        name="jamba",
        blocks=hf("jamba", "JambaSparseMoeBlock"),
        spec=_jamba,
        weights=_AT_ROUTER,
        router=Router("router", flat=True),
        holds={"router.top_k": "num_experts_per_tok"},
        ignored=dict.fromkeys(("expert_layer_period", "expert_layer_offset"), _PLACEMENT),
    ),
    Family(
        name="granitemoe",
        blocks=hf("granitemoe", "GraniteMoeMoE"),
        spec=_granitemoe,
        weights=_AT_ROUTER,
        router=Router("router", flat=True),
        holds={"router.top_k": "num_experts_per_tok"},
        takes={"layer_input": "x"},
        ignored={"logits_scaling": "the language model's head"},
    ),
    Family(
        name="dots1",
        blocks=hf("dots1", "Dots1MoE"),
        spec=_deepseek_v3,
        weights=_CORRECTED,
        holds=_HOLDS_GROUPS,
    ),
)

GROUP = "moerunner.families"
_by_class: dict[str, Family] = {}
_plugins_loaded = False


def register(family: Family) -> Family:
    """Adds a family. Doing it again with the same entry changes nothing.

    Raises:
        SpecError: one of its block classes, or its name, already belongs to another entry.
    """
    for known in {id(f): f for f in _by_class.values()}.values():
        if known is not family and known != family and (known.name == family.name or set(known.blocks) & set(family.blocks)):
            raise SpecError(f"its name or a block class is taken by the family {known.name!r}", where=f"family {family.name!r}")
    _by_class.update(dict.fromkeys(family.blocks, family))
    return family


def unregister(name: str) -> None:
    """Takes back `register`."""
    for block in [block for block, family in _by_class.items() if family.name == name]:
        del _by_class[block]


def registered() -> list[Family]:
    """Every known family, by name: the table, what `register` added, and the entry points of installed packages."""
    _load_plugins()
    return sorted({f.name: f for f in _by_class.values()}.values(), key=lambda f: f.name)


def find(block: type) -> Family | None:
    """The family of a block class: of the class in its ancestry whose `forward` runs."""
    _load_plugins()
    owner = forward_owner(block)
    return _by_class.get(f"{owner.__module__}.{owner.__qualname__}")


def of_model_type(model_type: str) -> Family | None:
    """The family that a config's `model_type` names, if any. Blocks of a built model are found by `find`."""
    return next((f for f in registered() if model_type in (f.name, *f.aliases)), None)


def forward_owner(kind: type) -> type:
    """The class in the ancestry of `kind` that defines the `forward` it runs."""
    return next(c for c in kind.__mro__ if "forward" in c.__dict__)


def _load_plugins() -> None:
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True
    for point in entry_points(group=GROUP):
        try:
            loaded: Any = point.load()
        except (ImportError, AttributeError) as error:
            warnings.warn(f"the entry point {point.value!r} in {GROUP} does not load: {error}", stacklevel=2)
            continue
        for family in loaded if isinstance(loaded, Iterable) else (loaded,):
            register(family)


for _family in TABLE:
    register(_family)
