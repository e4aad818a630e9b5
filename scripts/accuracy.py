"""Perplexity and greedy tokens of 17 families, moerunner against Transformers, with a reason for every disagreement.

    python scripts/accuracy.py --device cuda

measures each family (or those of --families), keeps the numbers in docs/results/accuracy.json beside what is there of the
others, and writes docs/accuracy.md from that file. What is measured and judged, and why, stands in the page. Exits 1 if a
family that was measured has a problem.

Shape suffixes: B sequences, S positions, V vocabulary, T tokens (B * S), E experts, K chosen.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import importlib
import json
import math
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accuracy_page import write_page
from accuracy_sizes import FAMILIES, sizes
from torch import Tensor, nn

import moerunner
from moerunner.models.adapt import patch, unpatch
from moerunner.models.block import PatchedForward, forward_of
from moerunner.models.checkpoint import read_tokenizer
from moerunner.ops.reference import Choice, reference_route
from moerunner.values import TopK
from moerunner.verify import LOGITS_BOUND, damaged_weights
from moerunner.verify.tiny import tiny_config

ROOT = Path(__file__).parents[1]
MODULES = ("argparse", "dataclasses", "heapq", "inspect", "pathlib", "statistics", "tarfile", "textwrap")  # one sequence each
LEAST = 100_000_000  # parameters
FACTOR = 1.25  # of the distance between Transformers' own implementations
JUMP = 1e-3  # in a routing weight: more than arithmetic can do, so that a discrete choice inside the rule went the other way
SHOWN = 12  # disagreements that are listed one by one


@dataclass(frozen=True)
class Settings:
    device: str = "cpu"
    seed: int = 0
    length: int = 512
    prompt: int = 64
    new_tokens: int = 64


@dataclass
class Layer:
    """What one MoE layer was given and chose, in all calls of a run: [B, S, ...] once `joined`."""

    x: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)  # of a router outside the block, which the spec does not describe
    answer: Any = None  # of the last call

    def joined(self, sequences: int) -> Layer:
        def join(pieces: list[Tensor]) -> list[Tensor]:
            return [torch.cat([p.reshape(sequences, -1, p.shape[-1]) for p in pieces], 1)] if pieces else []

        return Layer(join(self.x), join(self.ids), join(self.weights), join(self.keys), self.answer)


@dataclass
class Run:
    """Logits [B, S', V] of the last S' positions, and the routing of all S, by the block's name."""

    logits: Tensor
    layers: dict[str, Layer]


# ---- models and text


def build(family: str, changes: dict[str, Any], seed: int) -> Any:
    """A float32 model whose weights are those of its bf16 twin: random, each matrix scaled by what it sums over."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    config: Any = tiny_config(family, **changes)
    auto: Any = AutoModelForCausalLM
    if family == "ernie4_5_vl_moe":  # has no head for text alone
        vision = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64}
        kind: Any = CONFIG_MAPPING[family]
        config = kind(text_config=config.to_dict(), vision_config=vision)
        auto = AutoModelForImageTextToText
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        if tensor.ndim > 1:
            tensor.data.normal_(generator=draw).div_(tensor.shape[-1] ** 0.5)
        elif "bias" in name:
            tensor.data.normal_(std=0.1, generator=draw)
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):  # correction biases
            buffer.normal_(std=0.1, generator=draw)
    for tensor in model.parameters():
        tensor.data = tensor.data.bfloat16().float()
    model.generation_config.eos_token_id = None
    return model


def text(length: int) -> Tensor:
    """[B, S] tokens: the beginnings of some modules of Python's standard library."""
    tokenizer = read_tokenizer(Path(moerunner.__file__).parent / "assets" / "demo")
    sources = [Path(str(importlib.import_module(name).__file__)).read_text() for name in MODULES]
    cut = {"truncation": True, "max_length": length, "return_tensors": "pt"}
    rows = [tokenizer(source, **cut)["input_ids"][0] for source in sources]
    assert {len(row) for row in rows} == {length}, "a module is shorter than a sequence"
    return torch.stack(rows)


# ---- what runs, and what is seen of it


def router_of(model: nn.Module, name: str, forward: PatchedForward) -> nn.Module:
    """The module that answers with weights and ids of text tokens; Gemma's stands beside the block."""
    family = forward.source.family
    if family.router is not None:
        return model.get_submodule(f"{name}.{family.router.path}")
    if family.spec is not None and forward.runner.spec.routing.score == "external":
        return model.get_submodule(f"{name.rpartition('.')[0]}.router")
    return model.get_submodule(f"{name}.text_moe.gate")


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextmanager
def seen_in_transformers(model: Any, forwards: dict[str, PatchedForward]) -> Iterator[dict[str, Layer]]:
    layers = {name: Layer() for name in forwards}
    handles = []
    for name, forward in forwards.items():
        layer, external = layers[name], forward.runner.spec.routing.score == "external"

        def before(_: Any, args: Any, kwargs: Any, layer: Layer = layer) -> None:
            layer.x.append((*args, *kwargs.values())[0].clone())

        def routed(_: Any, __: Any, answer: Any, layer: Layer = layer, forward: Any = forward, keep: bool = external) -> None:
            layer.answer = each(answer, Tensor.clone)
            known = forward.source.family.router is not None
            topk = forward.chosen_by(answer) if known else TopK(answer[2], answer[1].float())
            note(layer, topk, forward)
            if keep:
                layer.keys.append(answer[0].clone())

        handles.append(model.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True))
        handles.append(router_of(model, name, forward).register_forward_hook(routed))
    with hooks(*handles):
        yield layers


