"""Running one problem on simulated ranks, and what every rank must return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import currently_in_test_context, event
from tests.support.numerics import assert_as_good_as_plain, assert_close
from tests.support.plain import plain_layer
from tests.support.strategies import Storage, Tokens, make_tokens, make_weights, replayed, token_counts
from torch import Tensor

from moerunner import LayerWeights, Layout, MoERunner, MoESpec, Options, Plan
from moerunner.execute import Verbs
from moerunner.experts.registry import available
from moerunner.ops.reference import reference
from moerunner.parallel.comm import simulate

CPU_BACKENDS = [name for name, runs, _ in available("cpu") if runs]


@dataclass(frozen=True)
class Answer:
    y: Tensor
    issued: tuple[tuple[str, tuple[str, ...]], ...]
    plan: Plan


def run(
    spec: MoESpec,
    weights: LayerWeights,
    layout: Layout,
    options: Options,
    tokens: list[Tokens],
    change: Callable[[Plan], Plan] | None = None,
) -> list[Answer]:
    """One forward on every rank of a simulated layout. change: another plan in place of the resolved one."""

    def main(bound):
        runner = MoERunner(spec, weights, bound if layout.world > 1 else None, options)
        comm = runner._comm
        mine = tokens[comm.rank]
        if change is not None:
            plan = change(runner.plan)
            runner._verbs[mine.x.device.type, mine.x.dtype, False] = Verbs(plan, comm, runner._slots)
            runner.plan = plan
        before = mine.x.clone()
        with torch.no_grad():
            y = runner(mine.x, **mine.inputs)
        assert torch.equal(before, mine.x), "the caller's tokens were written to"
        return Answer(y, tuple(comm.log), runner.plan)

    return simulate(layout, main)


def rank_tokens(spec: MoESpec, layout: Layout, seed: int, counts: list[int], dtype: torch.dtype) -> list[Tokens]:
    """Tokens per rank: the same on all ranks of a copy where the layout says so."""
    per_copy = layout.ep * layout.tp
    alike = layout.tokens == "replicated"
    return [make_tokens(spec, seed + (r // per_copy if alike else r), n, dtype) for r, n in enumerate(counts)]


def expected(
    spec: MoESpec,
    weights: LayerWeights,
    layout: Layout,
    options: Options,
    tokens: list[Tokens],
    layer: Callable[[Tokens], Tensor] | None = None,
) -> list[Tensor]:
    """What `collected` must be on every rank, by the oracle or by another layer function."""
    layer = layer or (lambda t: reference(spec, weights, t.x, **t.inputs))
    per_copy, once = layout.ep * layout.tp, {}
    wanted = []
    for rank, mine in enumerate(tokens):
        key = rank if layout.tokens == "sharded" else rank // per_copy
        if key not in once:
            once[key] = layer(mine)
        y = once[key]
        if options.output == "shard" and layout.tokens == "replicated":
            y = y.split(layout.token_counts(y.shape[0]))[rank % per_copy]
        wanted.append(y)
    return wanted


def collected(layout: Layout, options: Options, answers: list[Answer]) -> list[Tensor]:
    """Each rank's result; partial sums are added up over the ranks of a copy, as the caller promised to do."""
    if options.output != "partial":
        return [a.y for a in answers]
    per_copy = layout.ep * layout.tp
    sums = [torch.stack([a.y.double() for a in answers[c * per_copy : (c + 1) * per_copy]]).sum(0) for c in range(layout.dp)]
    return [sums[rank // per_copy] for rank in range(layout.world)]


def plain(spec: MoESpec, weights: LayerWeights, tokens: Tokens) -> Tensor:
    """Plain PyTorch in the tokens' dtype, with the routing of the tokens (see `replayed`)."""
    top = tokens.inputs["topk"]
    with torch.no_grad():
        return plain_layer(spec, weights, tokens.x, top.ids, top.weights, top.shared_weights)


def simulated(
    spec: MoESpec, layout: Layout, options: Options, seed: int, storage: Storage, rows: list[int], dtype: torch.dtype
) -> list[Answer]:
    """The answer of each rank, as threads of this process, to a problem that is made of numbers."""
    weights = make_weights(spec, seed, dtype, storage)
    return run(spec, weights, layout, options, drawn_tokens(spec, weights, layout, seed, rows, dtype))


def drawn_tokens(
    spec: MoESpec, weights: LayerWeights, layout: Layout, seed: int, rows: list[int], dtype: torch.dtype
) -> list[Tokens]:
    """Of each rank; their routing comes with them."""
    tokens = rank_tokens(spec, layout, seed + 1, token_counts(layout, rows), dtype)
    return [replayed(spec, weights, one) for one in tokens]


def check(
    spec: MoESpec,
    layout: Layout,
    options: Options,
    seed: int,
    storage: Storage,
    rows: list[int],
    dtype: torch.dtype,
    ranks: Callable[..., list[Answer]] = simulated,
) -> None:
    """That all ranks give what the oracle gives, with the collectives that the plan names. ranks: how they are run."""
    problem = (spec, layout, options)
    if dtype == torch.float32:
        y, _, wanted = ranks_and_oracle(*problem, seed, storage, rows, dtype, ranks)
        assert_close(y, wanted)
    else:
        assert_as_good_as_plain(lambda n: ranks_and_oracle(*problem, seed + 10**6 * n, storage, rows, dtype, ranks))


def ranks_and_oracle(
    spec: MoESpec,
    layout: Layout,
    options: Options,
    seed: int,
    storage: Storage,
    rows: list[int],
    dtype: torch.dtype,
    ranks: Callable[..., list[Any]] = simulated,
) -> tuple[Tensor, Tensor, Tensor]:
    """What all ranks return, one rank in plain PyTorch, and the oracle."""
    weights = make_weights(spec, seed, dtype, storage)
    tokens = drawn_tokens(spec, weights, layout, seed, rows, dtype)
    answers = ranks(spec, layout, options, seed, storage, rows, dtype)
    for answer in answers:
        assert answer.issued == answer.plan.collectives
        assert answer.y.dtype == dtype
    got, wanted = collected(layout, options, answers), expected(spec, weights, layout, options, tokens)
    assert [y.shape for y in got] == [y.shape for y in wanted]
    by_hand = expected(spec, weights, layout, options, tokens, lambda t: plain(spec, weights, t))
    if currently_in_test_context():
        event(f"dispatch {answers[0].plan.step('dispatch').kernel}, output {options.output}")
    return torch.cat(got).to(dtype), torch.cat(by_hand), torch.cat(wanted)
