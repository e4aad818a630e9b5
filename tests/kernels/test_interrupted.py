"""Ctrl-C at any moment of loading and generating: what was replaced is put back, and nothing is left behind.

Without a GPU the kernels that stand in for parts of the model run in Triton's interpreter.
"""

import os
import signal
import sys
import tempfile
import threading

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("triton")

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

import moerunner  # noqa: E402
import moerunner.kernels.rotary  # noqa: E402
from moerunner.models import decoding  # noqa: E402
from moerunner.models.decoding import rotary  # noqa: E402
from moerunner.verify import tiny_model  # noqa: E402


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """Signals are those of a terminal: what starts tests in the background may have them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(decoding, "kernels_run", lambda model: True)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def model(device):
    model = tiny_model("qwen3_moe").to(device)
    moerunner.patch(model)
    return model


def press():
    os.kill(os.getpid(), signal.SIGINT)


class At:
    """Presses Ctrl-C when it is called for the n-th time."""

    def __init__(self, n):
        self.left = n

    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            press()


def state(model):
    """What generating replaces while it lasts, and what it could leave behind."""
    tables = [table[name] for table, name in rotary.places_of(model) if name in table]
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    files = sorted(os.listdir(tempfile.gettempdir()))
    return tables, forwards, hooks, ALL_ATTENTION_FUNCTIONS["sdpa"], threading.active_count(), torch.is_grad_enabled(), files


MOMENTS = [("embedding", 1), ("norm", 1), ("rotary", 1), ("rotary", 9), ("block", 2), ("head", 1), ("head", 5)]


@pytest.mark.parametrize(("where", "n"), MOMENTS)
@pytest.mark.rotating(3)
def test_generate(where, n, model, device, monkeypatch, tmp_path):
    """In the prompt, in the trial of a form, in the first token after it, and in a later one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if (where, n) == ("head", 5) and device == "cuda":
        pytest.skip("a later step is the replay of a CUDA graph, in which no Python runs")
    ids = torch.randint(3, 250, (1, 3), device=device)
    expected = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    at = At(n)
    modules = {"embedding": model.get_input_embeddings(), "norm": model.model.norm, "head": model.get_output_embeddings()}
    modules["block"] = model.model.layers[1].mlp
    if where == "rotary":
        kernels = sys.modules["moerunner.kernels.rotary"]
        turn = kernels.rotary
        monkeypatch.setattr(kernels, "rotary", lambda *args: at() or turn(*args))
    else:
        modules[where].register_forward_hook(at)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        moerunner.generate(model, input_ids=ids, max_new_tokens=12, pad_token_id=0)
    assert state(model) == before
    made = moerunner.generate(model, input_ids=ids, max_new_tokens=3, pad_token_id=0)
    assert torch.equal(made.sequences, expected), "it does not generate as before"


def test_what_stands_in_is_there_while_it_lasts(model, device):
    """Or the test above could not fail."""
    before, seen = state(model), []
    model.get_output_embeddings().register_forward_hook(lambda *_: seen.append(state(model)))
    moerunner.generate(model, input_ids=torch.randint(3, 250, (1, 3), device=device), max_new_tokens=2, pad_token_id=0)
    assert all(a != b for a, b in zip(seen[0][:2], before[:2], strict=True))
    assert seen[0][3] is not before[3]


def test_while_norms_are_being_replaced(model, device, monkeypatch):
    """Between two of them: those that were not come to yet have nothing to put back."""
    norm, at = type(model.model.norm), At(3)

    def press_at(self, name, value):
        if name == "forward":
            at()
        torch.nn.Module.__setattr__(self, name, value)

    before = state(model)
    monkeypatch.setattr(norm, "__setattr__", press_at, raising=False)
    with pytest.raises(KeyboardInterrupt):
        moerunner.generate(model, input_ids=torch.randint(3, 250, (1, 3), device=device), max_new_tokens=2, pad_token_id=0)
    assert state(model) == before


@pytest.mark.parametrize("n", [1, 5, 20])
def test_load(n, model, monkeypatch, tmp_path):
    folder = tmp_path / "model"
    moerunner.unpatch(model)
    model.cpu().save_pretrained(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tensorfile, at = sys.modules["moerunner.models.tensorfile"], At(n)
    read = tensorfile.Reader.read

    def pressed(self, tensor, position, into):
        at()
        read(self, tensor, position, into)

    opened = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    threads, files = set(threading.enumerate()), sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patched:
        patched.setattr(tensorfile.Reader, "read", pressed)
        with pytest.raises(KeyboardInterrupt):
            moerunner.load(folder)
    for thread in set(threading.enumerate()) - threads:  # one that was being started ends by itself
        if thread._started.wait(60):  # else the interrupt came before there was a thread
            thread.join(60)
        assert not thread.is_alive(), thread
    assert sorted(tmp_path.rglob("*")) == files
    if opened:
        assert len(os.listdir("/proc/self/fd")) <= len(opened)
    moerunner.load(folder)
