"""Text from a model: prompts to padded ids, Transformers' `generate` around a loop of ours, and the clock."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moerunner.errors import CheckpointError, SpecError, UnsupportedError
from moerunner.generate.loop import Loop, no_numbers
from moerunner.generate.rows import Rows
from moerunner.models.decoding import fused
from moerunner.models.decoding.cache import MULTIPLE, Unfit, static_cache
from moerunner.parallel.group import TorchComm
from moerunner.parallel.layout import BoundLayout

Chat = Sequence[Mapping[str, Any]]
"""Messages, each with a role and a content, as chat templates take them."""

NARROWING = ("top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Parameters of sampling that mean nothing without it."""

_OURS = {
    "do_sample": "temperature above 0 samples",
    "max_length": "give max_new_tokens",
    "stop_strings": "give stop",
    "prefill_chunk_size": "give prefill_chunk",
}
_FIXED = "return_dict_in_generate output_scores output_logits output_attentions output_hidden_states use_cache cache_config " \
    "cache_implementation compile_config disable_compile num_return_sequences token_healing is_assistant".split()  # fmt: skip


@dataclass(frozen=True)
class Generated:
    """The new text of each prompt and how long it took.

    sequences: [B, prompt + new], what `model.generate` returns. prompt_tokens, new_tokens: of all prompts together, without
    padding. tokens_per_second: of the tokens after the first of each prompt, which waits for the prompt. decode: what each
    token after the first came from: "CUDA graph", "Python" (a static cache, launched from Python) or "Transformers" (its own
    loop). note: why it was not the fastest that there is, empty if it was.
    """

    texts: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    seconds: float
    decode: str
    note: str
    sequences: Tensor = field(repr=False, compare=False)

    @property
    def text(self) -> str:
        """The text of the only prompt."""
        if len(self.texts) != 1:
            raise ValueError(f"there are {len(self.texts)} texts: see `texts`")
        return self.texts[0]

    def to_dict(self) -> dict[str, Any]:
        named = {name: value for name, value in vars(self).items() if name != "sequences"}
        return (named | {"text": self.text} if len(self.texts) == 1 else named) | {"texts": list(self.texts)}


