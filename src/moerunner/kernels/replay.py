"""Up to some thousand tokens on a GPU: Python takes longer to launch a layer's kernels than they run. So the launches are
recorded once, as a CUDA graph, and later calls launch that.

A graph reads the weights where they lay when it was recorded. Their places are compared at every call, so that whatever
happens to a layer's tensors is seen. PyTorch's switches for matrix products are those of the recording.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moerunner.errors import first_line
from moerunner.values import LayerWeights

FEW_TOKENS, MOST_TOKENS = 64, 4096
_MOST_GRAPHS = {FEW_TOKENS: 128, MOST_TOKENS: 16}  # of a layer, up to so many tokens; others are launched kernel by kernel
_PLAIN = (Tensor, torch.nn.Parameter)


class Run(Protocol):
    """A layer: tokens [T, H] in, [T, H] out. alone: on the current stream and no other."""

    def __call__(self, x_TH: Tensor, *, alone: bool = False) -> Tensor: ...


class Stage:
    """Of one stream: where graphs find their tokens and leave their result, until the next replay. One serves all layers.

    lock: nothing of another thread comes between what one call gives the stream.
    """

    def __init__(self, device: torch.device, stream: int) -> None:
        self.lock, self.stream, self.pool = threading.Lock(), stream, torch.cuda.MemPool()
        self.side = torch.cuda.Stream(device, priority=-1)  # PyTorch deals out few streams; of these it is seldom asked for one
        self._rows: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and results of x's shape and dtype."""
        kind = most, *_ = _size(x), x.shape[1], x.dtype
        if kind not in self._rows:
            with torch.inference_mode(False):
                both = torch.empty(2, most, x.shape[1], dtype=x.dtype, device=x.device).unbind()
            self._rows[kind] = both[0], both[1]
        first, second = self._rows[kind]
        return first[: x.shape[0]], second[: x.shape[0]]


_stages: weakref.WeakValueDictionary[Hashable, Stage] = weakref.WeakValueDictionary()


@dataclass
class _Seen:
    """Tokens of one number on one stream: where the weights lay when they ran, and how to replay that, once it is recorded."""

    places: list[Any]
    replay: Callable[[Tensor], Tensor] | None = None


class Replays:
    """The graphs of one layer."""

    refused = False
    """For all layers: a recording failed, as others would."""

    def __init__(self) -> None:
        self._seen: dict[int, dict[Hashable, _Seen]] = {size: {} for size in _MOST_GRAPHS}

    def __call__(self, run: Run, x_TH: Tensor, w: LayerWeights, plan: Hashable) -> Tensor:
        """`run(x_TH)`, as one launch if it ran twice before with these weights for so many tokens.

        plan: which function `run` is. Its result must depend on the tokens and on the weights alone.
        """
        if torch.compiler.is_compiling() or Replays.refused or not 0 < x_TH.shape[0] <= MOST_TOKENS or not _plain(x_TH):
            return run(x_TH)
        places = _places(w)
        if places is None or (torch.is_grad_enabled() and (x_TH.requires_grad or w.requires_grad)):
            return run(x_TH)
        where = x_TH.device, torch.cuda.current_stream(x_TH.device).cuda_stream
        key = plan, x_TH.shape, where
        size = _size(x_TH)
        known = self._seen[size]
        seen = known.get(key)
        if seen is None or seen.places != places:
            if seen is not None or len(known) < _MOST_GRAPHS[size]:
                known[key] = _Seen(places)
            return run(x_TH)
        if seen.replay is not None:
            return seen.replay(x_TH)
        try:
            stage = _stages.get(where) or Stage(*where)
            _stages[where] = stage
            seen.replay, out = _recorded(run, x_TH, stage)
        except (RuntimeError, ImportError) as error:
            Replays.refused = True
            what = first_line(error)
            warnings.warn(f"layers' launches are not recorded as CUDA graphs, since one failed: {what}", stacklevel=3)
            return run(x_TH)
        return out


def _size(x: Tensor) -> int:
    return FEW_TOKENS if x.shape[0] <= FEW_TOKENS else MOST_TOKENS


def _plain(x: Tensor) -> bool:
    """Whether a call does nothing but run kernels on the current stream: nobody records, counts or differentiates them."""
    return (
        x.is_cuda
        and type(x) in _PLAIN
        and not torch.cuda.is_current_stream_capturing()
        and not torch.is_autocast_enabled("cuda")
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
        and forward_ad._current_level < 0
    )


def _places(w: LayerWeights) -> list[Any] | None:
    """Where every tensor lies and how; None if one is of a kind that does not tell."""
    tensors = [entry.tensor for one in w.experts for entry in one.tensors.values()]
    tensors += w.tensors.values()
    if any(type(t) not in _PLAIN for t in tensors):
        return None
    return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]


def _recorded(run: Run, x_TH: Tensor, stage: Stage) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """`run` for tokens of this number as one launch, and its result for these.

    These are run from where the graph reads them, so that every kernel and library is loaded when the recording begins. It is
    made without `torch.cuda.CUDAGraph`, which until torch 2.12 forbids other threads to draw random numbers meanwhile.

    Raises ImportError where cuda-bindings is missing, RuntimeError where CUDA refuses.
    """
    from moerunner.kernels import nvrtc  # here, since it needs Triton, without which a layer runs as well

    driver, _ = nvrtc.bindings()
    current, (x, out) = torch.cuda.current_stream(x_TH.device), stage.rows(x_TH)
    side, mode = stage.side.cuda_stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    with stage.lock:
        x.copy_(x_TH)
        first = run(x, alone=True).clone()
        stage.side.wait_stream(current)
        with torch.cuda.stream(stage.side), torch.cuda.use_mem_pool(stage.pool):
            nvrtc.checked(driver.cuStreamBeginCapture(side, mode), "begin to record")
            try:
                out.copy_(run(x, alone=True))
            except BaseException:
                driver.cuStreamEndCapture(side)  # whose error would be that of this one
                raise
            graph = nvrtc.checked(driver.cuStreamEndCapture(side), "end recording")
        whole = nvrtc.checked(driver.cuGraphInstantiate(graph, 0), "prepare what it recorded")
        driver.cuGraphDestroy(graph)
        current.wait_stream(stage.side)

    def replay(x_TH: Tensor) -> Tensor:
        with stage.lock:
            x.copy_(x_TH)
            nvrtc.checked(driver.cuGraphLaunch(whole, stage.stream), "launch what it recorded")
            return out.clone()

    weakref.finalize(replay, driver.cuGraphExecDestroy, whole).atexit = False
    return replay, first
