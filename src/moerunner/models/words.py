"""An MoE layer in words, made from its spec and nothing else: what `inspect` and the table of families say.

sizes=False leaves out the numbers that differ from model to model of one family.
"""

from __future__ import annotations

from moerunner.spec import ActivationSpec, Linear, MoESpec, RoutingSpec, TransformSpec

NONE = "none"

_SCORES = {
    "sqrtsoftplus": "sqrt(softplus)",
    "softmax_topk": "softmax of the chosen logits",
    "sigmoid_topk": "sigmoid of the chosen logits",
    "external": "the model's own router",
}
_GROUPS = {"max": "by their best", "top2_sum": "by their two best"}


def routing(spec: MoESpec) -> str:
    """The whole rule: how a token's experts are chosen, and what they weigh."""
    r = spec.routing
    found = [score(r), choice(r), groups(r), renormalise(r), *extras(r)]
    return ", ".join(text for text in found if text != NONE)


def score(r: RoutingSpec) -> str:
    """What becomes of the logits."""
    return f"random ({r.simulate})" if r.simulate else _SCORES.get(r.score, r.score)


def choice(r: RoutingSpec) -> str:
    """What the experts are chosen by, where it is not the score alone."""
    if r.choose == "hash":
        return "chosen by a table of token ids"
    if r.selection_bias:
        return "correction bias in the choice"
    return "chosen by logit" if r.choose == "logit" and not r.score.endswith("_topk") else NONE


def groups(r: RoutingSpec, *, sizes: bool = True) -> str:
    """Group-limited choice."""
    if r.groups is None:
        return NONE
    which = f"{r.groups.kept} of {r.groups.count} groups" if sizes else "groups"
    return f"{which} {_GROUPS[r.groups.score]}"


def renormalise(r: RoutingSpec) -> str:
    """What the weights of the chosen are divided by."""
    plus = f" + {r.eps:g}" if r.eps else ""
    return {
        "none": NONE,
        "sum": f"weights / (sum{plus})" if plus else "weights / sum",
        "max_sum": f"weights / max(sum, {r.eps:g})",
        "p_norm": f"weights / {r.p:g}-norm",
    }[r.renormalise]


def extras(r: RoutingSpec, *, sizes: bool = True) -> list[str]:
    """What few routers have."""
    named = {
        "bias on the logits": r.logit_bias,
        f"logits times {r.logit_scale:g}" if sizes else "scaled logits": r.logit_scale != 1.0,
        f"logits capped at {r.logit_softcap}" if sizes else "capped logits": r.logit_softcap is not None,
        "a learned scale per expert": r.per_expert_scale,
        "one learned scale": r.global_scale,
        "weights on the experts' input": r.weights_on == "input",
        f"{r.modalities} sets of experts by token type": r.modalities > 1,
        "a transform before the gate": r.input_transform is not None,
    }
    return [text for text, on in named.items() if on]


def experts(spec: MoESpec) -> str:
    """How many routed experts, of which width, and how many a token goes to."""
    widths = " and ".join(str(width) for width in dict.fromkeys(spec.expert_widths))
    return f"{spec.num_experts} of width {widths}, {spec.top_k} for each token"


def shared(spec: MoESpec, *, sizes: bool = True) -> str:
    """The experts that see every token."""
    s = spec.shared
    if s is None:
        return NONE
    facts = [f"{s.count} of width {s.width}" if sizes else "yes"]
    facts += {"none": [], "sigmoid": ["sigmoid gate"], "router": ["weighed by the router"]}[s.gate]
    facts += ["biases"] * s.bias
    if (s.activation.resolved(), s.gated) != (spec.experts.activation.resolved(), spec.experts.gated):
        facts.append(activation(s.activation, gated=s.gated))
    return ", ".join(facts)


def factor(spec: MoESpec, *, sizes: bool = True) -> str:
    """The routed scaling factor, and where it is applied."""
    if spec.routed_scaling_factor == 1.0:
        return NONE
    where = "on the output" if spec.apply_routed_scale_to_output else "on the weights"
    return f"{spec.routed_scaling_factor:g} {where}" if sizes else where


def activation(a: ActivationSpec, *, gated: bool) -> str:
    """What stands between an expert's two products, with every constant that changes it."""
    full = a.resolved()
    alpha, beta, limit, gate, up = (v or 0 for v in (full.alpha, full.beta, full.limit, full.gate_softcap, full.up_softcap))
    named = {
        f"alpha {alpha:g}": alpha not in (0, 1),
        f"beta {beta:g}": bool(beta),
        f"clamp at {limit:g}" + " afterwards" * full.clamp_after: bool(limit),
        f"gate capped at {gate:g}": bool(gate),
        f"up capped at {up:g}": bool(up),
        "not gated": not gated,
    }
    return ", ".join([full.kind, *(text for text, on in named.items() if on)])


def specials(spec: MoESpec, *, sizes: bool = True) -> list[str]:
    """What few layers have, apart from their routers."""
    latent = f"latent width {spec.routed_hidden_size}" if sizes else "latent width"
    zero = f"{spec.zero_experts} zero experts" if sizes else "zero experts"
    named = {
        latent: spec.routed_hidden_size != spec.hidden_size,
        "biases in the experts": spec.experts.bias,
        "norm of each expert's row": spec.experts.row_norm is not None,
        zero: bool(spec.zero_experts),
        "average of routed and shared": spec.join == "average",
        "bias on the output": spec.output_bias,
        "a transform after the sum": spec.final_transform is not None,
    }
    return [text for text, on in named.items() if on]


def transforms(spec: MoESpec) -> dict[str, str]:
    """The transforms by name: their operations in order."""
    return {name: _chain(chain) for name, chain in spec.transforms().items()}


def _chain(chain: TransformSpec) -> str:
    steps = []
    for op in chain.ops:
        widths = f" {op.in_features} to {op.out_features}" if op.in_features != op.out_features else ""
        steps.append(type(op).__name__ + widths + " with bias" * (isinstance(op, Linear) and op.bias))
    return ", ".join(steps)
