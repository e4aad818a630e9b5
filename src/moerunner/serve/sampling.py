"""The next token of each request in a batch, by that request's own rule and its own seed."""

from __future__ import annotations

import torch
from torch import Tensor

from moerunner.serve.work import Wanted


def choose(logits_BV: Tensor, wanted: list[Wanted], positions: list[int]) -> Tensor:
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


def only(chosen_B: Tensor, like_BV: Tensor) -> Tensor:
    """Scores that leave these tokens alone: whoever takes the largest takes them."""
    return torch.full_like(like_BV, -torch.inf).scatter_(-1, chosen_B[:, None], 0.0)
