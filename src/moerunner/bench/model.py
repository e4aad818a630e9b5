"""A whole model end to end: a decode step and a prefill by each implementation of its MoE blocks, beside the floor.

moerunner bench --model qwen3-30b-a3b --layers 12 --save model.json --plot model.png

Random weights of the config are made on the device, unless a folder with weights is given and every layer is wanted. What a
part of the model costs is the time of the whole less that of the same model in which the part hands its input through.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moerunner.bench.shapes import Peaks, measure_peaks
from moerunner.errors import SpecError, UnsupportedError, first_line
from moerunner.models import load, patch, unpatch
from moerunner.models.checkpoint import read_recipe
from moerunner.models.decoding import fused
from moerunner.models.decoding.cache import Unfit, static_cache
from moerunner.models.decoding.step import Step
from moerunner.models.prepare import sites, spec_of
from moerunner.spec import MoESpec

MODELS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
}
"""Shapes of well-known models by name; anything else is given as a config or a folder."""

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "patched", "generate")
"""Transformers' own, by the names of its `experts_implementation`; the patched model; and as `moerunner.generate` runs that."""

_TURNS = {"decode": 3, "prefill": 8}
_WARM, _STEPS, _REPLAYS, _PREFILLS = 2, 8, 24, 2
_PARTS = ("moe", "attention")


def measure(
    config_or_path: Any,
    *,
    layers: int | None = None,
    batches: Sequence[int] = (1, 32),
    prompts: Sequence[int] = (2048, 8192),
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
    implementations: Sequence[str] | None = None,
    context: int = 128,
    shares: bool = True,
    seconds: float = float("inf"),
    peaks: Peaks | None = None,
) -> dict[str, Any]:
    """Times of a decode step and of a prefill, in seconds, of one sequence length each; JSON-ready.

    Args:
        config_or_path: a Transformers config, a folder with a config.json, a name of `MODELS`, or a model that is there.
        layers: build the first so many layers only. batches: rows of a decode step. prompts: tokens of a prefill, one row.
        implementations: of `IMPLEMENTATIONS`; None: all. context: tokens in the cache when decoding begins.
        shares: also measure what MoE blocks, attention and head cost. seconds: begin nothing new after so many.
        peaks: of the device, for the floor; None measures them.

    Returns:
        {"model", "layers", "dtype", "device", "context", "decode": [...], "prefill": [...]}. The implementations of one size
        take turns, and a time is the median of the turns. A row of `decode` has batch, implementation, `python` and `graph`
        (seconds of a step launched from Python and inside a CUDA graph; None where that cannot be, with the reason in `note`),
        `floor`, and `share`: seconds of moe, attention, head, rest and launch. A row of `prefill` has tokens and `python` in
        their place.

    Raises:
        SpecError: an unknown implementation or name. Others as `load` does.
    """
    chosen = tuple(implementations or IMPLEMENTATIONS)
    unknown = [name for name in chosen if name not in IMPLEMENTATIONS]
    if unknown:
        raise SpecError(f"{', '.join(unknown)}: known are {', '.join(IMPLEMENTATIONS)}", where="implementations")
    end = time.monotonic() + seconds
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    model = build(config_or_path, layers=layers, dtype=dtype, device=device)
    peaks = peaks or measure_peaks(str(device), dtype)
    found: dict[str, Any] = {
        "model": config_or_path if isinstance(config_or_path, str) else model.config.model_type,
        "layers": model.config.get_text_config().num_hidden_layers,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "context": context,
        "decode": [],
        "prefill": [],
    }
    ready = []
    for name in chosen:
        if name in ("patched", "generate") or hasattr(model, "set_experts_implementation"):
            ready.append(name)
        else:
            found["decode"].append({"implementation": name, "python": None, "note": "this Transformers does not have it"})
    with torch.no_grad():
        for key, sizes in (("decode", batches), ("prefill", prompts)):
            for size in sizes:
                rows = _in_turns(model, ready, key, size, context, end)
                for name, row in rows.items():
                    if shares and row["python"] is not None and time.monotonic() < end:
                        with _as(model, name):
                            row["share"] = _share(partial(_times(key), model, size, context, name), row, model, size, key)
                    row["floor"] = floor(model, size, key, peaks, context)
                    found[key].append({"batch" if key == "decode" else "tokens": size, "implementation": name} | row)
    return found


