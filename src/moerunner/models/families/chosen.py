"""Families that choose by the logits and weigh by the chosen logits alone."""

from __future__ import annotations

from moerunner.models.entry import Family, Keys, Router, activation, hf
from moerunner.models.families.common import (
    AT_ROUTER,
)
from moerunner.spec import ExpertsSpec, MoESpec, RoutingSpec


def _granitemoe(c: Keys) -> MoESpec:
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("num_local_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(score="softmax_topk", choose="logit", logits_dtype="model"),
        experts=ExpertsSpec(intermediate_size=c("intermediate_size"), activation=activation(c("hidden_act"))),
        apply_routed_scale_to_output=False,
    )


TABLE = (
    Family(
        name="granitemoe",
        blocks=hf("granitemoe", "GraniteMoeMoE"),
        spec=_granitemoe,
        weights=AT_ROUTER,
        router=Router("router", flat=True),
        holds={"router.top_k": "num_experts_per_tok"},
        takes={"layer_input": "x"},
        ignored={"logits_scaling": "the language model's head"},
    ),
)
