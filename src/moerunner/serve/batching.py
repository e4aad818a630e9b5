"""Continuous batching: Transformers' manager around the patched model, with what a server needs beside it.

Added to Transformers' own: each request's own sampling and seed, requests that are forgotten when they are cancelled, the
width of the cached heads where the config's `head_dim` means another, and a new manager when one has died.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import cb_logits_processors as processors
from transformers.generation.continuous_batching import continuous_api as api
from transformers.generation.logits_process import LogitsProcessorList

from moerunner.errors import UnsupportedError
from moerunner.serve.sampling import draw
from moerunner.serve.work import Wanted, Work

PAGE = 32  # tokens in a page of the cache: small ones waste less at the end of a text
_NEAR = 2**-5  # of the largest logit: below it two tokens are a tie that bfloat16 may break either way
_PROBE = 6  # tokens that the start compares with `generate`


class Sampling(processors.ContinuousBatchingLogitsProcessor):
    """Leaves one token for each row of a batch: the one that its request's own rule chose."""

    supported_kwargs = {"work": Work}
    ignored_kwargs = ()

    def __init__(self) -> None:
        self._rows: list[tuple[Work, list[int]]] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        states = [request.state for request in requests_with_new_token]
        works = [state.logit_processor_kwargs["work"] for state in states]
        # A request that lost its place in the cache starts again with its own tokens as the end of its prompt.
        before = [s.initial_tokens[len(w.wanted.prompt) :] for s, w in zip(states, works, strict=True)]
        had = [[*b, *s.generated_tokens] if b else s.generated_tokens for b, s in zip(before, states, strict=True)]
        self._rows = list(zip(works, had, strict=True))
        return torch.zeros(len(states), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        works, had = zip(*self._rows, strict=True)
        return draw(scores, works, had)


class Router(api.OutputRouter):
    """Hands tokens to the requests that still want them; Transformers' own keeps what nobody fetches."""

    def __init__(self, cancel: Callable[[str], None]) -> None:
        super().__init__()
        self.works: dict[str, Work] = {}
        self._cancel = cancel

    def deliver(self, output: Any) -> None:
        work = self.works.get(output.request_id)
        if work is None:
            if not output.is_finished():  # its cancellation overtook it
                self._cancel(output.request_id)
            return
        new, work.seen = output.generated_tokens[work.seen :], len(output.generated_tokens)
        if new:
            work.put(new)
        if output.is_finished():
            self.works.pop(work.id, None)
            work.put(None if output.error is None else RuntimeError(output.error))

    def deliver_batch(self, outputs: list[Any]) -> None:
        for output in outputs:
            self.deliver(output)


class Manager(api.ContinuousBatchingManager):
    """Transformers' manager with our sampling, our router, and the cache's true width."""

    def __init__(self, model: Any, config: ContinuousBatchingConfig, router: Router) -> None:
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1)
        super().__init__(model=model, generation_config=greedy, continuous_batching_config=config)
        self.output_router = router
        self.logit_processor = processors.ContinuousBatchingLogitsProcessorList(LogitsProcessorList([Sampling()]))
        self.logit_processor.tensors_required = 1

    def _create_batch_processor(self) -> Any:
        with _cached_width(self.model.config.get_text_config()):
            return super()._create_batch_processor()


@contextlib.contextmanager
def _cached_width(config: Any) -> Iterator[None]:
    """In models with latent attention `head_dim` is that of the rotary part; the cache holds whole keys and values."""
    if getattr(config, "kv_lora_rank", None) is None or config.head_dim == config.qk_head_dim:
        yield
        return
    if config.qk_head_dim != config.v_head_dim:
        what = f"keys have {config.qk_head_dim} numbers a head and values {config.v_head_dim}, its cache wants the same"
        raise UnsupportedError(what, where="continuous batching")
    stated, config.head_dim = config.head_dim, config.qk_head_dim
    try:
        yield
    finally:
        config.head_dim = stated