def build(config_or_path: Any, *, layers: int | None, dtype: torch.dtype, device: torch.device) -> Any:
    """The model in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(config_or_path, nn.Module):
        return config_or_path.eval()
    named = isinstance(config_or_path, str) and config_or_path in MODELS
    if named:
        config = AutoConfig.for_model(**MODELS[config_or_path])
    elif isinstance(config_or_path, str | Path):
        folder = Path(config_or_path)
        if not folder.exists():
            raise SpecError(f"is neither a folder nor one of {', '.join(MODELS)}", where=str(folder))
        if layers is None and any(folder.glob("*.safetensors")):
            return load(folder, dtype=dtype, device=device)
        config = read_recipe(folder, quantised=True).config
    else:
        config = copy.deepcopy(config_or_path)
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        for lists in ("layer_types", "mlp_layer_types"):
            if isinstance(getattr(text, lists, None), list):
                setattr(text, lists, getattr(text, lists)[:layers])
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@contextmanager
def _as(model: Any, name: str) -> Iterator[None]:
    before = model.config._experts_implementation
    try:
        if name in ("patched", "generate"):
            patch(model)
        else:
            unpatch(model)
            model.set_experts_implementation(name)
        if name == "generate":
            with fused(model):
                yield
        else:
            yield
    finally:
        unpatch(model)
        model.set_experts_implementation(before)


def _in_turns(model: Any, names: Sequence[str], key: str, size: int, context: int, end: float) -> dict[str, dict[str, Any]]:
    """A row for each implementation, the median of rounds in which each has its turn: a host's speed changes by a third."""
    rounds: dict[str, list[dict[str, Any]]] = {}
    for _ in range(_TURNS[key]):
        for name in names:
            if time.monotonic() < end:
                rounds.setdefault(name, []).append(_guarded(model, key, size, context, name))
    rows = {}
    for name, taken in rounds.items():
        rows[name] = next((row for row in taken if row["python"] is None), dict(taken[0]))
        for how in ("python", "graph"):
            if rows[name].get(how) is not None:
                rows[name][how] = statistics.median(row[how] for row in taken if row[how] is not None)
    return rows


def _guarded(model: Any, key: str, size: int, context: int, name: str) -> dict[str, Any]:
    """One turn, or why there is none: one implementation's failure must not hide the others."""
    try:
        with _as(model, name):
            return _times(key)(model, size, context, name)
    except (RuntimeError, NotImplementedError, ValueError, UnsupportedError, Unfit) as error:  # out of memory too
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {"python": None, "graph": None, "note": f"{type(error).__name__}: {first_line(error)[:200]}"}


def _share(times: Callable[[], dict[str, Any]], row: dict[str, Any], model: Any, size: int, key: str) -> dict[str, float]:
    """Seconds of each part: of the whole less those without it."""
    whole, share = _of_gpu(row), {}
    for part in _PARTS:
        with without(model, part):
            share[part] = whole - _of_gpu(times())
    share["head"] = _head(model, size if key == "decode" else 1)
    share["rest"] = whole - sum(share.values())
    return share | ({"launch": row["python"] - whole} if key == "decode" else {})


def _of_gpu(row: dict[str, Any]) -> float:
    """Seconds without those of launching, where there is a graph."""
    return row["python"] if row.get("graph") is None else row["graph"]


def _decode(model: Any, batch: int, context: int, name: str) -> dict[str, Any]:
    python, graph, note = _step(model, batch, context)
    return {"python": python, "graph": graph, "note": note}


def _step(model: Any, batch: int, context: int) -> tuple[float, float | None, str]:
    """Seconds of a step from Python and in a graph, and why there is no graph."""
    cuda = model.device.type == "cuda"
    steps = _WARM + _STEPS + cuda * (_WARM + _REPLAYS)
    ids = torch.randint(model.config.get_text_config().vocab_size, (batch, context), device=model.device)
    given = {"past_key_values": static_cache(model, context + steps), "use_cache": True, "logits_to_keep": 1}
    model(input_ids=ids, **given)
    given["position_ids"] = torch.arange(context, device=model.device).expand(batch, -1)
    tokens = ids[:, -1].clone()
    step = Step(model, given, batch, context + steps, capture=False)
    python = _median(lambda: step(tokens), _STEPS)
    if not cuda:
        return python, None, ""
    step.capture()
    graph = _median(lambda: step(tokens), _REPLAYS)
    return python, graph if step.captured else None, step.note


def _prefill(model: Any, tokens: int, context: int, name: str) -> dict[str, Any]:
    """Into the cache that `generate` has, if this is it, otherwise into Transformers' own."""
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, tokens), device=model.device)

    def prefill() -> object:
        cache = {"past_key_values": static_cache(model, tokens)} if name == "generate" else {}
        return model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache)

    return {"python": _median(prefill, _PREFILLS), "note": ""}


def _times(key: str) -> Callable[..., dict[str, Any]]:
    return _decode if key == "decode" else _prefill


def _head(model: Any, rows: int) -> float:
    head = model.get_output_embeddings()
    x = torch.randn(rows, head.weight.shape[1], dtype=head.weight.dtype, device=head.weight.device)
    return _median(lambda: head(x), _STEPS)


