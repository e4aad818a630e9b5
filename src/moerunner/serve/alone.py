"""One request after the other, by Transformers' `generate`: for models that continuous batching cannot run."""

from __future__ import annotations

import queue
import threading
from typing import Any

import torch
from torch import Tensor

from moerunner.serve.sampling import draw
from moerunner.serve.work import Work


class Alone:
    """The engine that computes one request at a time, in the order they came."""

    name = "one request at a time"

    def __init__(self, model: Any, *, capacity: int) -> None:
        self.capacity, self._model = capacity, model
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._now: Work | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> None:
        if self.problem() is not None:
            raise RuntimeError("the server is stopping")
        self._queue.put(work)

    def cancel(self, work: Work) -> None:
        work.over = True

    def running(self) -> int:
        return int(self._now is not None)

    def problem(self) -> str | None:
        return None if self._thread is not None else "stopped"

    def stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            if self._now is not None:
                self._now.over = True
            self._queue.put(None)
            thread.join(timeout=30)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            if work.over:
                continue
            self._now = work
            try:
                self._generate(work)
                work.put(None)
            except Exception as error:  # noqa: BLE001 - of this request; the next one may do better
                work.put(error)
            self._now = None

    @torch.no_grad()
    def _generate(self, work: Work) -> None:
        wanted, begun = work.wanted, len(work.wanted.prompt)

        def sample(input_ids: Tensor, scores: Tensor) -> Tensor:
            return draw(scores, [work], [input_ids[0, begun:].tolist()])

        def enough(input_ids: Tensor, scores: Any) -> Tensor:
            new = input_ids[0, begun + work.seen :].tolist()
            work.seen += len(new)
            work.put(new)
            over = work.over or bool(new and new[-1] in wanted.ends)
            return torch.full((1,), over, dtype=torch.bool, device=input_ids.device)

        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        ids = torch.tensor([wanted.prompt], device=self._model.device)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                do_sample=False, eos_token_id=-1, max_new_tokens=wanted.max_new_tokens, pad_token_id=0
            ),
            logits_processor=LogitsProcessorList([sample]),
            stopping_criteria=StoppingCriteriaList([enough]),
        )
