"""Families with layers that look up a token's experts in a table by its id."""

from __future__ import annotations

from dataclasses import replace

from moerunner.errors import UnsupportedError
from moerunner.models.entry import Family, Keys, Router, activation, hf
from moerunner.models.families.common import CORRECTED, NOT_READ, SHARED_BIASES
from moerunner.spec import ExpertsSpec, MoESpec, RoutingSpec, SharedSpec


def _deepseek_v4(c: Keys) -> MoESpec:
    """In either kind of layer, the weights are the scores of the chosen experts."""
    score, width = c("scoring_func"), c("moe_intermediate_size")
    if score not in ("sqrtsoftplus", "sigmoid"):
        raise UnsupportedError(f"scoring_func {score!r} is not offered", next_step="Known: sqrtsoftplus, sigmoid")
    by_table = c.here("mlp_layer_types") == "hash_moe"
    act = replace(activation(c("hidden_act")), limit=c("swiglu_limit"))
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("n_routed_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(
            score=score,
            choose="hash" if by_table else "score",
            selection_bias=not by_table,
            logits_dtype="model",
            renormalise="sum",
            eps=1e-20,
        ),
        experts=ExpertsSpec(intermediate_size=width, activation=act),
        shared=SharedSpec(width=width, activation=act, bias=c("mlp_bias")),
        routed_scaling_factor=c("routed_scaling_factor"),
        apply_routed_scale_to_output=False,
    )


TABLE = (
    Family(
        name="deepseek_v4",
        blocks=hf("deepseek_v4", "DeepseekV4SparseMoeBlock"),
        spec=_deepseek_v4,
        weights=CORRECTED | SHARED_BIASES | {"hash_table": "gate.tid2eid"},
        router=Router(takes=("x", "input_ids")),
        holds={
            "gate.top_k": "num_experts_per_tok",
            "gate.routed_scaling_factor": "routed_scaling_factor",
            "experts.limit": "swiglu_limit",
            "shared_experts.limit": "swiglu_limit",
        },
        takes={"hidden_states": "x", "input_ids": "input_ids"},
        ignored={
            **dict.fromkeys(("n_shared_experts", "norm_topk_prob", "router_jitter_noise", "topk_method"), NOT_READ),
            "expert_dtype": "seen in the weights themselves",
            "o_groups": "attention",
        },
    ),
)