def _median(call: Callable[[], object], rounds: int) -> float:
    """Seconds of a call until its result is there, the median, after two to warm up."""
    for _ in range(_WARM):
        call()
    times = []
    for _ in range(rounds):
        _wait()
        start = time.perf_counter()
        call()
        _wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def without(model: nn.Module, part: str) -> Iterator[None]:
    """Inside, the model's MoE blocks, or its attention, hand their input through."""
    if part == "moe":
        blocks = [(site.block, site.family.returns) for site in sites(model) if site.family is not None]
    else:
        blocks = [(m, ("hidden", None)) for m in model.modules() if type(m).__name__.endswith("Attention")]
    before = [(module, module.__dict__.get("forward")) for module, _ in blocks]

    def through(returns: tuple[Any, ...]) -> Callable[..., Any]:
        def forward(*args: Tensor, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return hidden if returns == ("hidden",) else tuple(hidden if place == "hidden" else None for place in returns)

        return forward

    try:
        for module, returns in blocks:
            module.forward = through(returns)
        yield
    finally:
        for module, forward in before:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def floor(model: Any, size: int, what: str, peaks: Peaks, context: int) -> float:
    """Seconds below which no implementation can be: max(bytes / bandwidth, operations / rate).

    Bytes: each weight that is at work, once, of the experts those that uniform routing is expected to hit, and keys and values.
    Operations: two for each weight at work on a token, and the products of causal attention.
    """
    rows, tokens = (size, size) if what == "decode" else (1, size)
    specs = [spec_of(site)[2] for site in sites(model) if site.family is not None]

    def weights(of: Callable[[MoESpec], float]) -> float:
        """Numbers in so many experts of every block."""
        return sum((2 + s.experts.gated) * of(s) * _width(s) * s.hidden_size for s in specs)

    experts = weights(lambda s: s.num_experts)
    hit = weights(lambda s: s.num_experts * (1 - (1 - s.top_k / s.num_experts) ** tokens))
    at_work = weights(lambda s: s.top_k)
    head = model.get_output_embeddings().weight
    table = model.get_input_embeddings().weight
    dense = sum(p.numel() for p in model.parameters()) - experts - (0 if table is head else table.numel())
    text = model.config.get_text_config()
    width = text.num_key_value_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    heads = text.num_attention_heads / text.num_key_value_heads * width
    seen = context * rows if what == "decode" else tokens * tokens / 2
    cached = 2 * text.num_hidden_layers * width * (context * rows if what == "decode" else tokens)
    flops = 2 * tokens * (dense - head.numel() + at_work) + 2 * rows * head.numel() + 4 * text.num_hidden_layers * heads * seen
    itemsize = head.dtype.itemsize
    return max((dense + hit + cached) * itemsize / peaks.bytes_per_second, flops / peaks.flops)


def _width(spec: MoESpec) -> float:
    """The mean intermediate size of an expert."""
    size = spec.experts.intermediate_size
    return statistics.mean(size) if isinstance(size, tuple) else size


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What was found, a flat row for each step and implementation: seconds, and those of each part."""
    return [
        {"step": step, **{name: value for name, value in row.items() if name != "share"}, **row.get("share", {})}
        for step in ("decode", "prefill")
        for row in found[step]
    ]


def draw(found: dict[str, Any], suffix: str = ".png") -> bytes:
    """The picture, as the bytes of a file of this kind: bars of the shares of every row, with the floor as a line across."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(14, 6), layout="constrained")
    parts = ("moe", "attention", "head", "rest", "launch")
    for panel, key, size in ((panels[0], "decode", "batch"), (panels[1], "prefill", "tokens")):
        rows = [row for row in found[key] if row.get("python") is not None]
        places = range(len(rows))
        bottom = [0.0] * len(rows)
        for part in parts:
            heights = [max(0.0, row.get("share", {}).get(part, 0.0)) * 1e3 for row in rows]
            panel.bar(places, heights, bottom=bottom, label=part)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        panel.hlines(
            [row["floor"] * 1e3 for row in rows],
            [i - 0.45 for i in places],
            [i + 0.45 for i in places],
            colors="black",
            label="floor",
        )
        names = [f"{row['implementation']}, {row[size]:,}" for row in rows]
        panel.set_xticks(places, names, rotation=40, ha="right", rotation_mode="anchor")
        panel.set(title=key, ylabel="ms", xlabel=f"implementation, {size}")
    figure.suptitle(f"{found['model']}, {found['layers']} layers, {found['dtype']}, {found['device']}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(parts) + 1, frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format=suffix.lstrip("."))
    pyplot.close(figure)
    return out.getvalue()
