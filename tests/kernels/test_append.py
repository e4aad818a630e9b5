"""New tokens into a static cache in one launch, against Transformers' own layer."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("triton")

import moerunner  # noqa: E402
from moerunner.models.decoding import cache  # noqa: E402
from moerunner.verify import tiny_model  # noqa: E402


@pytest.fixture
def layers(monkeypatch, device):
    """Ours, which on a CPU runs the kernel in Triton's interpreter, and Transformers' own."""
    if device == "cpu":
        monkeypatch.setattr(cache, "_on_gpu", lambda tensor: True)
    return cache.layer_class()(max_cache_len=24), transformers.cache_utils.StaticLayer(max_cache_len=24)


def rows(batch, tokens, heads, width, device, dtype=torch.float32):
    return torch.randn(batch, tokens, heads, width, device=device).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "heads", "widths"), [(1, 4, (16, 16)), (3, 1, (24, 8)), (2, 3, (40, 48))])
def test_a_prompt_and_tokens_one_by_one(batch, heads, widths, dtype, layers, device):
    for tokens in (5, 9, 1, 1):
        states = [rows(batch, tokens, heads, width, device, dtype) for width in widths]
        states[1] = states[1].contiguous() if tokens == 9 else states[1].mT.contiguous().mT  # columns apart as well
        for found, expected in zip(*(layer.update(*states) for layer in layers), strict=True):
            assert torch.equal(found, expected)
        assert [int(layer.get_seq_length()) for layer in layers] == [int(layers[1].get_seq_length())] * 2
        assert int(layers[0].done) == 0
    assert int(layers[0].get_seq_length()) == 16


def test_the_kernel_is_used(layers, monkeypatch, device):
    from moerunner.kernels import append as kernel

    calls, own = [], kernel.append
    monkeypatch.setattr(kernel, "append", lambda *args: calls.append(args) or own(*args))
    layers[0].update(*(rows(1, 2, 2, 8, device) for _ in range(2)))
    assert len(calls) == 1


def test_what_does_not_fit_is_refused_by_transformers_own_code(layers, device):
    layers[0].update(*(rows(2, 2, 2, 8, device) for _ in range(2)))
    for wrong in (rows(1, 1, 2, 8, device), rows(2, 1, 2, 8, device, torch.float16), rows(2, 1, 2, 16, device)):
        with pytest.raises((RuntimeError, IndexError)):
            layers[0].update(wrong, wrong)


def test_nothing_is_written_behind_the_last_place(layers, device):
    """The loop never asks for it; memory that belongs to others must stay as it is all the same."""
    room = torch.zeros(2, 24 * 2 * 8, device=device)
    layers[0].update(*(rows(1, 23, 2, 8, device) for _ in range(2)))
    layers[0].keys = room[0].view(1, 2, 24, 8)
    layers[0].update(*(rows(1, 4, 2, 8, device) for _ in range(2)))
    assert int((room != 0).sum()) == 2 * 8


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_tokens_are_those_of_generate(family, layers, device):
    model = tiny_model(family).to(device)
    ids = torch.randint(3, 250, (2, 5), device=device)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    how = {"attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 0}
    expected = model.generate(ids, do_sample=False, **how)
    assert torch.equal(moerunner.generate(model, input_ids=ids, **how).sequences, expected)
    assert torch.equal(moerunner.generate(model, input_ids=ids, prefill_chunk=2, **how).sequences, expected)
