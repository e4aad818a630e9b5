"""Proves that a patched model computes what Transformers computes: layer by layer, then end to end.

A folder is loaded by moerunner and by Transformers, and every tensor is compared. Then the model runs once as Transformers
wrote it, and every MoE block's input, output and choice of experts are kept. The patched block runs on the *same* input, so
that no error is carried from layer to layer, and both are held against the float64 oracle. In bf16 and fp16 the router's
logits tie at the k-th place in several percent of the tokens: there the experts that Transformers chose are replayed, and
routing is compared apart. Where two routings differ the token must be a tie, that is, rounding its logits to the dtype must
change the oracle's choice; anything else is a mismatch.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moerunner import models
from moerunner.errors import SpecError, UnsupportedError
from moerunner.models import adapt
from moerunner.models.checkpoint import guarded, read_tokenizer
from moerunner.models.load import kept_in_float32
from moerunner.verify.capture import recorded
from moerunner.verify.digests import compare_digests
from moerunner.verify.layer import Comparison
from moerunner.verify.loading import compare_loading
from moerunner.verify.report import Difference, LayerCheck, VerifyReport, difference
from moerunner.verify.running import run, sample_of
from moerunner.verify.tiny import tiny_model

__all__ = ["Difference", "LayerCheck", "VerifyReport", "damaged_weights", "difference", "tiny_model", "verify"]

_BEYOND = 1e15  # no weight, and far below what the highest bit of an exponent does
LOGITS_BOUND = 1e-5  # float32, end to end


def verify(
    model: Any = None,
    *,
    family: str | None = None,
    tokenizer: Any = None,
    text: str | None = None,
    input_ids: Tensor | None = None,
    num_tokens: int = 128,
    oracle_tokens: int = 8,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> VerifyReport:
    """Runs a model with and without moerunner on the same tokens and compares. A model is left patched or not, as it was.

    Args:
        model: a Transformers model, or the folder of one. It keeps its dtype and device unless they are given.
        family: instead of a model, the `model_type` of which a tiny random one is built, in float32 unless dtype is given.
        tokenizer: makes tokens of the text; a folder brings its own. Without one, tokens are drawn from `seed`.
        text: what to run on, the source of this module by default.
        input_ids: [1, T] tokens, instead of a text.
        num_tokens: at most so many tokens, and no more than the model has positions.
        oracle_tokens: how many tokens of each layer are computed in float64; the worst is always one of them.
    """
    start = time.perf_counter()
    if (model is None) == (family is None):
        raise SpecError("needs a model or a family, and not both", where="verify")
    name = family or (str(model) if isinstance(model, str | Path) else type(model).__name__)
    from_folder = isinstance(model, str | Path)
    changed, unsure = compare_digests(model) if from_folder and Path(model).is_dir() else ([], [])
    if family is not None:
        net = tiny_model(family, seed=seed, dtype=dtype or torch.float32)
    elif isinstance(model, str | Path):
        net = models.load(model, dtype=dtype, device=device)
        tokenizer = tokenizer or read_tokenizer(model)
    else:
        net = _cast(model, dtype)
    if device is not None:
        net = net.to(device)
    if "input_ids" not in inspect.signature(net.forward).parameters:
        raise UnsupportedError(f"takes {net.main_input_name}, not tokens", where=name)
    if input_ids is None:
        input_ids, sample = sample_of(net, tokenizer, text, num_tokens, seed)
    else:
        sample = "the tokens given"
    weight = net.get_input_embeddings().weight
    facts = {"model": name, "dtype": str(weight.dtype).removeprefix("torch."), "device": weight.device.type}
    facts |= {"sample": sample, "tokens": input_ids.shape[1]}
    damaged = changed + damaged_weights(net)
    if damaged:
        return VerifyReport(**facts, damaged=damaged, seconds=time.perf_counter() - start)
    loading, notes = compare_loading(net, model, dtype) if from_folder else ([], [])
    with _as_it_was(net), torch.no_grad():
        compared = _compare(name, net, input_ids.to(weight.device), weight.dtype, oracle_tokens)
    notes += compared.pop("notes") + unsure
    return VerifyReport(**facts, **compared, loading=loading, notes=notes, seconds=time.perf_counter() - start)


def _cast(model: Any, dtype: torch.dtype | None) -> Any:
    """In place, as Transformers does when it loads: buffers, and what a family keeps in float32, stay as they are."""
    if dtype is not None:
        kept = kept_in_float32(model, dtype)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data if kept.search(name) else parameter.data.to(dtype)
    return model


def damaged_weights(model: nn.Module) -> list[str]:
    """The parameters and saved buffers with values that no weight has: not finite, or beyond 1e15, as one flipped bit makes."""
    found = []
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            values = tensor if tensor.itemsize > 1 else tensor.float()
            bad = int((~torch.isfinite(values)).sum())
            if bad:
                found.append(f"{name}: {bad} of {tensor.numel()} values are not finite")
            elif values.numel() and float(values.abs().max()) > _BEYOND:
                found.append(f"{name}: a value of {float(values.abs().max()):.0e}")
    return found


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Eval mode inside; afterwards patched or not, training or not, as before."""
    training = model.training
    model.eval()
    try:
        with adapt.restored(model):
            yield
    finally:
        model.train(training)


def _compare(where: str, model: Any, input_ids: Tensor, dtype: torch.dtype, oracle_tokens: int) -> dict[str, Any]:
    report = adapt.patch(model)
    replaced = {r.name: r for r in report.replaced}
    skipped = [f"{s.name}: {s.reason}" for s in report.skipped]
    if not replaced:
        raise UnsupportedError("; ".join(skipped) or "has no MoE block that moerunner knows", where=type(model).__name__)
    with adapt.restored(model):  # the caller's own runners are what is compared
        routers = adapt.routers(model)
        adapt.unpatch(model)
        with recorded(model, routers) as calls:
            expected = guarded(lambda: run(model, input_ids), where, "does not run with Transformers' own code")
    actual = run(model, input_ids)
    layers, first_tie = [], input_ids.shape[1]
    for name, call in calls.items():
        comparison = Comparison(name, model.get_submodule(name), call, dtype)
        layer, tie = comparison.check(replaced[name].family, replaced[name].backend, oracle_tokens)
        layers.append(layer)
        first_tie = min(first_tie, tie)
    logits, problems = difference(actual, expected), []
    judged_tokens = first_tie if dtype == torch.float32 else 0
    judged = difference(actual[:, :judged_tokens], expected[:, :judged_tokens]).max
    if not math.isfinite(logits.max):
        problems.append("logits: not all are finite")
    elif judged > LOGITS_BOUND:
        problems.append(f"logits: {judged:.1e} from Transformers, allowed {LOGITS_BOUND:.0e}")
    return {
        "layers": layers,
        "logits": logits,
        "judged_tokens": judged_tokens,
        "same_top_token": int((actual.argmax(-1) == expected.argmax(-1)).sum()),
        "skipped": skipped + [f"{name}: not reached by these tokens" for name in replaced if name not in calls],
        "problems": problems,
        "notes": report.notes,
    }
