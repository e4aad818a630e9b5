"""Few tokens on a GPU: Python takes longer to launch a layer's kernels than they run. So the launches are recorded once, as a
CUDA graph, and later calls launch that.

A graph reads the weights where they lay when it was recorded. Their places are compared at every call, so that whatever
happens to a layer's tensors is seen.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from moerunner.values import LayerWeights

MOST_TOKENS = 64
_MOST_GRAPHS = 2 * MOST_TOKENS  # of a layer; a size beyond them is launched kernel by kernel


class Stage:
    """Of one stream: where graphs find their tokens and leave their result, until the next replay.

    One serves all layers. lock: nothing of another thread comes between what one call gives the stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.lock, self.pool, self.side = threading.Lock(), torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        self._rows: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and results of x's shape and dtype."""
        kind = x.shape[1], x.dtype
        if kind not in self._rows:
            with torch.inference_mode(False):
                both = torch.empty(2, MOST_TOKENS, x.shape[1], dtype=x.dtype, device=x.device).unbind()
            self._rows[kind] = both[0], both[1]
        first, second = self._rows[kind]
        return first[: x.shape[0]], second[: x.shape[0]]


_stages: WeakValueDictionary[Hashable, Stage] = WeakValueDictionary()


@dataclass
class _Seen:
    """Tokens of one number on one stream: where the weights lay when they ran, and how to replay that, once it is recorded."""

    places: list[Any]
    replay: Callable[[Tensor], Tensor] | None = None


class Replays:
    """The graphs of one layer."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, _Seen] = {}
        self._refused = False

    def __call__(self, run: Callable[[Tensor], Tensor], x_TH: Tensor, w: LayerWeights, plan: Hashable) -> Tensor:
        """`run(x_TH)`, [T, H] in x's dtype, as one launch if it ran before with these weights for so many tokens.

        plan: which function `run` is. Its result must depend on the tokens and on the weights alone.
        """
        if self._refused or not 0 < x_TH.shape[0] <= MOST_TOKENS or not _plain(x_TH):
            return run(x_TH)
        where = x_TH.device, torch.cuda.current_stream(x_TH.device).cuda_stream
        key, places = (plan, x_TH.shape, where), _places(w)
        seen = self._seen.get(key)
        if seen is None or seen.places != places:
            if seen is not None or len(self._seen) < _MOST_GRAPHS:
                self._seen[key] = _Seen(places)
            return run(x_TH)
        if seen.replay is None:
            stage = _stages.get(where) or Stage(x_TH.device)
            _stages[where] = stage
            try:
                seen.replay = _recorded(run, x_TH, stage)
            except RuntimeError as error:
                self._refused = True
                what = (str(error).strip() or type(error).__name__).splitlines()[0]
                warnings.warn(f"a layer's launches cannot be recorded as a CUDA graph: {what}", stacklevel=3)
                return run(x_TH)
        return seen.replay(x_TH)


def _plain(x: Tensor) -> bool:
    """Whether a call does nothing but run kernels on the current stream: no one records, compiles, counts or casts them."""
    return (
        x.is_cuda
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.cuda.is_current_stream_capturing()
        and not torch.is_autocast_enabled("cuda")
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _places(w: LayerWeights) -> list[Any]:
    """Where every tensor lies and how."""
    tensors = [entry.tensor for one in w.experts for entry in one.tensors.values()]
    return [(t.data_ptr(), t.shape, t.stride()) for t in (*tensors, *w.tensors.values())]


def _recorded(run: Callable[[Tensor], Tensor], like: Tensor, stage: Stage) -> Callable[[Tensor], Tensor]:
    """`run` for tokens of this number as one launch. Nothing runs yet, and other threads may allocate meanwhile."""
    graph, current, (x, out) = torch.cuda.CUDAGraph(), torch.cuda.current_stream(like.device), stage.rows(like)
    with stage.lock:
        stage.side.wait_stream(current)
        with torch.cuda.stream(stage.side):
            graph.capture_begin(pool=stage.pool, capture_error_mode="thread_local")
            try:
                out.copy_(run(x))
            finally:
                graph.capture_end()
        current.wait_stream(stage.side)

    def replay(x_TH: Tensor) -> Tensor:
        with stage.lock:
            x.copy_(x_TH)
            graph.replay()
            return out.clone()

    return replay
