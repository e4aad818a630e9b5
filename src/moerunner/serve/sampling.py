"""The next token of each request in a batch, by that request's own rule and its own seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from moerunner.serve.work import Scored, Wanted, Work


def draw(logits_BV: Tensor, works: Sequence[Work], had: Sequence[Sequence[int]]) -> Tensor:
    """Scores that leave each request the one token that its rule chose. had: the tokens that it has been given."""
    wanted = [work.wanted for work in works]
    chosen_B = choose(weighed(logits_BV, wanted, had), wanted, [len(tokens) for tokens in had])
    for row, work in enumerate(works):
        if work.wanted.logprobs is not None:
            work.scores.append(scored(logits_BV[row], int(chosen_B[row]), work.wanted.logprobs))
    return torch.full_like(logits_BV, -torch.inf).scatter_(-1, chosen_B[:, None], 0.0)


def weighed(logits_BV: Tensor, wanted: Sequence[Wanted], had: Sequence[Sequence[int]]) -> Tensor:
    """Logits with what requests add to some tokens and take from those that they have had."""
    rows = [i for i, w in enumerate(wanted) if w.bias or w.presence or w.frequency]
    if rows:
        logits_BV = logits_BV.float().clone()
    for i in rows:
        for token, bias in wanted[i].bias:
            logits_BV[i, token] += bias
        if had[i] and (wanted[i].presence or wanted[i].frequency):
            ids, counts = (torch.tensor(list(x), device=logits_BV.device) for x in zip(*Counter(had[i]).items(), strict=True))
            logits_BV[i, ids] -= wanted[i].presence + wanted[i].frequency * counts
    return logits_BV


def scored(logits_V: Tensor, chosen: int, likeliest: int) -> Scored:
    """What the model itself thinks of a token: before temperature, penalties and all else that a request says."""
    logprobs_V = logits_V.float().log_softmax(-1)
    values, ids = logprobs_V.topk(min(likeliest, len(logprobs_V)))
    return Scored(chosen, float(logprobs_V[chosen]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def choose(logits_BV: Tensor, wanted: Sequence[Wanted], positions: Sequence[int]) -> Tensor:
    """[B] ids of the next tokens. positions: how many tokens each request has had; with its seed they fix the draw."""
    chosen_B = logits_BV.argmax(-1)
    rows = [i for i, w in enumerate(wanted) if w.temperature > 0]
    if not rows:
        return chosen_B
    at = torch.tensor(rows, device=logits_BV.device)
    heat = torch.tensor([wanted[i].temperature for i in rows], device=logits_BV.device)
    scores = logits_BV[at].float() / heat[:, None]
    for row, i in enumerate(rows):
        if wanted[i].top_k or wanted[i].top_p < 1:
            scores[row] = narrowed(scores[row], wanted[i].top_k, wanted[i].top_p)
    probabilities = scores.softmax(-1)
    drawn = torch.multinomial(probabilities, 1)[:, 0]
    for row, i in enumerate(rows):
        seed = wanted[i].seed
        if seed is not None:
            dice = torch.Generator(logits_BV.device).manual_seed((seed * 1_000_003 + positions[i]) % 2**63)
            drawn[row] = torch.multinomial(probabilities[row], 1, generator=dice)[0]
    return chosen_B.index_copy(0, at, drawn)


def narrowed(scores_V: Tensor, top_k: int, top_p: float) -> Tensor:
    """Scores of the top_k likeliest (0: all), and of these of the fewest that hold top_p of the mass; -inf for the others."""
    kept, ids = scores_V.sort(descending=True, stable=True)
    if top_k:
        kept, ids = kept[:top_k], ids[:top_k]
    before = kept.softmax(-1).cumsum(-1).roll(1)
    before[0] = 0
    return torch.full_like(scores_V, -torch.inf).scatter_(0, ids, kept.masked_fill(before >= top_p, -torch.inf))
