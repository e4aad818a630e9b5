"""Memory of several nodes, on a machine with one: tasks by node give the right sums, and pages are told where to lie."""

import ctypes
import platform

import pytest
import torch
from tests.support.numerics import relative_error

from moerunner.kernels.cpu import library, nodes
from moerunner.kernels.cpu.experts import run

TWO, WITH_AN_EMPTY_ONE = ((0,), (1,)), ((0, 1), (5,), (6,))


@pytest.fixture
def path():
    name, reason = library.chosen()
    if not name:
        pytest.skip(reason)
    return name


def layer(tokens, top_k, experts, *, only=None):
    """x, ids, weights, w13, w2 in float32; with `only` all ids are these."""
    hidden, inter = 96, 72
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    ids[torch.rand(ids.shape) < 0.1] = -1
    if only is not None:
        ids[ids >= 0] = only
    w13, w2 = torch.randn(experts, 2 * inter, hidden) / hidden**0.5, torch.randn(experts, hidden, inter) / inter**0.5
    return torch.randn(tokens, hidden), ids, torch.rand(tokens, top_k), w13, w2


def experts_of(path, tensors, *, rows=False, invariant=False, **options):
    rest = (None, None, None, None, 0, 0, 1.0, 0.0, None, False, None, None, False, rows, invariant)
    return run(path, *tensors, *rest, **options)


@pytest.mark.parametrize("cpus_of_nodes", [TWO, WITH_AN_EMPTY_ONE])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 2, 5), (3, 1, 1), (11, 4, 7), (60, 3, 10), (700, 2, 4)])
def test_sums_by_node_are_the_sums(path, monkeypatch, cpus_of_nodes, tokens, top_k, experts):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    tensors = layer(tokens, top_k, experts)
    x, ids, p, w13, w2 = tensors
    gate, up = torch.einsum("th,erh->ter", x.double(), w13.double()).chunk(2, dim=-1)
    each = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, w2.double())
    shares = torch.zeros(tokens, experts + 1, dtype=torch.float64).scatter_add(1, ids % (experts + 1), p.double())
    expected = torch.einsum("te,teh->th", shares[:, :-1], each)
    y = experts_of(path, tensors, cpus_of_nodes=cpus_of_nodes)
    assert relative_error(y, expected) <= 2e-6
    assert torch.equal(y, experts_of(path, tensors, cpus_of_nodes=cpus_of_nodes)), "it adds in one order"
    for flags in ({"rows": True}, {"invariant": True}):
        by_node, plainly = (experts_of(path, tensors, cpus_of_nodes=given, **flags) for given in (cpus_of_nodes, ()))
        assert torch.equal(by_node, plainly)


def test_experts_of_one_node_only(path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for only in (0, 4):
        tensors = layer(9, 2, 5, only=only)
        y = experts_of(path, tensors, cpus_of_nodes=TWO)
        assert relative_error(y, experts_of(path, tensors, cpus_of_nodes=()).double()) <= 1e-6


def test_nodes_of_the_system(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes.os, "sched_getaffinity", lambda process: {0, 2, 3, 9, 65}, raising=False)
    for node, cpus in ((0, "0-1,8"), (1, "4-5\n"), (2, "2-3,64-66\n"), (10, "")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus)
    found = nodes.of_system(tmp_path)
    assert found == {0: (0,), 2: (2, 3, 65)}
    table = nodes.of_cpus(tuple(found.values()))
    assert [table[cpu] for cpu in (0, 2, 3, 65)] == [0, 1, 1, 1]
    assert nodes.of_system(tmp_path / "nothing") == {}


@pytest.mark.parametrize(("found", "expected"), [({}, ()), ({3: (0, 1)}, ()), ({0: (0,), 2: (1,)}, TWO)])
def test_one_node_is_none(monkeypatch, found, expected):
    monkeypatch.setattr(nodes, "of_system", lambda: found)
    assert nodes.ours.__wrapped__() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_held_is_spread_and_no_copy_of_it(path, monkeypatch, dtype):
    spread = []
    monkeypatch.setattr(nodes, "ours", lambda: TWO)
    monkeypatch.setattr(nodes, "spread", lambda weights: spread.append(weights.data_ptr()))
    x, *rest, w13, w2 = layer(3, 2, 5)
    experts_of(path, (x.to(dtype), *rest, w13, w2))
    assert spread == [w13.data_ptr(), w2.data_ptr()]
    monkeypatch.setattr(nodes, "ours", lambda: ())
    experts_of(path, (x, *rest, w13, w2))
    assert len(spread) == 2, "one node has all there is"


@pytest.mark.skipif(not nodes.of_system() or platform.machine() != "x86_64", reason="the system does not tell of nodes")
def test_pages_are_told_where_to_lie():
    node, preferred, of_an_address = next(iter(nodes.of_system())), 1, 2
    weights = torch.randn(4, 1024, 1024)
    before = weights.clone()
    assert nodes.move(weights, (node, node)) == ""
    assert torch.equal(weights, before)
    mode, none = ctypes.c_int(-1), ctypes.c_ulong(0)
    middle = ctypes.c_ulong(weights.data_ptr() + weights.nbytes // 2 + 8192)
    assert ctypes.CDLL(None).syscall(239, ctypes.byref(mode), none, none, middle, ctypes.c_ulong(of_an_address)) == 0
    assert mode.value == preferred
    assert "does not move memory" in nodes.move(weights, (1000,))
    assert nodes.move(weights.transpose(0, 2), (node,)) == "experts do not lie one after the other"


@pytest.mark.filterwarnings("error")
def test_each_tensor_once_and_one_warning(monkeypatch):
    asked = []
    monkeypatch.setattr(nodes, "move", lambda weights, to: asked.append(len(weights)) or "it may not")
    nodes._warn.cache_clear()
    first, second = torch.zeros(3, 2), torch.zeros(4, 2)
    nodes._seen.difference_update({(w.data_ptr(), w.numel()) for w in (first, second)})
    with pytest.warns(UserWarning, match="it may not"):
        nodes.spread(first)
    nodes.spread(first)
    nodes.spread(second)  # a second warning would be an error
    assert asked == [3, 4]
