"""One decode step on tensors that stay where they are, and the CUDA graph that holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moerunner.errors import first_line
from moerunner.models.decoding.uploads import Uploads

_TOLERANCE = 2e-2  # of the largest logit, between the graph and the same step from Python; a stale count says more


class Step:
    """From the tokens of all rows, [B], to the next logits, [B, V] in float32.

    The mask has a column for every place of the cache, ones for those to come: whoever reads it is told by the cache how far
    it is filled. Positions count up on the device.

    captured: whether steps after the first are replays of a graph. note: why they are not, though they should be.
    """

    def __init__(self, model: Any, model_kwargs: dict[str, Any], rows: int, end: int, *, capture: bool) -> None:
        self._model, self._cache = model, model_kwargs["past_key_values"]
        self._given = {name: value for name, value in model_kwargs.items() if name not in ("attention_mask", "position_ids")}
        self._ids = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        if mask is not None:
            places = self._cache.get_max_length() if hasattr(self._cache, "get_max_length") else end
            self._given["attention_mask"] = torch.cat([mask, mask.new_ones(rows, places - mask.shape[1])], 1)
        self._positions = None if positions is None else positions[..., -1:].clone()
        self._wanted, self.captured, self.note = capture, False, ""
        self._graph: Any = None
        self._uploads = Uploads()
        self._logits = torch.empty(0)

    def capture(self) -> None:
        """From the next step on, a graph."""
        self._wanted = True

    def __call__(self, tokens: Tensor) -> Tensor:
        self._ids.copy_(tokens[:, None])
        if self._graph is not None:
            self._graph.replay()
            return self._logits
        if self._wanted:
            self._wanted = False
            return self._captured()
        return self._run()

    def _run(self) -> Tensor:
        positions = {}
        if self._positions is not None:
            self._positions.add_(1)
            positions["position_ids"] = self._positions.clone()
        inputs = self._model.prepare_inputs_for_generation(self._ids, next_sequence_length=1, **positions, **self._given)
        return self._model(**inputs, return_dict=True).logits[:, -1].float()

    def _captured(self) -> Tensor:
        """This step from Python, then the graph, which must say the same of the same step before it is believed.

        It is captured with Python's state after the step and tried on the tensors before it: a count that the model keeps in
        Python, and that every later replay would have wrong, shows.
        """
        before, seen = [(t, t.clone()) for t in self._small_state()], self._python_state()
        with self._uploads:
            logits = self._run()
        changed = [name for name, value in self._python_state().items() if seen.get(name) != value]
        if changed:
            self.note = f"the cache counts in Python ({changed[0]})"
            return logits
        after = [(t, t.clone()) for t in self._small_state()]
        try:
            with self._uploads.reused():
                graph, replayed = recorded(self._run)
        except (RuntimeError, NotImplementedError) as error:
            self.note = f"the step cannot be captured: {first_line(error)}"
            _put_back(after)
            return logits
        _put_back(before)
        graph.replay()
        error = float((replayed - logits).abs().max() / logits.abs().max())
        if not error <= _TOLERANCE:
            self.note = f"the captured step gives other logits ({error:.1e} of the largest)"
            _put_back(after)
            return logits
        self._graph, self._logits, self.captured = graph, replayed, True
        return replayed

    def _small_state(self) -> list[Tensor]:
        """What a step changes beside keys and values, which it writes to the same places again."""
        counts = [v for layer in self._cache.layers for v in vars(layer).values() if isinstance(v, Tensor) and v.numel() == 1]
        return counts if self._positions is None else [self._positions, *counts]

    def _python_state(self) -> dict[str, Any]:
        plain = (bool, int, float, str, type(None))
        layers = enumerate(self._cache.layers)
        return {f"{n} of layer {i}": v for i, layer in layers for n, v in vars(layer).items() if isinstance(v, plain)}


def recorded(run: Callable[[], Tensor]) -> tuple[Any, Tensor]:
    """A CUDA graph of a function that has run before, and where its result will be."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may allocate meanwhile
        out = run()
    return graph, out


def _put_back(state: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in state:
        tensor.copy_(value)