def generate(
    model: Any,
    tokenizer: Any = None,
    prompt: str | Chat | Sequence[str | Chat] | None = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    chat: bool = False,
    prefill_chunk: int | None = None,
    stream: Callable[..., None] | None = None,
    layout: BoundLayout | None = None,
    **sampling: Any,
) -> Generated:
    """Continues prompts, greedily, or by sampling if a temperature above 0 is given.

    The tokens are those of `model.generate`. Keys and values are kept in a static cache; on a GPU the decode step is one CUDA
    graph, and RMS norms and the rotary embedding are kernels that round where the model's own do. A model for which that
    cannot be runs as Transformers runs it, and `Generated.note` says why.

    Args:
        model: a Transformers model, patched or not. tokenizer: its tokenizer; None with `input_ids` and without `stop`.
        prompt: a text, or a chat, or a list of either, which run as one batch with padding on the left.
        input_ids, attention_mask: [B, T], instead of prompts; zeros of the mask are padding and stand on the left.
        seed: makes sampling repeatable; PyTorch's seed is set to it.
        stop: texts at which a prompt's continuation ends; they are its last words.
        chat: a text is the message of a user, put into the tokenizer's chat template.
        prefill_chunk: so many tokens of the prompts go through the model at once; None: all. Less memory, the same result. A
            model whose state that would change takes them all at once, and `Generated.note` says so.
        stream: called with each piece of text as soon as its words are complete; for a list of prompts with the prompt's place
            in the list and the piece, and with an empty piece when that text ends.
        layout: of a model on several ranks, all of which call this with the same prompt. Rank 0 decides: its scores of each
            token, and its seed, are used by all, since ranks that differ in one token wait for each other for ever.
        sampling: anything else that a GenerationConfig has and that chooses tokens: top_k, top_p, min_p, repetition_penalty,
            no_repeat_ngram_size, eos_token_id, num_beams... What is not given is the model's own `generation_config`, but for
            beams: one.

    Raises:
        SpecError: a value that cannot be, named. UnsupportedError: the model writes no text; there is no chat template.
    """
    stops = [stop] if isinstance(stop, str) else list(stop)
    how = _sampling(temperature, sampling)
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
        if value is not None and value < 1:
            raise SpecError(f"must be at least 1, not {value}", where=name)
    if not all(stops):
        raise SpecError("is an empty text", where="stop")
    if not hasattr(model, "can_generate") or not model.can_generate():
        raise UnsupportedError("is not a model that generates text", where=type(model).__name__)
    if (prompt is None) == (input_ids is None):
        raise SpecError("needs a prompt or input_ids, and not both", where="generate")
    if tokenizer is None and (stops or input_ids is None):
        raise SpecError("is needed for texts", where="tokenizer")
    several = input_ids is not None or not (isinstance(prompt, str) or _is_chat(prompt))
    pad = _pad(model, tokenizer)
    if input_ids is None:
        prompts: list[Any] = list(prompt or ()) if several else [prompt]
        input_ids, attention_mask = _padded([_tokens(tokenizer, one, chat) for one in prompts], pad)
    elif attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    _check_ids(model, input_ids)
    _check_length(model, input_ids, max_new_tokens)
    ranks = layout.comm if layout is not None and isinstance(layout.comm, TorchComm) else None
    if ranks is not None and how["do_sample"]:
        seed = int(ranks.broadcast(torch.tensor([torch.seed() % 2**62 if seed is None else seed])))
    if seed is not None:
        torch.manual_seed(seed)
    how = {"pad_token_id": pad, "num_beams": 1, **how, "max_new_tokens": max_new_tokens}
    how |= {"num_return_sequences": 1, "return_dict_in_generate": False}
    config = _config(model, how)
    rows = Rows(tokenizer, len(input_ids), _ends(config), stops, stream, several=several)
    if stops:
        how["stopping_criteria"] = [_stop(tokenizer, stops)]
    if ranks is not None:
        how["logits_processor"] = [lambda _, scores: ranks.broadcast(scores)]
    assert attention_mask is not None
    ids, mask = input_ids.to(model.device), attention_mask.to(model.device)
    start = time.perf_counter()
    with fused(model):
        try:
            if ranks is not None or (getattr(model, "_tp_size", None) or 1) > 1:
                # A rank that took another way by itself would leave the others waiting.
                raise Unfit("the model is on several ranks")
            loop = Loop(_why_not(model), rows.put)
            sequences = _by_our_loop(model, loop, config, rows, ids, mask, prefill_chunk, how)
            decode, note = "CUDA graph" if loop.captured else "Python", loop.note
        except Unfit as reason:
            decode, note = "Transformers", f"Transformers' own loop: {reason}"
            if prefill_chunk is not None and _takes_chunks(model):
                how["prefill_chunk_size"] = prefill_chunk
            elif prefill_chunk is not None:
                note += "; the prompt goes through it at once, prefill_chunk or not"
            how["logits_processor"] = [_numbers, *how.get("logits_processor", [])]
            how["streamer"] = rows if config.num_beams == 1 else None
            try:
                sequences = model.generate(input_ids=ids, attention_mask=mask, **how)
            except ValueError as error:
                if rows.began or ranks is not None:
                    raise
                raise SpecError(f"Transformers refuses: {error}", where="generate") from error
    seconds = time.perf_counter() - start
    rows.finish(sequences[:, 1 if model.config.is_encoder_decoder else input_ids.shape[1] :])
    first, new = rows.first_token - start, rows.new_tokens
    rest = new - len(rows.texts)
    return Generated(
        texts=rows.texts,
        prompt_tokens=int(attention_mask.sum()),
        new_tokens=new,
        first_token_seconds=first,
        tokens_per_second=rest / (seconds - first) if rest > 0 else new / seconds,
        seconds=seconds,
        decode=decode,
        note=note,
        sequences=sequences,
    )


def _sampling(temperature: float, given: Mapping[str, Any]) -> dict[str, Any]:
    """What Transformers is told about the choice of tokens."""
    from transformers import GenerationConfig

    if not 0 <= temperature < float("inf"):
        raise SpecError(f"must be 0 or above, not {temperature}", where="temperature")
    known = {name for name in GenerationConfig().to_dict() if not name.startswith("_")} - {"max_new_tokens", "temperature"}
    for name in given:
        if name in _OURS:
            raise SpecError("is set otherwise", where=name, next_step=_OURS[name])
        if name in _FIXED or name not in known:
            raise SpecError("is not a parameter that chooses tokens", where=name, next_step="See GenerationConfig")
    given = {name: value for name, value in given.items() if value is not None}
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature, **given}
    narrowed = [name for name in NARROWING if name in given]
    if narrowed:
        raise SpecError("narrows sampling, and temperature 0 does not sample", where=", ".join(narrowed))
    # Unset, so that a model's own sampling defaults cause no warning beside do_sample=False.
    return {
        "do_sample": False,
        **{name: None for name in ("temperature", *NARROWING) if name in known | {"temperature"}},
        **given,
    }


def _config(model: Any, how: Mapping[str, Any]) -> Any:
    """The GenerationConfig that `model.generate` will come to.

    Raises:
        SpecError: it cannot be.
    """
    config = copy.deepcopy(model.generation_config)
    try:
        config.update(**how)
        config.validate()
    except (ValueError, TypeError) as error:
        raise SpecError(f"Transformers refuses: {error}", where="generate") from error
    return config


