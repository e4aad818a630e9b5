"""The command line on the processes that torchrun starts: what is printed, by whom, and how all end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.parallel import pool
from tests.parallel.models import sample_apart

import moerunner
from moerunner import Layout
from moerunner.generate import generate
from moerunner.models.checkpoint import read_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny DeepSeek-V3 whose tokenizer has one token for each byte."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    from moerunner.verify import tiny_model

    made = tmp_path_factory.mktemp("torchrun")
    tiny_model("deepseek_v3").save_pretrained(made)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bytewise = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bytewise.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = tokenizers.decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytewise).save_pretrained(made)
    return made


def torchrun(ranks, *arguments):
    """`-m moerunner ...` or a script with arguments, on so many gloo ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks, "--standalone", *arguments]
    source = str(Path(moerunner.__file__).parents[1])  # that of this process, which is not always the installed one
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240, env=env)


def moerunner_says(err):
    return [line for line in err.splitlines() if line.startswith("moerunner: ")]


def statuses(err):
    """How the processes ended, of those that torchrun tells of; once one has, it may be faster to kill another (-15)."""
    return set(re.findall(r"exitcode\s*: (-?\d+)", err)) - {"-15"}


def one_rank(folder, **options):
    """The text that a model in this process makes."""
    torch.manual_seed(0)
    return generate(moerunner.load(folder), read_tokenizer(folder), "def f(", max_new_tokens=12, **options).text


def test_generate_says_once_what_one_rank_says(folder):
    sampled = ("--temperature", 0.9, "--seed", 3)
    done = torchrun(2, "-m", "moerunner", "generate", folder, "def f(", "--max-new-tokens", 12, *sampled, "--ep", 2, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["text"] == one_rank(folder, temperature=0.9, seed=3)
    assert (data["report"]["layout"]["ep"], data["report"]["rank"]) == (2, 0)
    assert moerunner_says(done.stderr) == []


@pytest.mark.slow
def test_rank_0_decides_on_every_token(folder):
    """Also where the ranks' scores and their random numbers differ."""
    first, second = pool.on_ranks(2, sample_apart, folder, Layout(ep=2))
    assert first == second


@pytest.mark.slow
def test_verify_compares_blocks_and_logits_and_counts_reductions(folder):
    done = torchrun(2, "-m", "moerunner", "verify", folder, "--tp", 2, "--tokens", 24, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["ok"] is True
    assert data["layout"] == {"dp": 1, "ep": 1, "tp": 2}
    assert data["logits"]["max"] <= 1e-5
    assert [layer["collectives"] for layer in data["layers"]] == [["all_reduce"]] * 2
    assert all(0 < layer["vs_transformers"]["max"] <= 2e-6 for layer in data["layers"])
    assert (data["all_reduces"], data["judged_tokens"], data["tokens"]) == (2, 24, 24)


BREAKS = """
import os, sys
from moerunner.cli import main
from moerunner.runner import MoERunner
right = MoERunner.forward
def wrong(self, x, **inputs):
    y = right(self, x, **inputs)
    if os.environ["RANK"] == "1" and {fails}:
        raise ValueError("is broken here")
    return y * (1.001 if os.environ["RANK"] == "1" else 1)
MoERunner.forward = wrong
main()
"""


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_with_one_line_that_names_it(folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(BREAKS.format(fails=True))
    done = torchrun(2, script, "generate", folder, "abc", "--ep", 2, "--json")
    (line,) = moerunner_says(done.stderr)
    assert line.startswith("moerunner: rank 1: ValueError: is broken here")
    assert json.loads(done.stdout)["error"]["message"] == line.removeprefix("moerunner: ")
    assert statuses(done.stderr) == {"4"}


@pytest.mark.slow
def test_a_rank_that_computes_something_else_is_a_mismatch_on_all(folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(BREAKS.format(fails=False))
    done = torchrun(2, script, "verify", folder, "--ep", 2, "--tokens", 24)
    assert done.stdout.count("MISMATCH") == 1
    assert re.search(r"model\.layers\.1\.mlp: output [\d.e-]+ from Transformers on rank 1, allowed 2e-06", done.stdout)
    assert "from Transformers on rank 0, allowed 2e-06" not in done.stdout
    assert statuses(done.stderr) == {"1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((), r"torchrun: there are 2 processes, and no layout for them\. Give --tp, --ep and --dp .* such as --ep 2"),
        (("--ep", 2, "--tp", 2), r"--tp 2 --ep 2: 4 ranks are asked for, there are 2 processes\..*nproc-per-node 4"),
    ],
    ids=["none", "other"],
)
def test_sizes_that_are_not_those_of_the_processes(folder, given, told):
    done = torchrun(2, "-m", "moerunner", "generate", folder, "abc", *given)
    (line,) = moerunner_says(done.stderr)
    assert re.match(rf"moerunner: rank [01]: {told}", line)
    assert done.stdout == ""
    assert statuses(done.stderr) == {"2"}


def test_several_ranks_need_torchrun(folder, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    command = [sys.executable, "-m", "moerunner", "verify", str(folder), "--ep", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert moerunner_says(done.stderr) == [
        "moerunner: --ep 2: 2 ranks are asked for, there is 1 process. Start it as torchrun --nproc-per-node 2 -m moerunner ..."
    ]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [("--ep", 2, "--tp", 2), ("--dp", 2, "--ep", 2), ("--dp", 4)], ids=str)
def test_four_ranks(folder, sizes):
    done = torchrun(4, "-m", "moerunner", "verify", folder, *sizes, "--tokens", 24, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert all(layer["vs_transformers"]["max"] <= 2e-6 for layer in data["layers"])
    assert data["all_reduces"] == (0 if sizes == ("--dp", 4) else 2)
    done = torchrun(4, "-m", "moerunner", "generate", folder, "def f(", "--max-new-tokens", 12, *sizes)
    assert done.returncode == 0, done.stderr
    assert done.stdout == one_rank(folder) + "\n"
    assert done.stderr.count("tokens/s") == 1


@pytest.mark.slow
def test_low_precision_is_judged_by_block(folder):
    done = torchrun(2, "-m", "moerunner", "verify", folder, "--ep", 2, "--tokens", 24, "--dtype", "bfloat16", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert (data["dtype"], data["judged_tokens"]) == ("bfloat16", 0)
    assert max(layer["vs_transformers"]["max"] for layer in data["layers"]) > 2e-6
