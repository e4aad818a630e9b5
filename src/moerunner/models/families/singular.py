"""Families that score by a softmax over all logits and have something that no other family has.

Experts by token type, experts that do nothing, a choice of two that mixes, weights without a dimension for the expert.
"""

from __future__ import annotations

from moerunner.models.entry import Family, Joined, Keys, Router, View, activation, hf
from moerunner.models.families.common import AT_ROUTER, EXPERTS, NOT_READ, PLACEMENT, SHARED, SHARED_BIASES
from moerunner.spec import ExpertsSpec, MoESpec, RoutingSpec, SharedSpec


def _ernie(c: Keys, *widths: int, apply_routed_scale_to_output: bool) -> MoESpec:
    """widths: intermediate size of each set of experts; shared experts are as wide as those of the first."""
    act, least, shared, sets = activation(c("hidden_act")), c("moe_norm_min"), c("moe_num_shared_experts"), len(widths)
    bias = bool(c("use_bias"))
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("moe_num_experts") * sets,
        top_k=c("moe_k"),
        routing=RoutingSpec(
            score="softmax",
            selection_bias=True,
            renormalise="max_sum" if least else "sum",
            eps=least,
            modalities=sets,
        ),
        experts=ExpertsSpec(intermediate_size=widths if sets > 1 else widths[0], activation=act),
        shared=SharedSpec(width=widths[0], count=shared, activation=act, bias=bias) if shared else None,
        apply_routed_scale_to_output=apply_routed_scale_to_output,
    )


def _ernie4_5_moe(c: Keys) -> MoESpec:
    return _ernie(c, c("moe_intermediate_size"), apply_routed_scale_to_output=False)


def _ernie4_5_vl_moe(c: Keys) -> MoESpec:
    """Text tokens have experts of their own, and so have images and videos."""
    return _ernie(c, *c("moe_intermediate_size"), apply_routed_scale_to_output=False)


def _longcat_flash(c: Keys) -> MoESpec:
    act = activation(c("hidden_act"))
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("n_routed_experts"),
        top_k=c("moe_topk"),
        routing=RoutingSpec(score="softmax", selection_bias=True),
        experts=ExpertsSpec(intermediate_size=c("expert_ffn_hidden_size"), activation=act),
        zero_experts=c("zero_expert_num") or 0,
        routed_scaling_factor=c("routed_scaling_factor"),
        apply_routed_scale_to_output=False,
    )


def _phimoe(c: Keys) -> MoESpec:
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("num_local_experts"),
        top_k=2,
        routing=RoutingSpec(score="sparsemixer", jitter=c("router_jitter_noise"), logits_dtype="model"),
        experts=ExpertsSpec(intermediate_size=c("intermediate_size"), activation=activation(c("hidden_act"))),
        apply_routed_scale_to_output=False,
    )


def _dbrx(c: Keys) -> MoESpec:
    p, act = c("ffn_config.moe_normalize_expert_weights"), activation(c("ffn_config.ffn_act_fn").get("name", "silu"))
    return MoESpec(
        hidden_size=c("d_model"),
        num_experts=c("ffn_config.moe_num_experts"),
        top_k=c("ffn_config.moe_top_k"),
        routing=RoutingSpec(score="softmax", logits_dtype="model", **({} if p is None else {"renormalise": "p_norm", "p": p})),
        experts=ExpertsSpec(intermediate_size=c("ffn_config.ffn_hidden_size"), activation=act),
        apply_routed_scale_to_output=False,
    )


_ERNIE_BIAS = "gate.moe_statics.e_score_correction_bias"
_ERNIE_HOLDS = {"top_k": "moe_k", "norm_min": "moe_norm_min"}