@contextmanager
def seen_in_moerunner(model: Any, forwards: dict[str, PatchedForward]) -> Iterator[dict[str, Layer]]:
    """By hooks on the runners, since one on a router would have the runner take the router's choice."""
    layers = {name: Layer() for name in forwards}
    handles = []
    for name, forward in forwards.items():
        layer = layers[name]

        def before(runner: Any, args: Any, kwargs: Any, layer: Layer = layer, forward: Any = forward) -> None:
            layer.x.append(args[0].clone())
            note(layer, runner.route(args[0], **kwargs), forward)

        handles.append(forward.runner.register_forward_pre_hook(before, with_kwargs=True))
        if forward.runner.spec.routing.score == "external":

            def routed(_: Any, __: Any, answer: Any, keys: list[Tensor] = layer.keys) -> None:
                keys.append(answer[0].clone())

            handles.append(router_of(model, name, forward).register_forward_hook(routed))
    with hooks(*handles):
        yield layers


def each(answer: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The tensors of a router's answer, changed; it is a tensor or a tuple."""
    if isinstance(answer, tuple):
        return tuple(each(a, change) for a in answer)
    return change(answer) if isinstance(answer, Tensor) else answer


def note(layer: Layer, topk: TopK, forward: PatchedForward) -> None:
    """Weights without the routed scaling factor, in ascending order of the ids."""
    ids, order = topk.ids.long().sort(-1)
    factor = forward.runner.spec.routed_scaling_factor if topk.scaled else 1.0
    layer.ids.append(ids)
    layer.weights.append(topk.weights.float().gather(-1, order) / factor)


@contextmanager
def replayed(model: Any, forwards: dict[str, PatchedForward], layers: dict[str, Layer], *, ours: bool) -> Iterator[None]:
    """Every router gives the answer of another run. A patched block obeys such hooks, if it has one router to hook."""
    handles = []
    for name, forward in forwards.items():
        answer = layers[name].answer
        if ours and forward.source.family.router is None and not layers[name].keys:
            topk = TopK(answer[2].long(), answer[1].float())
            handles.append(
                forward.runner.register_forward_pre_hook(lambda _, x, __, topk=topk: (x, {"topk": topk}), with_kwargs=True)
            )
        else:
            dtype = next(model.parameters()).dtype
            cast = each(
                answer, lambda t, dtype=dtype: t.to(torch.promote_types(t.dtype, dtype)) if t.is_floating_point() else t
            )
            handles.append(router_of(model, name, forward).register_forward_hook(lambda *_, cast=cast: cast))
    with hooks(*handles):
        yield


def use(model: Any, experts: str) -> None:
    """Which of Transformers' own implementations runs the experts; Llama 4 has one alone."""
    with suppress(ValueError):
        model.set_experts_implementation(experts)


def run(model: Any, ids: Tensor, layers: dict[str, Layer]) -> Run:
    logits = model(input_ids=ids, use_cache=False).logits.float()
    return Run(logits, {name: layer.joined(len(ids)) for name, layer in layers.items()})


def generate(model: Any, ids: Tensor, new: int, layers: dict[str, Layer]) -> tuple[Run, Tensor]:
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return Run(torch.stack(out.logits, 1).float(), {n: x.joined(len(ids)) for n, x in layers.items()}), out.sequences


# ---- float32: every disagreement explained


@dataclass(frozen=True)
class Keys:
    """The numbers that a layer's choice is made from, in two runs, [T, E] float64, and how exact they are.

    rounding: of the product that makes them, in float32: measured, not assumed.
    """

    theirs: Tensor
    ours: Tensor
    rounding: float
    forward: PatchedForward

    @classmethod
    def of(cls, theirs: Layer, ours: Layer, forward: PatchedForward) -> Keys:
        if theirs.keys:
            flat = [layer.keys[0].flatten(0, 1).double() for layer in (theirs, ours)]
            return cls(*flat, rounding=torch.finfo(torch.float32).eps, forward=forward)
        tensors = forward.source().tensors
        gate, bias = tensors["gate"], tensors.get("gate_bias")
        x = theirs.x[0].flatten(0, 1)
        exact = [F.linear(layer.x[0].flatten(0, 1).double(), gate.double(), _double(bias)) for layer in (theirs, ours)]
        once = F.linear(x.float(), gate.float(), bias)
        return cls(*exact, rounding=float((once - exact[0]).abs().max()), forward=forward)

    @property
    def error_T(self) -> Tensor:
        """How far an expert's key can be from the other run's, at each token."""
        return (self.theirs - self.ours).abs().amax(-1) + 2 * self.rounding

    def choice(self, keys: Tensor) -> Choice:
        """What the oracle chooses from one token's keys."""
        runner = self.forward.runner
        if runner.spec.routing.score == "external":
            best = keys.sort(descending=True)
            k = runner.spec.top_k
            return Choice(best.indices[:k].tolist(), [], [], float(best.values[k - 1] - best.values[k]))
        x = torch.zeros(1, runner.spec.hidden_size)
        return reference_route(runner.spec, runner.layer_weights(), x, router_logits=keys[None])[0]

    def explain(self, token: int, same_experts: bool) -> dict[str, Any]:
        """The margin in the key that chooses, the error of the logits, and whether an error of that size turns the choice."""
        error = float(self.error_T[token])
        theirs = self.choice(self.theirs[token])
        if same_experts:  # a threshold inside the rule: then its own weights jump when one logit moves by the error
            weights = dict(zip(theirs.ids, theirs.weights, strict=True))
            steps = [error * part / 8 for part in range(-8, 9)]  # between: a long step can jump there and back
            moved = [self.choice(self._moved(token, e, step)) for e in theirs.ids for step in steps]
            jumps = [abs(w - weights.get(e, 0.0)) for m in moved for e, w in zip(m.ids, m.weights, strict=True)]
            return {"margin": None, "error": error, "explained": max(jumps) > JUMP}
        shaken = self.theirs[token] + error
        shaken[theirs.ids] -= 2 * error
        turned = set(self.choice(shaken).ids) != set(theirs.ids)
        return {"margin": theirs.margin, "error": error, "explained": turned}

    def _moved(self, token: int, expert: int, step: float) -> Tensor:
        """One expert's key a step up, all others a step down."""
        keys = self.theirs[token] - step
        keys[expert] += 2 * step
        return keys


def _double(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.double()


def judge(theirs: Run, ours: Run, forwards: dict[str, PatchedForward], valid_BS: Tensor) -> dict[str, Any]:
    """Every routing and every most likely token that differs, with its margin and the error measured there.

    A position is touched once a routing at it or before it went the other way: from there on the two runs compute different
    things, and only what is not touched shows the arithmetic's own error. valid_BS: which positions are compared.
    """
    touched_BS = torch.zeros_like(valid_BS)
    flips: list[dict[str, Any]] = []
    routings, first, later, unexplained, router_error = 0, 0, 0, 0, 0.0
    for name, forward in forwards.items():
        a, b = theirs.layers[name], ours.layers[name]
        keys = Keys.of(a, b, forward)
        other_BS = (a.ids[0] != b.ids[0]).any(-1)
        jump_BS = torch.zeros_like(other_BS)
        if not a.keys:  # where there are keys, Transformers' own router makes the weights on both sides
            smooth_BS = JUMP + 4 * keys.error_T.view_as(other_BS)  # a weight follows the logits by less
            moved_BS = (a.weights[0] - b.weights[0]).abs().amax(-1) / a.weights[0].amax(-1)
            jump_BS = ~other_BS & (moved_BS > smooth_BS)
        differ_BS = (other_BS | jump_BS) & valid_BS
        clean_BS = valid_BS & ~touched_BS
        if clean_BS.any():
            scale = float(keys.theirs.abs().max())
            router_error = max(router_error, float(keys.error_T.view_as(clean_BS)[clean_BS].max()) / scale)
        routings += int(valid_BS.sum())
        for s, p in differ_BS.nonzero().tolist():
            found = keys.explain(s * valid_BS.shape[1] + p, same_experts=not bool(other_BS[s, p]))
            is_first = not bool(touched_BS[s, p])
            first, later = first + is_first, later + (not is_first)
            unexplained += not found["explained"]
            flips.append({"layer": name, "sequence": s, "position": p, "first": is_first, **found})
        touched_BS = touched_BS | (differ_BS.cumsum(1) > 0)
    last = theirs.logits.shape[1]
    touched_BS, valid_BS = touched_BS[:, -last:], valid_BS[:, -last:]
    gap_BS = (theirs.logits - ours.logits).double().abs().amax(-1)
    gap_BS = torch.where(gap_BS.isnan(), math.inf, gap_BS)
    size = float(theirs.logits.abs().max())
    top_BS2 = theirs.logits.double().topk(2, dim=-1).values
    margin_BS = top_BS2[..., 0] - top_BS2[..., 1]
    greedy_BS = (theirs.logits.argmax(-1) != ours.logits.argmax(-1)) & valid_BS
    tokens = [
        {
            "sequence": s,
            "position": p,
            "margin": float(margin_BS[s, p]),
            "error": float(gap_BS[s, p]),
            "explained": float(margin_BS[s, p]) <= 2 * float(gap_BS[s, p]),
        }
        for s, p in greedy_BS.nonzero().tolist()
    ]
    flips.sort(key=lambda f: (f["explained"], not f["first"]))
    tokens.sort(key=lambda t: t["explained"])
    return {
        "positions": int(valid_BS.sum()),
        "logits_error": float(gap_BS[valid_BS].max()) / size,
        "untouched_positions": int((valid_BS & ~touched_BS).sum()),
        "untouched_logits_error": _max(gap_BS[valid_BS & ~touched_BS]) / size,
        "untouched_router_error": router_error,
        "routings": routings,
        "routings_differ_first": first,
        "routings_differ_later": later,
        "routings_unexplained": unexplained,
        "routings_listed": flips[:SHOWN],
        "greedy_differ": len(tokens),
        "greedy_unexplained": sum(not t["explained"] for t in tokens),
        "greedy_listed": tokens[:SHOWN],
    }


def _max(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def float32(model: Any, forwards: dict[str, PatchedForward], ids: Tensor) -> tuple[dict[str, Any], list[str]]:
    """Transformers' eager experts against moerunner, each routing for itself.

    Beside it: against its grouped_mm, and against the same model in float64 with the same experts, the yardstick.
    """
    runs: dict[str, Run] = {}
    for name in ("grouped_mm", "eager"):
        use(model, name)
        with seen_in_transformers(model, forwards) as layers:
            runs[name] = run(model, ids, layers)
    runs["float64"] = in_float64(model, ids, layers)
    with patched(model, forwards), seen_in_moerunner(model, forwards) as layers:
        runs["moerunner"] = run(model, ids, layers)
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    found = judge(runs["eager"], runs["moerunner"], forwards, everywhere)
    others = {name: judge(runs["eager"], runs[name], forwards, everywhere) for name in ("grouped_mm", "float64")}
    losses = {name: losses_of(r.logits, ids) for name, r in runs.items()}
    perplexity = {name: math.exp(float(loss.mean())) for name, loss in losses.items()}
    found["perplexity"] = perplexity
    found["perplexity_difference"] = perplexity["moerunner"] / perplexity["eager"] - 1
    found["load"] = load_of(runs["eager"], forwards)
    for name, other in others.items():
        found[name] = {k: v for k, v in other.items() if not k.endswith("_listed")}
    problems = unexplained(found, found["float64"])
    if not all(bool(torch.isfinite(r.logits).all()) for r in runs.values()):
        problems.append("logits are not finite")
    return found, problems


def in_float64(model: Any, ids: Tensor, layers: dict[str, Layer]) -> Run:
    """What the model would compute without rounding, but for the norms and the like that Transformers casts to float32."""
    exact = copy.deepcopy(model).double()
    forwards = forwards_of(exact)
    with seen_in_transformers(exact, forwards) as seen, replayed(exact, forwards, layers, ours=False):  # sees its own answers
        return run(exact, ids, seen)


def unexplained(found: dict[str, Any], yardstick: dict[str, Any]) -> list[str]:
    problems = []
    for what in ("logits", "router"):
        key = f"untouched_{what}_error"
        found[f"{key}_allowed"] = allowed = max(LOGITS_BOUND, 2 * yardstick[key])
        if not found[key] <= allowed:
            problems.append(f"{what}: {found[key]:.1e} from Transformers where no routing differs, allowed {allowed:.1e}")
    if found["routings_unexplained"]:
        problems.append(f"{found['routings_unexplained']} routings differ by more than the measured error")
    if found["greedy_unexplained"]:
        problems.append(f"{found['greedy_unexplained']} greedy tokens differ by more than the measured error")
    return problems


def generation(
    model: Any, forwards: dict[str, PatchedForward], ids: Tensor, settings: Settings, yardstick: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Greedy tokens with the cache, compared up to where a sequence first differs: after that the texts are others."""
    prompt = ids[:, : settings.prompt]
    use(model, "eager")
    with seen_in_transformers(model, forwards) as layers:
        theirs, wanted = generate(model, prompt, settings.new_tokens, layers)
    with patched(model, forwards), seen_in_moerunner(model, forwards) as layers:
        ours, got = generate(model, prompt, settings.new_tokens, layers)
    other = wanted != got
    before = (other.cumsum(1) == 0)[:, :-1]  # positions whose text so far is the same; the last of them may choose otherwise
    found = judge(theirs, ours, forwards, before)
    found["sequences"], found["identical"] = len(ids), int((~other.any(1)).sum())
    found["first_difference"] = [int(row.nonzero()[0]) - prompt.shape[1] if row.any() else None for row in other]
    return found, [f"generation: {problem}" for problem in unexplained(found, yardstick)]


@contextmanager
def patched(model: Any, forwards: dict[str, PatchedForward]) -> Iterator[None]:
    """The same runners as those whose specs the measurement reads."""
    for name, forward in forwards.items():
        model.get_submodule(name).forward = forward
    ran: set[str] = set()
    with hooks(*(f.runner.register_forward_hook(lambda *_, name=n: ran.add(name)) for n, f in forwards.items())):
        try:
            yield
        finally:
            unpatch(model)
    assert ran == set(forwards), f"ran Transformers' own code: {set(forwards) - ran}"


def forwards_of(model: Any) -> dict[str, PatchedForward]:
    report = patch(model)
    assert not report.skipped, report
    found = {name: forward for name, module in model.named_modules() if (forward := forward_of(module)) is not None}
    unpatch(model)
    return found


def load_of(eager: Run, forwards: dict[str, PatchedForward]) -> dict[str, float]:
    """Whether the routers spread: the least number of experts in use in a layer, and the largest share of one expert."""
    used, busiest = math.inf, 0.0
    for name, forward in forwards.items():
        spec = forward.runner.spec
        total = spec.num_experts // spec.routing.modalities
        counts = eager.layers[name].ids[0].flatten().bincount(minlength=total).double()
        used = min(used, float((counts > 0).sum()) / total)
        busiest = max(busiest, float(counts.max() / counts.sum()) * total)
    return {"least_used_share": used, "busiest_over_mean": busiest}


# ---- bf16, with the experts of one run in all


def losses_of(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    """[B * (S - 1)] of each next token, float64."""
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).double(), ids_BS[:, 1:].flatten(), reduction="none")


def distance(a: Tensor, b: Tensor, ids: Tensor) -> dict[str, float]:
    """How far apart two runs' predictions are."""
    change = losses_of(a, ids) - losses_of(b, ids)
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return {
        "log_perplexity": abs(float(change.mean())),
        "log_perplexity_noise": 2 * float(change.std()) / len(change) ** 0.5,
        "token_loss": float(change.abs().mean()),
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "greedy_differ": int((a.argmax(-1) != b.argmax(-1)).sum()),
    }


def bfloat16(model: Any, ids: Tensor) -> tuple[dict[str, Any], list[str]]:
    """model: in float32, with weights that bf16 holds exactly. It stays as it is."""
    half = copy.deepcopy(model)
    for parameter in half.parameters():
        parameter.data = parameter.data.bfloat16()
    forwards = forwards_of(half)
    use(half, "eager")
    with seen_in_transformers(half, forwards) as layers:
        logits = {"eager": run(half, ids, layers).logits}
    use(half, "grouped_mm")
    with replayed(half, forwards, layers, ours=False):
        logits["grouped_mm"] = run(half, ids, {}).logits
    with patched(half, forwards), replayed(half, forwards, layers, ours=True), seen_in_moerunner(half, forwards) as own:
        logits["moerunner"] = run(half, ids, {}).logits
    use(model, "eager")
    with replayed(model, forwards_of(model), layers, ours=False):
        logits["float32"] = run(model, ids, {}).logits
    found: dict[str, Any] = {
        "perplexity": {name: math.exp(float(losses_of(each, ids).mean())) for name, each in logits.items()},
        "moerunner_to_eager": distance(logits["eager"], logits["moerunner"], ids),
        "grouped_mm_to_eager": distance(logits["eager"], logits["grouped_mm"], ids),
        "eager_to_float32": distance(logits["float32"], logits["eager"], ids),
        "grouped_mm_to_float32": distance(logits["float32"], logits["grouped_mm"], ids),
        "moerunner_to_float32": distance(logits["float32"], logits["moerunner"], ids),
    }
    found["has_grouped_mm"] = not torch.equal(logits["eager"], logits["grouped_mm"])
    exact = ratios(found["moerunner_to_float32"], found["eager_to_float32"])
    found["judged"] = exact
    if found["has_grouped_mm"]:
        found["judged"] = ratios(found["moerunner_to_eager"], found["grouped_mm_to_eager"])
    far = [n for n, r in found["judged"].items() if not r <= FACTOR]
    found["excused"] = [n for n in far if found["has_grouped_mm"] and exact[n] <= 1]
    problems = [f"bf16: {n} is {found['judged'][n]:.2f} times the yardstick's" for n in far if n not in found["excused"]]
    untaken = [n for n in forwards if not torch.equal(own[n].ids[0].flatten(), layers[n].ids[0].flatten())]
    return found, problems + [f"bf16: {name} did not take the replayed routing" for name in untaken]


def ratios(ours: dict[str, float], yardstick: dict[str, float]) -> dict[str, float]:
    """Each distance over that of the yardstick. Perplexities can agree by luck: a difference within its noise is none."""
    floor = {"log_perplexity": ours["log_perplexity_noise"], "token_loss": 0.0, "kl": 0.0}
    return {name: ours[name] / max(yardstick[name], least) for name, least in floor.items()}


# ---- one family, and all


def measure(family: str, changes: dict[str, Any], settings: Settings, least: int = LEAST) -> dict[str, Any]:
    start = time.perf_counter()
    torch.backends.cudnn.allow_tf32 = False
    model = build(family, changes, settings.seed).to(settings.device)
    ids = text(settings.length).to(settings.device)
    inner = model.config.get_text_config()
    parameters = sum(p.numel() for name, p in model.named_parameters() if "visual" not in name and "vision_tower" not in name)
    problems = [f"{d} (weights)" for d in damaged_weights(model)]
    if parameters < least:
        problems.append(f"has {parameters:,} parameters, {least:,} are asked for")
    with torch.no_grad():
        forwards = forwards_of(model)
        spec = next(iter(forwards.values())).runner.spec
        full, wrong = float32(model, forwards, ids)
        decoded, wrong_decoded = generation(model, forwards, ids, settings, full["float64"])
        half, wrong_half = bfloat16(model, ids)
    problems += wrong + wrong_decoded + wrong_half
    return {
        "ok": not problems,
        "problems": problems,
        "environment": environment(settings),
        "model": {
            "parameters": parameters,
            "layers": inner.num_hidden_layers,
            "moe_layers": len(forwards),
            "hidden_size": inner.hidden_size,
            "experts": spec.num_experts // spec.routing.modalities,
            "top_k": spec.top_k,
            "backend": next(iter(forwards.values())).runner.plan.backend,
        },
        "tokens": ids.numel(),
        "settings": {
            "sequences": len(ids),
            "prompt": settings.prompt,
            "new_tokens": settings.new_tokens,
            "factor": FACTOR,
        },
        "float32": full,
        "generation": decoded,
        "bfloat16": half,
        "seconds": round(time.perf_counter() - start, 1),
    }


def environment(settings: Settings) -> dict[str, Any]:
    import transformers

    gpu = settings.device.startswith("cuda")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if gpu else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "seed": settings.seed,
    }


def attempt(family: str, settings: Settings) -> dict[str, Any]:
    """A family that breaks down must not take the others' numbers with it."""
    torch.set_num_threads(1)
    try:
        return measure(family, sizes(family), settings)
    except Exception as error:  # noqa: BLE001 - the report names it
        raised = f"{type(error).__name__}: {str(error)[:400]}"
        return {"ok": False, "problems": [raised], "environment": environment(settings)}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES, metavar="FAMILY")
    parser.add_argument("--workers", type=int, help="families that are measured side by side: 8 on a GPU, otherwise 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "accuracy.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "accuracy.md")
    args = parser.parse_args(argv)
    settings = Settings(device=args.device, seed=args.seed)
    record = json.loads(args.out.read_text()) if args.out.exists() else {"families": {}}
    context = multiprocessing.get_context("spawn")
    workers = args.workers or (8 if args.device.startswith("cuda") else 1)
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        pending = {pool.submit(attempt, family, settings): family for family in args.families}
        for done in concurrent.futures.as_completed(pending):
            family, found = pending[done], done.result()
            record["families"][family] = found
            print(f"{family}: {'ok' if found['ok'] else found['problems']} ({found.get('seconds')} s)", flush=True)
    record["families"] = {f: record["families"][f] for f in FAMILIES if f in record["families"]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    write_page(record, args.page)
    return int(not all(record["families"][f]["ok"] for f in args.families))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