class Batching:
    """The engine that computes many requests in one batch, and lets new ones join at every step."""

    name = "continuous batching"

    def __init__(self, model: Any, *, capacity: int, cache_tokens: int | None, max_running: int) -> None:
        """capacity: tokens of one request. cache_tokens: that all requests hold together; None: what a GPU's memory takes."""
        self.capacity, self._model, self._router = capacity, model, Router(self._cancel)
        wished = {
            "num_blocks": None if cache_tokens is None else -(-max(cache_tokens, capacity + PAGE) // PAGE) + max_running,
            "max_batch_tokens": None if cache_tokens is None else min(2048, max(256, capacity)),
            "max_requests_per_batch": max_running,
            "use_cuda_graph": False,  # the sampling is Python
            "use_async_batching": False,  # a request that is cancelled while its batch runs would end the thread
            "auto_switch_to_flash": False,  # may fetch kernels from the hub
        }
        fields = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
        page = "page_size" if "page_size" in fields else "block_size"
        self._config = ContinuousBatchingConfig(**{page: PAGE}, **{n: v for n, v in wished.items() if n in fields})
        self._lock = threading.Lock()
        self._manager: Manager | None = None

    def start(self) -> None:
        """Raises what the manager's thread raises while it makes the cache."""
        self._manager = manager = Manager(self._model, copy.deepcopy(self._config), self._router)
        manager.start()
        while manager.batch_processor is None and manager.is_running():
            time.sleep(0.005)
        if (error := manager.background_thread_status.fatal_error) is not None:
            raise error

    def submit(self, work: Work) -> None:
        with self._lock:
            manager = self._living()
            self._router.works[work.id] = work
            manager.add_request(
                work.wanted.prompt,
                request_id=work.id,
                max_new_tokens=work.wanted.max_new_tokens,
                streaming=True,
                eos_token_id=sorted(work.wanted.ends) or -1,
                work=work,
            )
        # The manager drops what comes while it dies, without a word.
        if manager.background_thread_status.can_accept_new_requests() and self._router.works.pop(work.id, None):
            work.put(RuntimeError("the model stopped while the request came in: send it again"))

    def cancel(self, work: Work) -> None:
        if self._router.works.pop(work.id, None) is not None:
            self._cancel(work.id)

    def _cancel(self, request_id: str) -> None:
        if self._manager is not None:
            self._manager.cancel_request(request_id)

    def running(self) -> int:
        processor = self._manager.batch_processor if self._manager is not None else None
        return 0 if processor is None else len(processor.scheduler.active_requests)

    def problem(self) -> str | None:
        manager = self._manager
        if manager is None:
            return "stopped"
        status = manager.background_thread_status
        error = status.fatal_error
        return status.can_accept_new_requests() if error is None else f"{type(error).__name__}: {error}"

    def stop(self) -> None:
        with self._lock:
            if self._manager is not None:
                self._manager.stop(block=True, timeout=30, hard_stop=True)
                self._manager = None

    def _living(self) -> Manager:
        """The manager; a new one where an error, say too little memory for one batch, has ended the last."""
        if self._manager is None:
            raise RuntimeError("the server is stopping")
        if self.problem() is not None:
            self._manager.stop(block=True, timeout=30, hard_stop=True)
            self.start()
        return self._manager


@torch.no_grad()
def check(engine: Batching, model: Any, vocabulary: int) -> None:
    """Starts the engine and has it write a few tokens: are they those of `generate`?

    Raises:
        UnsupportedError: the model's attention or cache is none that continuous batching can run, or its result differs.
    """
    where, step = "continuous batching", "It is served one request at a time"
    log = logging.getLogger("ContinuousBatchingLogger")
    prompt = [(7 * i + 3) % vocabulary for i in range(min(2 * PAGE + 5, engine.capacity - _PROBE))]
    ids = torch.tensor([prompt], device=model.device)
    plain = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=_PROBE, pad_token_id=0),
        return_dict_in_generate=True,
        output_scores=True,
    )
    try:
        log.setLevel(logging.CRITICAL)  # what goes wrong here is told by what is raised
        engine.start()
        made = _written(engine, Wanted(prompt, _PROBE, temperature=0.0))
    except BaseException as error:
        engine.stop()  # whatever it was, Ctrl-C too: its thread would keep the process
        if isinstance(error, UnsupportedError) or not isinstance(error, Exception):
            raise
        text = " ".join(str(error).split())[:200]
        raise UnsupportedError(f"{type(error).__name__}: {text}", where=where, next_step=step) from error
    finally:
        log.setLevel(logging.ERROR)
    for token, scores in zip(made, plain.scores, strict=True):
        best = scores[0].float().max()
        if best - scores[0, token] > _NEAR * scores[0].float().abs().max():
            engine.stop()
            raise UnsupportedError("another text than generate's comes out", where=where, next_step=step)
        if token != int(scores[0].argmax()):
            return  # a tie: from here on the texts may differ


def _written(engine: Batching, wanted: Wanted) -> list[int]:
    """The tokens of one request, without an event loop."""
    done, tokens, errors = threading.Event(), [], []

    class Waiting(Work):
        def put(self, item: Any) -> None:
            if isinstance(item, list):
                tokens.extend(item)
                return
            if item is not None:
                errors.append(item)
            done.set()

    engine.submit(Waiting("check", wanted, loop=None))  # type: ignore[arg-type]
    while not done.wait(0.1):
        if engine.problem():
            raise RuntimeError(engine.problem())
    if errors:
        raise errors[0]
    return tokens
