"""Memory of several nodes, on a machine with one: what the system tells of them, and pages are told where to lie."""

import ctypes
import os
import platform

import pytest
import torch

from moerunner.kernels.cpu import nodes


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


@pytest.mark.parametrize(("found", "expected"), [({}, ()), ({3: (0, 1)}, ()), ({0: (0,), 2: (1,)}, ((0,), (1,)))])
def test_one_node_is_none(monkeypatch, found, expected):
    monkeypatch.setattr(nodes, "of_system", lambda: found)
    assert nodes.ours.__wrapped__() == expected


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


@pytest.mark.parametrize(("experts", "to"), [(5, (0, 70)), (7, (2, 1, 0)), (2, (0, 1, 2))])
def test_every_expert_is_moved_to_the_node_whose_threads_read_it(monkeypatch, experts, to):
    """The native code says which that is: of expert e the one at e * nodes // experts."""
    told = []

    class Libc:
        def syscall(self, number, begin, length, mode, mask, bits, flags):
            words = (ctypes.c_ulong * (bits.value // 64)).from_address(mask.value)
            (node,) = (n for n in range(bits.value - 1) if words[n // 64] >> n % 64 & 1)
            told.append((begin.value, begin.value + length.value, node, mode.value, flags.value))
            return 0

    monkeypatch.setattr(nodes.ctypes, "CDLL", lambda *args, **options: Libc())
    monkeypatch.setattr(nodes, "_MBIND", {platform.machine(): 0})
    preferred, move, page = 1, 2, os.sysconf("SC_PAGE_SIZE")
    weights = torch.empty(experts, 3 * page)
    assert nodes.move(weights, to) == ""
    assert all(begin % page == 0 and (mode, flags) == (preferred, move) for begin, _, _, mode, flags in told)
    for e, expert in enumerate(weights):  # its pages but those that it may share
        inside = range(expert.data_ptr() + page, expert.data_ptr() + expert.nbytes - page, page)
        owners = [{node for begin, end, node, *_ in told if begin <= address < end} for address in inside]
        assert owners == [{to[e * len(to) // experts]}] * len(inside)


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
