"""Families that choose by the logits and weigh by the chosen logits alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moerunner.models.entry import Family, Keys, Router, View, activation, hf, renormalised
from moerunner.models.families.common import (
    AT_ROUTER,
    CORRECTED,
    EXPERTS,
    HOLDS_NORM,
    ONE_SHARED,
    PLACEMENT,
    SHARED,
    SHARED_BIASES,
)
from moerunner.spec import ActivationSpec, ExpertsSpec, MoESpec, RoutingSpec, SharedSpec

_TRANSPOSED = AT_ROUTER | {"w13": View("experts.gate_up_proj", "transposed"), "w2": View("experts.down_proj", "transposed")}
_BIASED = _TRANSPOSED | {
    "gate_bias": "router.bias",
    "b13": "experts.gate_up_proj_bias",
    "b2": "experts.down_proj_bias",
}
_HOLDS_TOP_K = {"router.top_k": "num_experts_per_tok"}
_HEAD = "the language model's head"
_IDS_FIRST = {"router": Router("router", flat=True, logits=2, weights=1, ids=0)}  # until Transformers 5.20


def _swiglu_alpha(c: Keys) -> float:
    return c("swiglu_alpha", 1.702)


def _swiglu_limit(c: Keys) -> float:
    return c("swiglu_limit", 7.0)


_HOLDS_OAI = _HOLDS_TOP_K | {"experts.alpha": _swiglu_alpha, "experts.limit": _swiglu_limit}


def _granitemoe(c: Keys) -> MoESpec:
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("num_local_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(score="softmax_topk", choose="logit", logits_dtype="model"),
        experts=ExpertsSpec(intermediate_size=c("intermediate_size"), activation=activation(c("hidden_act"))),
        apply_routed_scale_to_output=False,
    )


def _aria_text(c: Keys) -> MoESpec:
    """The routed experts are always silu; the shared ones follow the config. Without any, a bias of theirs is still added."""
    count, width, bias, act = c("moe_num_shared_experts"), c("intermediate_size"), c("mlp_bias"), activation(c("hidden_act"))
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("moe_num_experts"),
        top_k=c("moe_topk"),
        routing=RoutingSpec(score="softmax_topk", choose="logit", logits_dtype="model"),
        experts=ExpertsSpec(intermediate_size=width),
        shared=SharedSpec(width=width, count=count, activation=act, bias=bias) if count else None,
        output_bias=bias and not count,
        apply_routed_scale_to_output=False,
    )


def _cohere2_moe(c: Keys) -> MoESpec:
    act, shared, join = activation(c("hidden_act")), c("num_shared_experts"), c("shared_expert_combination_strategy")
    score: Any = f"{c('expert_selection_fn')}_topk"
    norm = c("norm_topk_prob") and score == "sigmoid_topk"
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("num_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(score=score, choose="logit", logits_dtype="model", **renormalised(norm)),
        experts=ExpertsSpec(intermediate_size=c("intermediate_size"), activation=act),
        shared=SharedSpec(width=c("intermediate_size"), count=shared, activation=act) if shared else None,
        join=join if shared else "sum",
        apply_routed_scale_to_output=False,
    )


def _oai(c: Keys, logits_dtype: Any, *, apply_routed_scale_to_output: bool) -> MoESpec:
    """OpenAI's experts: biases everywhere, a clamped gate."""
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("num_local_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(score="softmax_topk", choose="logit", logit_bias=True, logits_dtype=logits_dtype),
        experts=ExpertsSpec(
            intermediate_size=c("intermediate_size"),
            activation=ActivationSpec(kind="swigluoai", alpha=_swiglu_alpha(c), limit=_swiglu_limit(c)),
            bias=True,
        ),
        apply_routed_scale_to_output=apply_routed_scale_to_output,
    )


def _gpt_oss(c: Keys) -> MoESpec:
    return _oai(c, "model", apply_routed_scale_to_output=False)


def _openai_privacy_filter(c: Keys) -> MoESpec:
    return _oai(c, "float32", apply_routed_scale_to_output=False)


def _jetmoe(c: Keys) -> MoESpec:
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("num_local_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(score="softmax_topk", choose="logit", logits_dtype="model"),
        experts=ExpertsSpec(intermediate_size=c("intermediate_size"), activation=activation(c("activation_function"))),
        output_bias=True,
        apply_routed_scale_to_output=False,
    )


def _kolibri1(c: Keys) -> MoESpec:
    act, width = activation(c("hidden_act")), c("shared_expert_intermediate_size")
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("num_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(score="sigmoid_topk", choose="logit", selection_bias=True, **renormalised(c("norm_topk_prob"))),
        experts=ExpertsSpec(intermediate_size=c("moe_intermediate_size"), activation=act),
        shared=SharedSpec(width=width, activation=act) if width else None,
        apply_routed_scale_to_output=False,
    )


def _llama4_text(c: Keys) -> MoESpec:
    act = activation(c("hidden_act"))
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("num_local_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(score="sigmoid_topk", choose="logit", logits_dtype="model", weights_on="input"),
        experts=ExpertsSpec(intermediate_size=c("intermediate_size"), activation=act),
        shared=SharedSpec(width=c("intermediate_size"), activation=act),
        apply_routed_scale_to_output=False,
    )


def _unshared_by_k(answer: tuple[Any, ...], k: int) -> tuple[Tensor, Tensor]:
    """The router divides its weights by k, and the block multiplies its output by k."""
    return answer[1] * k, answer[2]


