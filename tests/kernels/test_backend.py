"""What the Triton backend declares, where it is chosen, and what it is refused."""

import dataclasses

import pytest
import torch

from moerunner.errors import UnsupportedError
from moerunner.experts import choose, registry
from moerunner.experts.base import Request
from moerunner.kernels import tiles
from moerunner.spec import ActivationSpec

pytest.importorskip("triton", reason="Triton is not installed")
REQUEST = Request(
    device="cuda",
    dtype="bfloat16",
    activation=ActivationSpec(),
    gate_up="concat",
    shapes=((8, 32, 64), (8, 64, 16)),
    strides=((2048, 64, 1), (1024, 16, 1)),
)


def test_preferred_on_cuda_and_absent_on_cpu():
    chosen = choose(REQUEST)
    assert chosen.backend.INFO.name == "triton"
    on_cpu = choose(dataclasses.replace(REQUEST, device="cpu"))
    assert ("triton", "runs on cuda, not on cpu") in on_cpu.refused


def test_refused():
    with pytest.raises(UnsupportedError, match="no backward"):
        choose(dataclasses.replace(REQUEST, grad=True), "triton")


def test_chosen_where_bits_must_not_depend_on_the_batch():
    assert choose(dataclasses.replace(REQUEST, batch_invariant=True)).backend.INFO.name == "triton"


def test_refused_where_triton_is_absent(monkeypatch):
    info = dataclasses.replace(registry.get("triton").INFO, requires="a_module_nobody_has")
    monkeypatch.setattr(registry.get("triton"), "INFO", info)
    assert ("triton", "needs a_module_nobody_has, which is not installed") in choose(REQUEST).refused


@pytest.mark.parametrize("tokens", [1, 2, 8, 64, 512, 2048, 8192, 131072])
@pytest.mark.parametrize(("top_k", "experts", "hidden", "inter"), [(8, 128, 2048, 768), (2, 8, 4096, 14336), (32, 1024, 64, 8)])
def test_tiles_are_powers_of_two(tokens, top_k, experts, hidden, inter):
    """Whatever the shape; one token never pays for a sort."""
    for itemsize in (2, 4):
        chosen = tiles.choose(tokens, top_k, experts, hidden, inter, itemsize=itemsize)
        sizes = [getattr(chosen, "block_m", 16)]
        for product in (chosen.up, chosen.down):
            sizes += [product.block_n, product.block_k, product.warps]
        assert all(size & (size - 1) == 0 for size in sizes)
        assert tokens > 1 or isinstance(chosen, tiles.Few)


@pytest.mark.parametrize(("at", "entered"), [("cuda:0", []), ("cuda:1", [torch.device("cuda:1")]), ("cpu", [])])
def test_kernels_run_on_the_device_of_their_tensors(monkeypatch, at, entered):
    """Triton launches on the current GPU, whatever its arguments are on."""
    from moerunner.kernels import common

    seen = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            seen.append(self.device)

        def __exit__(self, *_):
            seen.append("left")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Device)
    with common.current(torch.device(at)):
        assert seen == entered
    assert seen == entered + ["left"] * len(entered)
