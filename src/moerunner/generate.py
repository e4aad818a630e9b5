"""Text from a model, on Transformers' own `generate`; this adds a stream, the clock and checks of the input."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moerunner.errors import CheckpointError, SpecError, UnsupportedError
from moerunner.parallel.group import TorchComm
from moerunner.parallel.layout import BoundLayout


@dataclass(frozen=True)
class Generated:
    """The new text and how long it took. tokens_per_second is of the tokens after the first, which waits for the prompt."""

    text: str
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    stream: Callable[[str], None] | None = None,
    layout: BoundLayout | None = None,
) -> Generated:
    """Continues a prompt: greedily, or by sampling if a temperature above 0 is given.

    Args:
        model: a Transformers model, patched or not. tokenizer: its tokenizer.
        top_p, top_k: narrow the sampling, as in Transformers. seed: makes sampling repeatable; PyTorch's seed is set to it.
        stream: called with each piece of text as soon as its words are complete.
        layout: of a model on several ranks, all of which call this with the same prompt. Rank 0 decides: its scores of each
            token, and its seed, are used by all, since ranks that differ in one token wait for each other for ever.
    """
    sampling = _sampling(temperature, top_p, top_k)
    if max_new_tokens < 1:
        raise SpecError(f"must be at least 1, not {max_new_tokens}", where="max_new_tokens")
    if not model.can_generate():
        raise UnsupportedError("is not a model that generates text", where=type(model).__name__)
    inputs = tokenizer(prompt or tokenizer.bos_token or "", return_tensors="pt").to(model.device)
    prompt_tokens = inputs["input_ids"].shape[1]
    config = model.config.get_text_config()
    limit, known = getattr(config, "max_position_embeddings", None), getattr(config, "vocab_size", None)
    if not prompt_tokens:
        raise SpecError("is empty", where="the prompt", next_step="Give at least one word")
    if known is not None and inputs["input_ids"].max() >= known:
        what = f"gives the token {int(inputs['input_ids'].max())}, and the model knows {known}"
        raise CheckpointError(what, where="the tokenizer", next_step="Tokenizer and weights must be of one and the same model")
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise SpecError(
            f"{prompt_tokens} tokens and {max_new_tokens} new ones are more than the {limit} that the model was made for",
            where="the prompt",
            next_step=f"Ask for at most {max(0, limit - prompt_tokens)} new tokens, or shorten the prompt",
        )
    ranks = layout.comm if layout is not None and isinstance(layout.comm, TorchComm) else None
    if ranks is not None and sampling["do_sample"]:
        seed = int(ranks.broadcast(torch.tensor([torch.seed() % 2**62 if seed is None else seed])))
    if seed is not None:
        torch.manual_seed(seed)
    streamer = _streamer(tokenizer, stream)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    start = time.perf_counter()
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        streamer=streamer,
        logits_processor=[_numbers, *([lambda _, scores: ranks.broadcast(scores)] if ranks is not None else [])],
        num_beams=1,
        num_return_sequences=1,
        return_dict_in_generate=False,
        **sampling,
    )
    seconds = time.perf_counter() - start
    new = output[0, 1 if model.config.is_encoder_decoder else prompt_tokens :]
    first = streamer.first_token - start
    return Generated(
        text=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=prompt_tokens,
        new_tokens=len(new),
        first_token_seconds=first,
        tokens_per_second=(len(new) - 1) / (seconds - first) if len(new) > 1 else 1 / seconds,
        seconds=seconds,
    )


def _sampling(temperature: float, top_p: float | None, top_k: int | None) -> dict[str, Any]:
    if not 0 <= temperature < float("inf"):
        raise SpecError(f"must be 0 or above, not {temperature}", where="temperature")
    narrowed = {name: value for name, value in (("top_p", top_p), ("top_k", top_k)) if value is not None}
    if temperature == 0:
        if narrowed:
            raise SpecError("narrows sampling, and temperature 0 does not sample", where=", ".join(narrowed))
        # Unset, so that a model's own sampling defaults cause no warning beside do_sample=False.
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature, **narrowed}


def _numbers(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The scores of the next token, which must be numbers: any token could be the best of what is not."""
    if scores.isnan().any():
        what = "gives scores that are not numbers (NaN)"
        raise CheckpointError(what, where="the model", next_step="moerunner verify says whether its weights are damaged")
    return scores


def _streamer(tokenizer: Any, stream: Callable[[str], None] | None) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Transformers' text streamer with a callback instead of print, and the time of the first token."""

        first_token = 0.0

        def put(self, value: torch.Tensor) -> None:
            if not self.first_token and not self.next_tokens_are_prompt:
                self.first_token = time.perf_counter()
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if stream is not None and text:
                stream(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
