"""Experts held as int8: what the format gives, and models that `load` makes with it."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.support.numerics import relative_error
from tiny import build, prompt

from moerunner import ExpertWeights, UnsupportedError, WeightsError, quant
from moerunner.models import load, load_weights, unpatch
from moerunner.models.adapt import runners
from moerunner.ops.reference import reference
from moerunner.quant import int8
from moerunner.values import LayerWeights


def experts(dtype: torch.dtype = torch.float32) -> ExpertWeights:
    tensors = {"w13": torch.randn(3, 10, 7), "w2": torch.randn(3, 7, 5), "b13": torch.randn(3, 10), "b2": torch.randn(3, 7)}
    return ExpertWeights.of({n: t.to(dtype) for n, t in tensors.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_weight_is_off_by_half_a_step_at_most(dtype: torch.dtype) -> None:
    plain = experts(dtype)
    held = int8.quantize(plain)
    again = quant.dequantized(held, torch.float64)
    for name in ("w13", "w2"):
        before, after = plain.tensors[name].tensor.double(), again.tensors[name].tensor
        step = before.abs().amax(-1, keepdim=True) / 127
        assert ((after - before).abs() <= 0.5001 * step).all()
        assert held.tensors[name].tensor.dtype == torch.int8
        assert held.tensors[f"{name}_scale"].tensor.shape == (*before.shape[:2], 1)
    assert torch.equal(again.tensors["b13"].tensor, plain.tensors["b13"].tensor)


def test_rows_of_zeros_and_what_cannot_be_quantised() -> None:
    plain = experts()
    plain.w13[1, 2] = 0
    held = int8.quantize(plain)
    assert not quant.dequantized(held, torch.float32).w13[1, 2].any()
    with pytest.raises(WeightsError, match="already"):
        int8.quantize(held)
    plain.w2[0, 0, 0] = torch.inf
    with pytest.raises(WeightsError, match="w2 has a weight that is not finite"):
        int8.quantize(plain)


@pytest.mark.parametrize("kind", ["qwen3_moe-dense-between", "deepseek_v3-groups"])
def test_a_model_is_loaded_with_int8_experts(kind: str, tmp_path) -> None:
    """Every block is the float64 oracle's on the weights that the codes stand for; its own have no data any more."""
    build(kind).save_pretrained(tmp_path)
    model = load(tmp_path, dtype=torch.float32, quantize="int8")
    assert model.moerunner_report.replaced
    for name, runner in runners(model).items():
        layer = runner.layer_weights()
        assert layer.experts[0].format == "int8"
        assert layer.experts[0].w2.dtype == torch.int8
        plain = LayerWeights(tuple(quant.dequantized(e, torch.float32) for e in layer.experts), layer.tensors, layer.functions)
        x = torch.randn(5, runner.spec.hidden_size)
        assert relative_error(runner(x), reference(runner.spec, plain, x, topk=runner.route(x))) <= 3e-6, name
        assert any(p.is_meta for p in model.get_submodule(name).parameters())
    logits = model(prompt()).logits
    assert torch.isfinite(logits).all()
    assert torch.equal(copy.deepcopy(model)(prompt()).logits, logits)


def test_what_a_quantised_model_cannot_do_is_said(tmp_path) -> None:
    build("mixtral-top2").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"cannot be quantised to 'int3'.*'int8'"):
        load(tmp_path, quantize="int3")
    model = load(tmp_path, quantize="int8")
    with pytest.raises(UnsupportedError, match="quantised"):
        model.save_pretrained(tmp_path / "again")
    with pytest.raises(UnsupportedError, match="held quantised"):
        unpatch(model)
    with pytest.raises(UnsupportedError, match="data"):
        load_weights(model, tmp_path)
