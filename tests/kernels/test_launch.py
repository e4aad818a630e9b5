"""Launches find their compiled kernel again; on a GPU each costs as much Python as the kernels of one token take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from triton.tools.tensor_descriptor import TensorDescriptor

from moerunner.kernels import common


class Kernel:
    """In place of a Triton kernel: tells which launches Triton was asked to find a kernel for, and which ran a known one."""

    def __init__(self) -> None:
        self.found: list[tuple[Any, ...]] = []
        self.known: list[tuple[Any, ...]] = []

    def fn(self) -> None: ...

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def find(*args: Any, **options: Any) -> Any:
            self.found.append((grid, args, options))
            return self.Compiled(self.known, options)

        return find

    class Compiled:
        def __init__(self, known: list[tuple[Any, ...]], options: dict[str, Any]) -> None:
            self.known, self.options = known, options

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args: self.known.append((grid, args, self.options))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(common, "INTERPRETING", False)
    monkeypatch.setattr(common, "_ready", {})
    monkeypatch.setattr(common, "_hopper", lambda device: True)
    return Kernel()


def run(kernel: Kernel, *args: Any, grid: tuple[int, ...] = (3,), device: str = "cpu", **how: Any) -> bool:
    """Whether Triton was asked."""
    before = len(kernel.found)
    common.launch(kernel, grid, *args, device=torch.device(device), **{"warps": 4, **how})
    return len(kernel.found) > before


def numbers(offset: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor whose first number lies so many places behind a multiple of 64 bytes."""
    whole = torch.empty(64, dtype=dtype)
    at = -whole.data_ptr() % 64 // whole.itemsize + offset
    return whole[at : at + 8]


def test_a_launch_like_an_earlier_one_asks_triton_no_more(kernel):
    x, y = numbers(), numbers()
    assert run(kernel, x, None, 7, 0.5, True)
    assert not run(kernel, y, None, 7, 0.5, True, grid=(5, 2))
    (grid, args, options), ((again, others, same),) = kernel.found[0], kernel.known
    assert grid == (3,)
    assert again == (5, 2, 1)
    assert args[0] is x
    assert options.pop("PDL") is True
    assert others[0] is y
    assert others[1:] == (None, 7, 0.5, True, True)
    assert same is options or same == {**options, "PDL": True}


@pytest.mark.parametrize(
    "other",
    [
        lambda x: (numbers(1), None, 7, 0.5),  # no longer 16-byte aligned
        lambda x: (x.to(torch.bfloat16), None, 7, 0.5),
        lambda x: (x, x, 7, 0.5),
        lambda x: (x, None, 16, 0.5),
        lambda x: (x, None, 7, 0.25),
    ],
)
def test_what_triton_compiles_anew_for_is_not_taken_for_known(kernel, other):
    x = numbers()
    run(kernel, x, None, 7, 0.5)
    assert run(kernel, *other(x))


@pytest.mark.parametrize("how", [{"warps": 8}, {"stages": 4}, {"first": True}, {"exact": True}, {"device": "meta"}])
def test_options_and_devices_have_kernels_of_their_own(kernel, how):
    run(kernel, numbers(), 1)
    assert run(kernel, numbers(), 1, **how)
    assert not run(kernel, numbers(), 1)


def test_another_kernel_with_the_same_arguments(kernel):
    run(kernel, numbers())
    other = Kernel()
    other.fn = lambda: None
    assert run(other, numbers())


def test_a_descriptor_counts_by_its_box_and_dtype(kernel):
    def described(box: int, dtype: torch.dtype = torch.bfloat16) -> TensorDescriptor:
        return TensorDescriptor(torch.empty(64, 64, dtype=dtype), [64, 64], [64, 1], [16, box])

    run(kernel, described(16))
    assert not run(kernel, described(16))
    assert run(kernel, described(32))
    assert run(kernel, described(16, torch.float32))


def test_no_more_kernels_are_kept_than_some_thousands(kernel, monkeypatch):
    monkeypatch.setattr(common, "_MOST_READY", 3)
    for n in range(10):
        run(kernel, n)
    assert len(common._ready) <= 3
