"""Weights on their way to a GPU, without one: what waits on its stream is a queue that an event empties."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from safetensors.torch import save_file

from moerunner import CheckpointError, Layout, load
from moerunner.models import staging
from moerunner.models.tensorfile import read_header
from moerunner.parallel.comm import simulate
from moerunner.verify import tiny_model

CPU = torch.device("cpu")


class Stream:
    """Copies that were asked for and have not run, as on a GPU that is behind."""

    def __init__(self):
        self.waiting, self.ran, self.most = [], 0, 0
        self.lock = threading.Lock()  # copies run one after the other, whoever waits for them

    def ask(self, copy):
        self.waiting.append(copy)
        self.most = max(self.most, len(self.waiting) - self.ran)

    def run(self, end):
        with self.lock:
            for copy in self.waiting[self.ran : end]:
                copy()
            self.ran = max(self.ran, end)

    def event(self):
        stream = self

        class Event:
            at = 0

            def record(self, given):
                self.at = len(stream.waiting)

            def synchronize(self):
                stream.run(self.at)

        return Event()


@pytest.fixture
def stream(monkeypatch):
    """A stream in place of the GPU's, and buffers of 4 KiB that two threads fill."""
    found, plain = Stream(), staging._Buffer

    class Buffer(plain):
        def __init__(self, device):
            super().__init__(CPU)
            self._copied = found.event()

    monkeypatch.setattr(staging, "ROOM", 4096)
    monkeypatch.setattr(staging, "READERS", 2)
    monkeypatch.setattr(staging, "_Buffer", Buffer)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    return found


@pytest.fixture
def stored(tmp_path):
    """Tensors of several sizes and dtypes, one after the other in a file, and as the file has them."""
    given = {
        "a": torch.randn(3, 700),
        "b": torch.randn(7).bfloat16(),  # what follows does not lie at a multiple of its own size
        "c": torch.randn(5, 9),
        "d": torch.randint(0, 255, (9001,), dtype=torch.uint8),
        "e": torch.empty(0, 4),
        "f": torch.tensor(3),
        **{f"g{i}": torch.randn(11, 3) for i in range(200)},
    }
    save_file(given, tmp_path / "f")
    return given, read_header(tmp_path / "f")


def all_of(tensor):
    return tuple(slice(0, size) for size in tensor.shape)


def test_every_number_comes_once_and_none_is_overwritten_before_it_was_copied(stored, stream):
    given, found = stored
    targets = {name: torch.full_like(t, torch.nan if t.is_floating_point() else 77) for name, t in given.items()}
    read = []

    def write(piece, values):
        stream.ask(lambda: targets[piece.told][piece.box].copy_(values))

    pieces = [p for tensor in found for p in staging.pieces_for(tensor, all_of(tensor), tensor.name)]
    staging.staged(pieces, CPU, read.append, write)
    stream.run(len(stream.waiting))
    for name, tensor in given.items():
        assert torch.equal(targets[name], tensor), name
    assert sum(read) == sum(t.nbytes for t in given.values())
    assert len(read) < len(pieces) / 4, "neighbours are read together"
    assert stream.most > 2, "nothing is read while a piece travels"


def test_parts_of_tensors_are_read_and_nothing_between(stored, stream):
    given, found = stored
    read, got = [], {}
    boxes = {"a": (slice(1, 2), slice(0, 700)), "c": (slice(1, 3), slice(0, 9)), "g7": (slice(0, 4), slice(0, 3))}
    pieces = [p for t in found if t.name in boxes for p in staging.pieces_for(t, boxes[t.name], t.name)]
    staging.staged(pieces, CPU, read.append, lambda p, v: got.setdefault(p.told, []).append(v.clone()))
    for name, box in boxes.items():
        assert torch.equal(torch.cat([v.flatten() for v in got[name]]), given[name][box].flatten())
    assert sum(read) == sum(given[name][box].nbytes for name, box in boxes.items())


@pytest.mark.parametrize("fails", ["the file", "the target"])
def test_a_failure_ends_all_threads_and_names_the_tensor(fails, stored, stream, tmp_path):
    _, found = stored
    before = threading.active_count()
    pieces = [p for tensor in found for p in staging.pieces_for(tensor, all_of(tensor), tensor.name)]
    last = next(t for t in found if t.name == "g150")
    if fails == "the file":
        (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[: last.start + 8])

    def write(piece, values):
        if fails == "the target" and piece.told == "g3":
            raise RuntimeError("no room")

    what = "it ends within '(g.*)':" if fails == "the file" else "no room"
    with pytest.raises(CheckpointError if fails == "the file" else RuntimeError, match=what) as caught:
        staging.staged(pieces, CPU, lambda count: None, write)
    if fails == "the file":  # whichever thread comes first to what is gone
        (named,) = re.findall(what, str(caught.value))
        assert next(t.start for t in found if t.name == named) >= last.start
    assert threading.active_count() == before


def test_no_room_for_a_buffer_ends_the_threads_that_wait_for_one(stored, stream, monkeypatch):
    """As where no more memory can be locked, or Ctrl-C comes then."""
    _, found = stored
    before, made, plain = threading.active_count(), [], staging._Buffer

    def buffer(device):
        if made:
            raise MemoryError("no room")
        made.append(plain(device))
        return made[0]

    monkeypatch.setattr(staging, "_Buffer", buffer)
    pieces = [p for tensor in found for p in staging.pieces_for(tensor, all_of(tensor), tensor.name)]
    with pytest.raises(MemoryError, match="no room"):
        staging.staged(pieces, CPU, lambda count: None, lambda piece, values: None)
    assert threading.active_count() == before


@pytest.mark.parametrize("layout", [Layout(), Layout(ep=2), Layout(tp=2)], ids=["whole", "ep2", "tp2"])
def test_a_model_that_comes_this_way_is_the_same(layout, tmp_path, monkeypatch):
    def states():
        if layout.world == 1:
            return [load(tmp_path).state_dict()]
        return simulate(layout, lambda bound: load(tmp_path, layout=bound).state_dict())

    tiny_model("mixtral").save_pretrained(tmp_path, max_shard_size="100KB")
    expected, came = states(), []
    staged = staging.staged
    monkeypatch.setattr(staging, "ROOM", 4096)
    monkeypatch.setattr(staging, "serves", lambda device: True)
    monkeypatch.setattr(staging, "staged", lambda pieces, *rest: came.append(len(pieces)) or staged(pieces, *rest))
    for mine, plain in zip(states(), expected, strict=True):
        assert mine.keys() == plain.keys()
        assert all(torch.equal(mine[name], tensor) for name, tensor in plain.items())
    assert len(came) == layout.world
    assert min(came) > 10
