"""Families whose experts are given their choice: by a router that is the family's own, or by the caller of the block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moerunner.models.entry import Family, Joined, Keys, Router, activation, hf
from moerunner.models.families.common import EXPERTS, NOT_READ
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


def _switch_transformers(c: Keys) -> MoESpec:
    return MoESpec(
        hidden_size=c("d_model"),
        num_experts=c("num_experts"),
        top_k=1,
        routing=RoutingSpec(score="external"),
        experts=ExpertsSpec(intermediate_size=c("d_ff"), activation=activation(c("dense_act_fn")), gated=False),
        apply_routed_scale_to_output=False,
    )


def _without_skipped(answer: tuple[Any, ...], k: int) -> tuple[Tensor, Tensor]:
    """A token that skips the experts is marked by expert 0 with weight 0; here it has no expert."""
    _, weights, ids, _ = answer
    return weights, ids.masked_fill(weights == 0, -1)


def _within_capacity(answer: tuple[Any, ...], k: int) -> tuple[Tensor, Tensor]:
    """From one-hot rows over the experts; a row is 0 where the expert has all the tokens of the sequence that it takes."""
    rows, weights, _ = answer
    return weights.reshape(-1, k), rows.argmax(-1).masked_fill(rows.sum(-1) == 0, -1).reshape(-1, k)


def _without_capacity(answer: tuple[Any, ...], k: int) -> tuple[Tensor, Tensor]:
    """Until Transformers 5.17: other places, and a capacity that was counted within each token."""
    _, rows, weights = answer
    return _within_capacity((rows, weights, None), k)


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
    Family(
        name="switch_transformers",
        blocks=hf("switch_transformers", "SwitchTransformersSparseMLP"),
        spec=_switch_transformers,
        weights={"w13": Joined(("experts.expert_{}.wi.weight",)), "w2": Joined(("experts.expert_{}.wo.weight",))},
        router=Router("router", logits=2, choice=_within_capacity),
        training={
            "router.jitter_noise": "its router adds noise to its input",
            "experts.expert_0.dropout.p": "its experts drop activations",
        },
        ignored=dict.fromkeys(("expert_capacity", "router_bias", "router_dtype"), "read by the router, which runs itself")
        | dict.fromkeys(("router_ignore_padding_tokens", "add_router_probs"), NOT_READ)
        | {"router_jitter_noise": "noise in training only: see training", "router_z_loss_coef": "training loss"},
        older={"becf2561": {"router": Router("router", flat=True, logits=None, choice=_without_capacity)}},
    ),
)