_ERNIE = Family(
    name="ernie4_5_moe",
    blocks=hf("ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock"),
    spec=_ernie4_5_moe,
    weights=EXPERTS | SHARED | SHARED_BIASES | {"selection_bias": View(_ERNIE_BIAS, "reshaped")},
    router=Router(flat=True),
    holds={f"gate.{name}": key for name, key in _ERNIE_HOLDS.items()},
    ignored={
        **dict.fromkeys(("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"), PLACEMENT),
        **dict.fromkeys(("moe_capacity", "moe_gate", "moe_gate_act", "moe_use_aux_free"), NOT_READ),
    },
)

TABLE = (
    _ERNIE,
    _ERNIE.like(
        "ernie4_5_vl_moe_text",
        "Ernie4_5_VLMoeMoeBlock",
        package="ernie4_5_vl_moe",
        aliases=("ernie4_5_vl_moe",),
        spec=_ernie4_5_vl_moe,
        weights=SHARED
        | SHARED_BIASES
        | {
            "gate": Joined(("text_moe.gate.weight", "vision_moe.gate.weight")),
            "selection_bias": Joined(
                (View(f"text_moe.{_ERNIE_BIAS}", "reshaped"), View(f"vision_moe.{_ERNIE_BIAS}", "reshaped"))
            ),
            "w13.0": "text_moe.experts.gate_up_proj",
            "w13.1": "vision_moe.experts.gate_up_proj",
            "w2.0": "text_moe.experts.down_proj",
            "w2.1": "vision_moe.experts.down_proj",
        },
        router=None,
        takes={"hidden_states": "x", "moe_mm_token_type_ids": "token_types"},
        returns=("hidden", "logits"),
        holds={f"{one}.gate.{name}": key for one in ("text_moe", "vision_moe") for name, key in _ERNIE_HOLDS.items()},
    ),
    Family(
        name="longcat_flash",
        blocks=hf("longcat_flash", "LongcatFlashMoE"),
        spec=_longcat_flash,
        weights=EXPERTS
        | {
            "gate": "router.classifier.weight",
            "selection_bias": "router.e_score_correction_bias",
            "w13": View("experts.gate_up_proj", "leading"),
        },
        router=Router("router"),
        holds={"router.top_k": "moe_topk", "router.routed_scaling_factor": "routed_scaling_factor"},
        older={"712bf42a": {"router": Router("router", logits=None, weights=0, ids=1)}},  # until Transformers 5.18
        ignored={"router_bias": "Transformers makes this bias and never adds it"}
        | dict.fromkeys(("mla_scale_q_lora", "mla_scale_kv_lora"), "attention")
        | dict.fromkeys(("norm_topk_prob", "router_dtype", "topk_method", "zero_expert_type"), NOT_READ),
    ),
    Family(
        name="phimoe",
        blocks=hf("phimoe", "PhimoeSparseMoeBlock"),
        spec=_phimoe,
        weights=AT_ROUTER,
        router=Router("router", flat=True),
        holds={"router.router_jitter_noise": "router_jitter_noise"},
        training={"": "it draws its experts at random"},
        ignored={
            "num_experts_per_tok": "the scheme chooses two, whatever this says",
            "input_jitter_noise": "noise in training only: see training",
        },
    ),
    Family(
        name="dbrx",
        blocks=hf("dbrx", "DbrxFFN"),
        spec=_dbrx,
        weights={
            "gate": "router.layer.weight",
            "w13": Joined((View("experts.mlp.w1", "reshaped"), View("experts.mlp.v1", "reshaped")), dim=1),
            "w2": View("experts.mlp.w2", "reshaped transposed"),
        },
        router=Router("router", choice="route_tokens_to_experts"),
        holds={
            "top_k": "ffn_config.moe_top_k",
            "moe_normalize_expert_weights": "ffn_config.moe_normalize_expert_weights",
        },
        training={"router.moe_jitter_eps": "it adds noise to its input"},
        ignored={
            "ffn_config.moe_jitter_eps": "noise in training only: see training",
            "ffn_config.moe_loss_weight": "training loss",
        },
    ),
)
