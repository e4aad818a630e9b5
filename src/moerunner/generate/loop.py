"""The loop from token to token, in place of the one inside Transformers' `generate`, which prepares all that it is given.

Transformers makes the inputs, the logits processors and the stopping criteria, prefills, and hands over here
(`custom_generate`). What it lacks is a step that a CUDA graph can hold from the mask to the logits: its own step grows the
ids, the mask and the positions by one column each time. Here they have their full length from the start.

B is the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moerunner.errors import CheckpointError
from moerunner.models.decoding.step import Step


class Loop:
    """Called by Transformers' `generate` as its `custom_generate`; returns the ids [B, prompt + new], as that does.

    why_not: why the decode step is not to be put into a CUDA graph; None: on this device there is none. put: is told each new
    token of every row, [B], on the host, as soon as it is there. captured: whether the step was put into a graph; note: why
    not.
    """

    def __init__(self, why_not: str | None, put: Callable[[Tensor], None]) -> None:
        self._put, self.note, self.captured = put, why_not or "", False
        self._capture = why_not == ""

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        rows, length = input_ids.shape
        end = generation_config.max_length
        pad = generation_config._pad_token_tensor
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        ids = torch.cat([input_ids, input_ids.new_zeros(rows, end - length)], 1)
        unfinished = torch.ones(rows, dtype=torch.long, device=ids.device)
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        logits = last(outputs)
        del outputs  # may hold the logits of the whole prompt
        step = Step(model, model_kwargs, rows, end, capture=self._capture)
        host = _Host(rows, ids.device)
        while True:
            wrong = logits.isnan().any(-1)  # told with the tokens, so that the device is not waited for twice
            scores = logits_processor(ids[:, :length], logits.masked_fill(wrong[:, None], 0.0))
            if generation_config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
            else:
                tokens = scores.argmax(-1)
            if ends:
                tokens = tokens * unfinished + pad * (1 - unfinished)
            ids[:, length] = tokens
            length += 1
            unfinished = unfinished & ~stopping_criteria(ids[:, :length], None)
            host.send(tokens, unfinished, wrong)
            ahead = host.waits and length < end
            if ahead:  # before the host waits for this token, so that the device never waits for the host
                logits = step(tokens)
            tokens_there, done = host.receive()
            self._put(tokens_there)
            if done or length == end:
                break
            if not ahead:
                logits = step(tokens)
        self.note, self.captured = self.note or step.note, step.captured
        return ids[:, :length]


def last(outputs: Any) -> Tensor:
    """The logits of the last token, [B, V], in float32 and in memory of their own, as Transformers takes them."""
    return outputs.logits[:, -1].to(copy=True, dtype=torch.float32)


def no_numbers() -> CheckpointError:
    """What is said of scores of which any could be the best."""
    what = "gives scores that are not numbers (NaN)"
    return CheckpointError(what, where="the model", next_step="moerunner verify says whether its weights are damaged")


class _Host:
    """Tokens on their way to the host. waits: they come later than they are sent."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.waits = device.type == "cuda"
        self._there = torch.empty(3, rows, dtype=torch.long, pin_memory=self.waits)
        self._event = torch.cuda.Event() if self.waits else None

    def send(self, tokens: Tensor, unfinished: Tensor, wrong: Tensor) -> None:
        self._there.copy_(torch.stack([tokens, unfinished, wrong.long()]), non_blocking=self.waits)
        if self._event is not None:
            self._event.record()

    def receive(self) -> tuple[Tensor, bool]:
        """The tokens, and whether every row is finished. Raises a CheckpointError if the scores were no numbers."""
        if self._event is not None:
            self._event.synchronize()
        tokens, unfinished, wrong = self._there.unbind()
        if wrong.any():
            raise no_numbers()
        return tokens.clone(), not bool(unfinished.any())
