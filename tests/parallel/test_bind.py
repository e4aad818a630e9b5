"""`Layout.bind` without a mesh: over the process group there is, over torchrun's, or an error that says what to do."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from tests.parallel.pool import on_ranks

from moerunner import DistributedError, Layout


def sum_over(layout, axes):
    bound = layout.bind()
    return bound.comm.coordinates, int(bound.comm.all_reduce(torch.tensor([10**bound.comm.rank]), axes))


def test_the_mesh_lies_over_the_process_group_that_there_is():
    answers = on_ranks(2, sum_over, Layout(tp=2), ("tp",))
    assert answers == [({"dp": 0, "ep": 0, "tp": 0}, 11), ({"dp": 0, "ep": 0, "tp": 1}, 11)]


def test_ranks_count_with_tp_fastest():
    answers = on_ranks(4, sum_over, Layout(ep=2, tp=2), ("ep",))
    assert [total for _, total in answers] == [101, 1010, 101, 1010]
    assert answers[1][0] == {"dp": 0, "ep": 0, "tp": 1}


def test_a_layout_of_other_size_than_the_process_group_is_refused():
    with pytest.raises(DistributedError, match=r"4 ranks \(dp 1 x ep 4 x tp 1\), there are 2 processes.*nproc-per-node 4"):
        on_ranks(2, sum_over, Layout(ep=4), ("ep",))


def test_without_processes_it_says_how_to_start_them(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(DistributedError, match=r"there is no process group.*torchrun --nproc-per-node 2"):
        Layout(ep=2).bind()


@pytest.mark.slow
def test_torchrun_is_all_that_it_needs(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        import torch
        from moerunner import Layout
        bound = Layout(ep=2, timeout=30).bind()
        total = int(bound.comm.all_reduce(torch.tensor([1 + bound.comm.rank]), ("ep",)))
        sys.stdout.write(f"sum {total}\\n")
    """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert (done.returncode, done.stdout) == (0, "sum 3\n" * 2), done.stderr
