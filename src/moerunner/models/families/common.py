"""What several families have in common: names of tensors, attributes that blocks hold, shared experts."""

from __future__ import annotations

from moerunner.models.entry import Keys, activation
from moerunner.spec import SharedSpec

EXPERTS = {"gate": "gate.weight", "w13": "experts.gate_up_proj", "w2": "experts.down_proj"}
SHARED = {
    "shared_gate_proj": "shared_experts.gate_proj.weight",
    "shared_up_proj": "shared_experts.up_proj.weight",
    "shared_w2": "shared_experts.down_proj.weight",
}
SHARED_BIASES = {
    "shared_gate_proj_bias": "shared_experts.gate_proj.bias",
    "shared_up_proj_bias": "shared_experts.up_proj.bias",
    "shared_b2": "shared_experts.down_proj.bias",
}
ONE_SHARED = {
    "shared_gate_proj": "shared_expert.gate_proj.weight",
    "shared_up_proj": "shared_expert.up_proj.weight",
    "shared_w2": "shared_expert.down_proj.weight",
}
GATED_SHARED = ONE_SHARED | {"shared_gate": "shared_expert_gate.weight"}
CORRECTED = EXPERTS | SHARED | {"selection_bias": "gate.e_score_correction_bias"}
AT_ROUTER = EXPERTS | {"gate": "router.weight"}
HOLDS_NORM = {"gate.top_k": "num_experts_per_tok", "gate.norm_topk_prob": "norm_topk_prob"}
HOLDS_GROUPS = HOLDS_NORM | {
    "gate.routed_scaling_factor": "routed_scaling_factor",
    "gate.num_group": "n_group",
    "gate.topk_group": "topk_group",
}
PLACEMENT = "which layers are MoE; blocks are found by their class"
NOT_READ = "published with checkpoints; Transformers' code of the family does not read it"


def plain_shared(c: Keys, count: str, *, bias: bool = False) -> SharedSpec | None:
    """Shared experts as wide as the routed ones, `count` of them; without any, the block has an empty MLP that adds 0."""
    if not c(count):
        return None
    return SharedSpec(width=c("moe_intermediate_size"), count=c(count), activation=activation(c("hidden_act")), bias=bias)
