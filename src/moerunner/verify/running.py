"""What a verification runs a model on, and how."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor

from moerunner.errors import SpecError, UnsupportedError
from moerunner.verify.tiny import tiny_inputs


def sample_of(model: Any, tokenizer: Any, text: str | None, count: int, seed: int) -> tuple[Tensor, str]:
    """At most `count` tokens, [1, T], and what they are."""
    config = model.config.get_text_config()
    count = min(count, getattr(config, "max_position_embeddings", count))
    if tokenizer is None:
        if text is not None:
            raise SpecError("a text needs a tokenizer", where="verify", next_step="Pass tokenizer, or input_ids")
        ids = torch.randint(config.vocab_size, (1, count), generator=torch.Generator().manual_seed(seed))
        return ids, f"random tokens, seed {seed}"
    source = inspect.getsource(sys.modules["moerunner.verify"]) if text is None else text
    ids = tokenizer(source, return_tensors="pt")["input_ids"][:, :count]
    if not ids.shape[1]:
        raise SpecError("the text has no tokens", where="verify", next_step="Give a longer one")
    return ids, "moerunner's own source" if text is None else "the text given"


def run(model: Any, input_ids: Tensor) -> Tensor:
    """The logits [1, T, vocabulary], or the last hidden states of a model without a head."""
    try:
        output = model(**tiny_inputs(model, input_ids), **_without_cache(model))
    except AttributeError as error:
        raise UnsupportedError(f"does not run on tokens alone: {error}", where=type(model).__name__) from error
    return output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state


def _without_cache(model: Any) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