def _of_pairs_by_expert(answer: tuple[Any, ...], k: int) -> tuple[Tensor, Tensor]:
    """From (token, choice) pairs in the order of their experts, with how many pairs each expert has."""
    place, _, weights, counts, _ = answer
    experts = torch.arange(len(counts), device=place.device)
    ids = experts.repeat_interleave(torch.tensor(counts, device=place.device), output_size=len(place))
    back = place.argsort()
    return weights[back].view(-1, k), ids[back].view(-1, k)


def _of_every_expert(answer: tuple[Any, ...], k: int) -> tuple[Tensor, Tensor]:
    """From a score for every expert, which is 0 for those that were not chosen."""
    weights, ids = answer[0].topk(k, dim=-1)
    return weights, ids


def _softmax_of_chosen(answer: Any, k: int) -> tuple[Tensor, Tensor]:
    """From the gate's product alone."""
    logits, ids = answer.topk(k, dim=-1)
    return logits.softmax(-1), ids


_ARIA = _TRANSPOSED | SHARED | SHARED_BIASES | {"output_bias": SHARED_BIASES["shared_b2"]}
_ARIA_5_17 = {  # the router is a linear layer, and so are the experts
    "router": Router("router", flat=True, choice=_softmax_of_chosen),
    "weights": _ARIA | {"w13": View("experts.fc1.weight", "transposed"), "w2": View("experts.fc2.weight", "transposed")},
    "holds": {},
}
_GRANITEMOE = Family(
    name="granitemoe",
    blocks=hf("granitemoe", "GraniteMoeMoE"),
    spec=_granitemoe,
    weights=AT_ROUTER,
    router=Router("router", flat=True),
    holds=_HOLDS_TOP_K,
    takes={"layer_input": "x"},
    ignored={"logits_scaling": _HEAD},
    older={"a823da0f": _IDS_FIRST},
)
_GPT_OSS = Family(
    name="gpt_oss",
    blocks=hf("gpt_oss", "GptOssMLP"),
    spec=_gpt_oss,
    weights=_BIASED,
    gate_up="interleaved",
    router=Router("router", flat=True),
    holds=_HOLDS_OAI,
    returns=("hidden", 1),
)

TABLE = (
    _GRANITEMOE,
    _GRANITEMOE.like("granitemoe_swa", "GraniteMoeSWAMoE", older={}),
    _GRANITEMOE.like("granitemoeshared", "GraniteMoeSharedMoE"),
    _GRANITEMOE.like(
        "granitemoehybrid",
        "GraniteMoeHybridMoE",
        ignored={"logits_scaling": _HEAD, **dict.fromkeys(("mamba_n_groups", "time_step_limit"), "state space layers")},
    ),
    Family(
        name="aria_text",
        aliases=("aria",),
        blocks=hf("aria", "AriaTextMoELayer"),
        spec=_aria_text,
        weights=_ARIA,
        router=Router("router", flat=True),
        holds={"router.top_k": "moe_topk"},
        older={"cf4528ef": _IDS_FIRST, "85050a26": _ARIA_5_17},
    ),
    Family(
        name="cohere2_moe",
        blocks=hf("cohere2_moe", "Cohere2MoeSparseMoeBlock"),
        spec=_cohere2_moe,
        weights=EXPERTS | SHARED,
        router=Router(flat=True),
        holds=HOLDS_NORM
        | {
            "gate.expert_selection_fn": "expert_selection_fn",
            "num_shared_experts": "num_shared_experts",
            "shared_expert_combination_strategy": "shared_expert_combination_strategy",
        },
        ignored={"logit_scale": _HEAD},
    ),
    _GPT_OSS,
    _GPT_OSS.like(
        "openai_privacy_filter",
        "OpenAIPrivacyFilterMLP",
        spec=_openai_privacy_filter,
        gate_up="concat",
        router=Router("router", flat=True, choice=_unshared_by_k),
        holds=_HOLDS_OAI | {"num_experts": "num_experts_per_tok"},
    ),
    Family(
        name="jetmoe",
        blocks=hf("jetmoe", "JetMoeMoE"),
        spec=_jetmoe,
        weights={
            "gate": "router.layer.weight",
            "w13": "input_linear.weight",
            "w2": "output_linear.weight",
            "output_bias": "bias",
        },
        router=Router("router", flat=True, logits=4, choice=_of_pairs_by_expert),
        holds=_HOLDS_TOP_K,
        takes={"layer_input": "x"},
    ),
    Family(
        name="kolibri1",
        blocks=hf("kolibri1", "Kolibri1SparseMoeBlock"),
        spec=_kolibri1,
        weights=CORRECTED,
        holds=HOLDS_NORM,
    ),
    Family(
        name="llama4_text",
        aliases=("llama4",),
        blocks=hf("llama4", "Llama4TextMoe"),
        spec=_llama4_text,
        weights=_TRANSPOSED | ONE_SHARED,
        router=Router("router", flat=True, logits=1, choice=_of_every_expert),
        holds=_HOLDS_TOP_K,
        returns=("flat", 1),
        ignored=dict.fromkeys(("moe_layers", "interleave_moe_layer_step"), PLACEMENT)
        | dict.fromkeys(("attn_scale", "floor_scale"), "attention")
        | {"router_jitter_noise": "Transformers does not read it in this family"},
    ),
)
