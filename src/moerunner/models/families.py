"""The table of model families: one entry each, nowhere else a family's name. What the fields mean: `entry.Family`.

Every entry was compared with Transformers' modelling source, block by block (tests/models).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any

from moerunner.errors import SpecError, UnsupportedError
from moerunner.models.entry import Family, Keys, Router, activation, groups, hf, renormalised
from moerunner.spec import ExpertsSpec, MoESpec, RoutingSpec, SharedSpec

_EXPERTS = {"gate": "gate.weight", "w13": "experts.gate_up_proj", "w2": "experts.down_proj"}
_SHARED = {
    "shared_gate_proj": "shared_experts.gate_proj.weight",
    "shared_up_proj": "shared_experts.up_proj.weight",
    "shared_w2": "shared_experts.down_proj.weight",
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


def _qwen3_moe(c: Keys) -> MoESpec:
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("num_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(score="softmax", logits_dtype="model", **renormalised(c("norm_topk_prob"))),
        experts=ExpertsSpec(intermediate_size=c("moe_intermediate_size"), activation=activation(c("hidden_act"))),
        apply_routed_scale_to_output=False,
    )


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


def _deepseek_v3(c: Keys) -> MoESpec:
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("n_routed_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(
            score="sigmoid",
            selection_bias=True,
            groups=groups(c("n_group"), c("topk_group")),
            **renormalised(c("norm_topk_prob"), eps=1e-20),
        ),
        experts=ExpertsSpec(intermediate_size=c("moe_intermediate_size"), activation=activation(c("hidden_act"))),
        shared=_plain_shared(c, "n_shared_experts"),
        routed_scaling_factor=c("routed_scaling_factor"),
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
        holds={"gate.top_k": "num_experts_per_tok", "gate.norm_topk_prob": "norm_topk_prob"},
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
        weights=_EXPERTS | _SHARED | {"selection_bias": "gate.e_score_correction_bias"},
        holds={
            "gate.top_k": "num_experts_per_tok",
            "gate.routed_scaling_factor": "routed_scaling_factor",
            "gate.norm_topk_prob": "norm_topk_prob",
            "gate.num_group": "n_group",
            "gate.topk_group": "topk_group",
        },
        ignored={"topk_method": "Transformers knows one method in this family", "moe_layer_freq": _PLACEMENT},
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
