"""Families whose experts are given their choice: by a router that is the family's own, or by the caller of the block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moerunner.models.entry import Family, Keys, Router, activation, hf
from moerunner.models.families.common import EXPERTS
from moerunner.spec import ExpertsSpec, MoESpec, RoutingSpec


def _gemma4_text(c: Keys) -> MoESpec:
    return _external(c, "top_k_experts", "hidden_activation", apply_routed_scale_to_output=False)


def _zaya(c: Keys) -> MoESpec:
    return _external(c, "num_experts_per_tok", "hidden_act", apply_routed_scale_to_output=False)


def _external(c: Keys, top_k: str, act: str, *, apply_routed_scale_to_output: bool) -> MoESpec:
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("num_experts"),
        top_k=c(top_k),
        routing=RoutingSpec(score="external"),
        experts=ExpertsSpec(intermediate_size=c("moe_intermediate_size"), activation=activation(c(act))),
        apply_routed_scale_to_output=apply_routed_scale_to_output,
    )


def _without_skipped(answer: tuple[Any, ...], k: int) -> tuple[Tensor, Tensor]:
    """A token that skips the experts is marked by expert 0 with weight 0; here it has no expert."""
    _, weights, ids, _ = answer
    return weights, ids.masked_fill(weights == 0, -1)


_GEMMA4_TEXT = Family(
    name="gemma4_text",
    aliases=("gemma4",),
    blocks=hf("gemma4", "Gemma4TextExperts"),
    spec=_gemma4_text,
    weights={"w13": "gate_up_proj", "w2": "down_proj"},
    router=None,
    takes={"hidden_states": "x", "top_k_index": "ids", "top_k_weights": "weights"},
    ignored={"enable_moe_block": "whether there are blocks; they are found by their class"},
)

TABLE = (
    _GEMMA4_TEXT,
    _GEMMA4_TEXT.like(
        "diffusion_gemma_text", "DiffusionGemmaTextExperts", package="diffusion_gemma", aliases=("diffusion_gemma",), ignored={}
    ),
    Family(
        name="zaya",
        blocks=hf("zaya", "ZayaSparseMoeBlock"),
        spec=_zaya,
        weights={name: path for name, path in EXPERTS.items() if name != "gate"},
        router=Router(takes=("x", "router_state"), choice=_without_skipped),
        holds={"gate.top_k": "num_experts_per_tok"},
        takes={"hidden_states": "x", "prev_router_hidden_states": "router_state"},
        returns=("hidden", 3),
        ignored={"router_hidden_size": "the width of the router, which runs itself"},
    ),
)