def _by_our_loop(
    model: Any, loop: Loop, config: Any, rows: Rows, ids: Tensor, mask: Tensor, prefill_chunk: int | None, how: dict[str, Any]
) -> Tensor:
    """`model.generate` with a static cache and our loop.

    Raises:
        Unfit: the model or the config asks for what these cannot, or Transformers' code fails with such a cache before a token.
    """
    mode = config.get_generation_mode()
    if mode not in ("greedy_search", "sample"):
        raise Unfit(f"{str(mode.value).replace('_', ' ')} is its own")
    attention = str(model.config._attn_implementation)
    if attention not in ("sdpa", "eager"):
        raise Unfit(f"the attention is {attention}")
    cache = static_cache(model, config.max_new_tokens + ids.shape[1])
    ours = {"custom_generate": loop, "past_key_values": cache, "cache_implementation": None}
    ours |= {"prefill_chunk_size": prefill_chunk, "disable_compile": True}
    try:
        return model.generate(input_ids=ids, attention_mask=mask, **ours, **how)
    except (TypeError, AttributeError, ValueError, IndexError) as error:
        if rows.began:
            raise
        raise Unfit(f"it fails with a static cache ({type(error).__name__}: {error})") from error


def _takes_chunks(model: Any) -> bool:
    """Whether a prompt may go through Transformers' own loop in parts: other state than keys and values of all tokens is, in
    much of its code, begun anew by each part."""
    try:
        static_cache(model, MULTIPLE)
    except Unfit:
        return False
    return True


def _why_not(model: Any) -> str | None:
    """Why the decode step is not to be captured, empty if it is; None where there are no graphs."""
    if model.device.type != "cuda":
        return None
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return "several ranks"
    if len(set(map(str, getattr(model, "hf_device_map", {}).values()))) > 1:
        return "the model lies on several devices"
    return ""


def _stop(tokenizer: Any, stops: list[str]) -> Any:
    """Transformers' criterion for texts, made here: to a loop that is not its own, `generate` passes no tokenizer."""
    from transformers import StopStringCriteria

    try:
        return StopStringCriteria(tokenizer, stops)
    except ValueError as error:
        what = "its tokens are no text that Transformers could look for a stop in"
        raise UnsupportedError(what, where="the tokenizer", next_step="Leave out stop") from error


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)


def _tokens(tokenizer: Any, prompt: str | Chat, chat: bool) -> list[int]:
    """The ids of one prompt."""
    special = True
    if chat or not isinstance(prompt, str):
        if not getattr(tokenizer, "chat_template", None):
            raise UnsupportedError("has no chat template", where="the tokenizer", next_step="Give a plain text")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        prompt, special = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False), False
    ids = tokenizer(prompt or tokenizer.bos_token or "", add_special_tokens=special)["input_ids"]
    if not ids:
        raise SpecError("is empty", where="the prompt", next_step="Give at least one word")
    return ids


def _padded(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of a batch, [B, T], padded on the left."""
    longest = max((len(row) for row in rows), default=0)
    if not longest:
        raise SpecError("is an empty list", where="the prompt")
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


def _pad(model: Any, tokenizer: Any) -> int:
    """What stands where nothing is: the tokenizer's padding, or the model's, or the end of a text."""
    for owner in (tokenizer, model.generation_config):
        for name in ("pad_token_id", "eos_token_id"):
            found = getattr(owner, name, None)
            if found is not None:
                return found[0] if isinstance(found, list | tuple) else int(found)
    return 0


def _ends(config: Any) -> set[int]:
    ends = config.eos_token_id
    return set() if ends is None else set(ends) if isinstance(ends, list | tuple) else {ends}


def _check_length(model: Any, input_ids: Tensor, max_new_tokens: int) -> None:
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise SpecError(f"has shape {list(input_ids.shape)}, expected [rows, tokens]", where="input_ids")
    length = input_ids.shape[1]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length + max_new_tokens > limit:
        raise SpecError(
            f"{length} tokens and {max_new_tokens} new ones are more than the {limit} that the model was made for",
            where="the prompt",
            next_step=f"Ask for at most {max(0, limit - length)} new tokens, or shorten the prompt",
        )


def _check_ids(model: Any, input_ids: Tensor) -> None:
    known = getattr(model.config.get_text_config(), "vocab_size", None)
    if known is not None and input_ids.numel() and int(input_ids.max()) >= known:
        what = f"gives the token {int(input_ids.max())}, and the model knows {known}"
        raise CheckpointError(what, where="the tokenizer", next_step="Tokenizer and weights must be of one and the same model")


def _numbers(_: Tensor, scores: Tensor) -> Tensor:
    """The scores of the next token, which must be numbers: any token could be the best of what is not."""
    if scores.isnan().any():
        raise no_numbers()
    return scores
