"""One MoE block held against Transformers and against the float64 oracle, on the same input.

Shapes: T tokens, H hidden, K chosen, E experts.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moerunner.models.block import PatchedForward, forward_of
from moerunner.ops.reference import Choice, reference, reference_route
from moerunner.runner import MoERunner
from moerunner.values import TopK
from moerunner.verify.capture import Call
from moerunner.verify.report import Difference, LayerCheck, difference

BLOCK_BOUND = 2e-6  # float32: a block against Transformers
ORACLE_SLACK = 1e-6  # on top of twice the error that Transformers itself has against the oracle
_EPS32 = torch.finfo(torch.float32).eps


def oracle_bound(dtype: torch.dtype) -> float:
    """How far Transformers may be from the oracle before the spec, not the arithmetic, must be at fault."""
    return max(1e-5, 4 * torch.finfo(dtype).eps)


def weights_bound(dtype: torch.dtype) -> float:
    """Routing weights at the same experts: many families round them to the model's dtype, and the logits before."""
    return max(1e-5, 2 * torch.finfo(dtype).eps)


@dataclass
class Comparison:
    """A patched block, and what it did in Transformers."""

    name: str
    block: nn.Module
    call: Call
    dtype: torch.dtype

    @property
    def forward(self) -> PatchedForward:
        found = forward_of(self.block)
        assert found is not None, "only patched blocks are compared"
        return found

    @property
    def runner(self) -> MoERunner:
        return self.forward.runner

    @cached_property
    def _inputs(self) -> tuple[Tensor, dict[str, Any]]:
        """The tokens [T, H], and what else the runner is given: a choice made elsewhere, the tokens' ids or types."""
        x, _, given = self.forward.inputs(*self.call.args, **self.call.kwargs)
        return x.reshape(-1, x.shape[-1]), given

    @property
    def x_TH(self) -> Tensor:
        return self._inputs[0]

    @property
    def given(self) -> dict[str, Any]:
        return self._inputs[1]

    def given_to(self, rows: list[int]) -> dict[str, Any]:
        """The same for some of the tokens, without logits, which the oracle makes itself."""
        some: dict[str, Any] = {n: v.reshape(-1)[rows] for n, v in self.given.items() if n in ("input_ids", "token_types")}
        topk = self.given.get("topk")
        return some if topk is None else {**some, "topk": TopK(topk.ids[rows], topk.weights[rows], scaled=topk.scaled)}

    @cached_property
    def expected_TH(self) -> Tensor:
        return self.call.output.reshape(self.x_TH.shape)

    @cached_property
    def own(self) -> tuple[Tensor, bool]:
        """The patched block's output [T, H], and whether the runner made it: a block may fall back on its own forward."""
        ran: list[bool] = []
        hook = self.runner.register_forward_hook(lambda *_: ran.append(True))
        try:
            y_TH = self.call.repeat(self.block).reshape(self.x_TH.shape)
        finally:
            hook.remove()
        return y_TH, bool(ran)

    @property
    def own_TH(self) -> Tensor:
        return self.own[0]

    @cached_property
    def own_top(self) -> TopK:
        return self.runner.route(self.x_TH, **self.given)

    @cached_property
    def expected_top(self) -> TopK:
        """Transformers' choice; our own where no single router made it. With the factor if the spec has it in the weights."""
        return self.own_top if self.call.answer is None else self.forward.chosen_by(self.call.answer)

    def check(self, family: str, backend: str, oracle_tokens: int) -> tuple[LayerCheck, int]:
        """The layer's numbers and verdict, and the first token on which a tie fell the other way (or T)."""
        if not self.own[1]:
            return self._unproven(family, backend), len(self.x_TH)
        agree_T = self._agree()
        edge = self._on_the_edge(agree_T)
        agree_T[edge] = False
        error_T = (self.own_TH - self.expected_TH).double().abs().amax(-1).cpu()
        error_T = torch.where(agree_T.cpu(), error_T.nan_to_num(nan=torch.inf), 0.0)
        agreeing, differing = agree_T.nonzero().flatten().tolist(), (~agree_T).nonzero().flatten().tolist()
        worst = int(error_T.argmax())
        spread = {agreeing[i * len(agreeing) // oracle_tokens] for i in range(oracle_tokens) if agreeing}
        sample = sorted(spread | ({worst} & set(agreeing)))
        choices = self._choices(sample + differing)
        tied = [t for t in differing if t in edge or self._near_tie(t, choices[t])]
        unlike = [t for t in sample if set(choices[t].ids) != set(self.own_top.ids[t].tolist())]
        strange = [t for t in unlike if not self._near_tie(t, choices[t])]
        ours, theirs, count = self._against_oracle([t for t in sample if t not in unlike], choices)
        check = LayerCheck(
            name=self.name,
            family=family,
            backend=backend,
            oracle_tokens=count,
            vs_transformers=difference(self.own_TH[agreeing], self.expected_TH[agreeing]),
            vs_oracle=ours,
            transformers_vs_oracle=theirs,
            same_experts=len(agreeing) / max(1, len(error_T) - len(tied)),
            tied=len(tied),
            weights_error=self._weights_error(agreeing),
            worst_token=worst,
            worst_expert=self._worst_expert(error_T),
            load=_counts(self.expected_top.ids, self.runner.spec.num_experts).tolist(),
            problems=[],
            notes=self._notes(),
        )
        check.problems.extend(self._problems(check, len(differing) - len(tied), len(strange)))
        return check, min(tied, default=len(error_T))

    def without_oracle(self) -> tuple[Difference, int, int, int]:
        """Where this rank may hold a part of the experts: the difference to Transformers on the tokens where both choose the
        same experts, how many are tied, on how many others the choices differ, and the first tie (or T)."""
        agree_T = self._agree()
        edge = self._on_the_edge(agree_T)
        agree_T[edge] = False
        differing = (~agree_T).nonzero().flatten().tolist()
        choices = self._choices([t for t in differing if t not in edge])
        tied = [t for t in differing if t in edge or self._near_tie(t, choices[t])]
        gap = difference(self.own_TH[agree_T], self.expected_TH[agree_T]) if agree_T.any() else Difference(math.inf, math.inf)
        return gap, len(tied), len(differing) - len(tied), min(tied, default=len(agree_T))

    def _agree(self) -> Tensor:
        """[T] whether both choose the same experts. One that is chosen with weight 0 is not chosen."""
        ours, theirs = self.own_top, self.expected_top
        same = (ours.ids.sort(-1).values == theirs.ids.sort(-1).values).all(-1)
        counted = [torch.where(top.weights == 0, -1, top.ids).sort(-1).values for top in (ours, theirs)]
        return same | (counted[0] == counted[1]).all(-1)

    def _unproven(self, family: str, backend: str) -> LayerCheck:
        never = Difference(math.inf, math.inf)
        return LayerCheck(
            name=self.name,
            family=family,
            backend=backend,
            oracle_tokens=0,
            vs_transformers=never,
            vs_oracle=never,
            transformers_vs_oracle=never,
            same_experts=0.0,
            tied=0,
            weights_error=math.inf,
            worst_token=0,
            worst_expert=None,
            load=[],
            problems=["the patched block ran Transformers' own code, not moerunner"],
            notes=[],
        )

    def _notes(self) -> list[str]:
        """`model.to(bfloat16)` rounds the correction bias, which checkpoints keep in float32; loading does not."""
        bias = self.runner.layer_weights().tensors.get("selection_bias")
        rounded = bias is not None and bias.dtype not in (torch.float32, torch.float64)
        return ["its selection bias was rounded before moerunner saw it"] if rounded else []

    def _problems(self, c: LayerCheck, misrouted: int, strange: int) -> list[str]:
        found = []
        if not c.oracle_tokens:
            found.append("no token is left to compare: each is tied or goes to other experts")
        if misrouted:
            found.append(f"chooses other experts than Transformers on {misrouted} tokens that are not tied")
        if strange:
            found.append(f"the oracle chooses other experts on {strange} of {c.oracle_tokens + strange} tokens")
        if not c.weights_error <= weights_bound(self.dtype):
            found.append(f"routing weights {c.weights_error:.1e} from Transformers, worst expert {c.worst_expert}")
        ours, theirs, both = c.vs_oracle.max, c.transformers_vs_oracle.max, c.vs_transformers.max
        at = f"worst token {c.worst_token}, worst expert {c.worst_expert}"
        if not theirs <= oracle_bound(self.dtype):
            found.append(f"Transformers is {theirs:.1e} from the oracle, so that the spec does not describe it ({at})")
        if self.dtype == torch.float32 and not (both <= BLOCK_BOUND or self._near_oracle(c)):
            found.append(f"output {both:.1e} from Transformers, allowed {BLOCK_BOUND:.0e} ({at})")
        elif self.dtype != torch.float32 and not self._near_oracle(c):
            found.append(f"output {ours:.1e} from the oracle, where Transformers is {theirs:.1e} ({at})")
        if not both <= 2 * oracle_bound(self.dtype):
            found.append(f"output {both:.1e} from Transformers ({at})")
        return found

    def _near_oracle(self, c: LayerCheck) -> bool:
        """At most twice as far from the oracle as Transformers is.

        In low precision the maximum over a few tokens is luck, down to the last rounding of the output: half a unit of it is
        allowed on top. The RMS is not luck and has no such room.
        """
        rounding = 0.0 if self.dtype == torch.float32 else torch.finfo(self.dtype).eps / 2
        ours, theirs = c.vs_oracle, c.transformers_vs_oracle
        return ours.max <= 2 * theirs.max + rounding + ORACLE_SLACK and ours.rms <= 2 * theirs.rms + ORACLE_SLACK

    def _choices(self, rows: list[int]) -> dict[int, Choice]:
        routed = reference_route(self.runner.spec, self.runner.layer_weights(), self.x_TH[rows], **self.given_to(rows))
        return dict(zip(rows, routed, strict=True))

    def _near_tie(self, row: int, choice: Choice) -> bool:
        """Whether rounding can change the oracle's choice: all chosen logits a step down, all others a step up."""
        spec, weights = self.runner.spec, self.runner.layer_weights()
        if choice.margin <= 16 * _EPS32:  # scores that saturate tie although their logits do not
            return True
        gate = weights.tensors.get("gate")
        if gate is None or spec.routing.input_transform is not None:
            return choice.margin <= torch.finfo(self.dtype).eps
        logits = self.x_TH[row].double().cpu() @ gate.double().cpu().T
        if "gate_bias" in weights.tensors:
            logits = logits + weights.tensors["gate_bias"].double().cpu()
        step = (torch.finfo(self.dtype).eps + 16 * _EPS32) * max(1.0, float(logits.abs().max()))
        shaken = logits + step
        shaken[choice.ids] -= 2 * step
        moved = reference_route(spec, weights, self.x_TH[[row]], router_logits=shaken[None], **self.given_to([row]))[0]
        return set(moved.ids) != set(choice.ids)

    def _on_the_edge(self, agree_T: Tensor) -> list[int]:
        """Tokens with the same experts and other weights, where sparsemixer's weights leap: at its threshold, and where the two
        best logits tie. There both weights are the oracle's, with logits and threshold moved by some roundings."""
        spec, router = self.runner.spec, self.forward.source.family.router
        if spec.routing.score != "sparsemixer" or self.call.answer is None or router is None or router.logits is None:
            return []
        ours, theirs = (top.weights.gather(1, top.ids.argsort(-1)) for top in (self.own_top, self.expected_top))
        apart_T = ((ours - theirs).abs().amax(-1) > weights_bound(self.dtype)) & agree_T
        return [t for t in apart_T.nonzero().flatten().tolist() if self._leaps(t, self.call.answer[router.logits][t])]

    def _leaps(self, row: int, logits: Tensor) -> bool:
        spec, weights = self.runner.spec, self.runner.layer_weights()
        room = 8 * torch.finfo(self.dtype).eps  # logits, their difference and the quotient are all rounded
        unseen = [True, True]
        for jitter in (spec.routing.jitter, max(spec.routing.jitter - room, 0.0), spec.routing.jitter + room):
            moved = dataclasses.replace(spec, routing=dataclasses.replace(spec.routing, jitter=jitter))
            for which, top in enumerate((self.own_top, self.expected_top)):
                z = logits.double().cpu()[None].clone()
                z[0, top.ids[row, 0]] += 1e-9  # the first of two that tie is the one that it took
                choice = reference_route(moved, weights, self.x_TH[[row]], router_logits=z)[0]
                off = (torch.tensor(choice.weights) - top.weights[row].cpu()).abs().max()
                if choice.ids == top.ids[row].tolist() and float(off) <= weights_bound(self.dtype):
                    unseen[which] = False
        return not any(unseen)

    def _against_oracle(self, rows: list[int], choices: dict[int, Choice]) -> tuple[Difference, Difference, int]:
        """moerunner and Transformers against float64. In low precision the experts of Transformers are replayed."""
        spec = self.runner.spec
        by_router = spec.shared is not None and spec.shared.gate == "router"
        if self.dtype == torch.float32 or self.call.answer is None or by_router:
            top, ours = _stack([choices[t] for t in rows]), self.own_TH
        else:
            replay = self.expected_top
            top = TopK(replay.ids[rows], replay.weights[rows], scaled=replay.scaled)
            ours = self.runner(self.x_TH, topk=replay)
        oracle = reference(spec, self.runner.layer_weights(), self.x_TH[rows], topk=top)
        return difference(ours[rows], oracle), difference(self.expected_TH[rows], oracle), len(rows)

    def _weights_error(self, rows: list[int]) -> float:
        """Weights gathered at the same experts, with the factor in both or in none."""
        ours, theirs = self.own_top, self.expected_top
        factor = self.runner.spec.routed_scaling_factor
        scale = (factor if theirs.scaled else 1.0) / (factor if ours.scaled else 1.0)
        gathered = [top.weights.gather(1, top.ids.argsort(-1))[rows] for top in (ours, theirs)]
        return difference(gathered[0] * scale, gathered[1]).max

    def _worst_expert(self, error_T: Tensor) -> int | None:
        ids_TK = self.expected_top.ids.cpu()
        if not error_T.any() or not (ids_TK >= 0).any():
            return None
        count = int(ids_TK.max()) + 1
        flat, each = ids_TK.flatten(), error_T.repeat_interleave(ids_TK.shape[1])
        total = torch.zeros(count, dtype=torch.float64).index_add_(0, flat[flat >= 0], each[flat >= 0])
        return int((total / _counts(flat, count).clamp(min=1)).argmax())


def _counts(ids: Tensor, count: int) -> Tensor:
    """How many times each expert was chosen; -1 is no expert."""
    return ids[ids >= 0].bincount(minlength=count)


def _stack(choices: list[Choice]) -> TopK:
    shared = torch.tensor([c.shared_weights for c in choices], dtype=torch.float64)
    return TopK(
        torch.tensor([c.ids for c in choices]),
        torch.tensor([c.weights for c in choices], dtype=torch.float64),
        shared_weights=shared if shared.numel() else None,
    )
