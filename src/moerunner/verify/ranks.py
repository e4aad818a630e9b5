"""Proves that a model over several ranks computes what Transformers computes in one process.

Rank 0 first has the whole model, runs it as Transformers wrote it, and keeps the logits and every MoE block's call. Then each
rank loads its part, and all run the model, and each block on the input that it had in Transformers. What a rank gives is
compared on that rank. The oracle is left to the verification in one process.
"""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moerunner import models
from moerunner.errors import SpecError, UnsupportedError
from moerunner.models import adapt
from moerunner.models.checkpoint import read_tokenizer
from moerunner.parallel.group import TorchComm
from moerunner.parallel.layout import BoundLayout
from moerunner.verify import LOGITS_BOUND, damaged_weights
from moerunner.verify.capture import Call, moved, recorded
from moerunner.verify.digests import compare_digests
from moerunner.verify.layer import BLOCK_BOUND, Comparison, oracle_bound
from moerunner.verify.loading import compare_loading
from moerunner.verify.report import Difference, Verdict, difference
from moerunner.verify.running import run, sample_of
from moerunner.verify.tiny import tiny_model


@dataclass(frozen=True)
class BlockCheck:
    """One MoE block over the ranks, on the input that it had in Transformers.

    vs_transformers: of the rank where it is largest, on the tokens where both choose the same experts. collectives: what one
    forward issued. tied: as in `LayerCheck`.
    """

    name: str
    family: str
    backend: str
    vs_transformers: Difference
    tied: int
    collectives: list[str]
    problems: list[str]


@dataclass(frozen=True, kw_only=True)
class RanksReport(Verdict):
    """The verdict over all ranks, the same on each. layers: a `BlockCheck` each.

    layout: ranks on each axis. all_reduces: of one forward of the whole model.
    """

    layout: dict[str, int]
    all_reduces: int = 0

    def __str__(self) -> str:
        sizes = " x ".join(f"{axis} {size}" for axis, size in self.layout.items())
        head = f"{'ok' if self.ok else 'MISMATCH'}: {len(self.layers)} MoE layers over {sizes}, {self.tokens} tokens"
        lines = [f"{head}, {self.dtype} on {self.device}"]
        if self.logits is not None:
            worst = max((layer.vs_transformers.max for layer in self.layers), default=0.0)
            judged = f"judged: the first {self.judged_tokens} tokens" if self.judged_tokens else "not judged in low precision"
            lines.append(f"  blocks: at most {worst:.1e} from Transformers in one process")
            same = f"same top token {self.same_top_token}/{self.tokens}"
            lines.append(f"  logits: {self.logits.max:.1e} from it, RMS {self.logits.rms:.1e}, {same} ({judged})")
            lines.append(f"  {self.all_reduces} all_reduce for {len(self.layers)} MoE layers in a forward")
        return "\n".join(lines + [f"  {reason}" for reason in self.reasons()])


def verify_ranks(
    path: str | Path | None,
    bound: BoundLayout,
    *,
    family: str | None = None,
    text: str | None = None,
    num_tokens: int = 128,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    attention: str = "replicate",
) -> RanksReport:
    """`verify` of a folder, or of a tiny model of a family, over the ranks of a layout, all of which call it alike.

    Rank 0 has the whole model in memory for a while, on its device. Copies of the model (dp) run the same tokens.
    attention: as for `load`, of a folder.

    Raises:
        UnsupportedError: no block of the model can be spread over these ranks.
        SpecError: neither a folder nor a family is given, or both are.
    """
    start = time.perf_counter()
    if (path is None) == (family is None):
        raise SpecError("needs a model or a family, and not both", where="verify")

    def whole(layout: BoundLayout | None) -> Any:
        if path is not None:
            how = attention if layout is not None else "replicate"
            return models.load(path, dtype=dtype, device=device, layout=layout, attention=how)
        model = tiny_model(family or "", seed=seed, dtype=dtype or torch.float32).to(device or "cpu")
        model.moerunner_report = models.patch(model, layout)
        return model

    comm, calls, facts = bound.comm, {}, None
    assert isinstance(comm, TorchComm)
    if comm.rank == 0:
        reference = whole(None)
        facts, calls = _in_one_process(reference, path, text, num_tokens, dtype, seed)
        del reference
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    told, expected, ids, names = comm.object_of_rank_0(facts)
    told |= {"model": family or str(path), "layout": {axis: getattr(bound.layout, axis) for axis in ("dp", "ep", "tp")}}
    if told["damaged"]:
        return RanksReport(**told, seconds=time.perf_counter() - start)
    net = whole(bound)
    replaced = {r.name: r for r in net.moerunner_report.replaced}
    skipped = [f"{s.name}: {s.reason}" for s in net.moerunner_report.skipped]
    if not replaced:
        raise UnsupportedError("; ".join(skipped) or "has no MoE block that moerunner knows", where=told["model"])
    weight = net.get_input_embeddings().weight
    with torch.no_grad():
        issued, logits = _counted(net, list(replaced), bound, ids.to(weight.device))
        found, first_tie = {}, ids.shape[1]
        for name in names:
            call = moved(comm.object_of_rank_0(calls.get(name)), weight.device)
            if name in replaced:
                one = Comparison(name, net.get_submodule(name), call, weight.dtype)
                gap, tied, misrouted, tie = one.without_oracle()
                found[name] = (gap, tied, misrouted, issued.get(name, []), one.own[1])
                first_tie = min(first_tie, tie)
    judged = first_tie if weight.dtype == torch.float32 else 0
    own = {
        "blocks": found,
        "logits": difference(logits, expected),
        "judged": difference(logits[:, :judged], expected[:, :judged]).max,
        "same": int((logits.argmax(-1).cpu() == expected.argmax(-1)).sum()),
    }
    every = comm.objects(own)
    problems = [
        f"logits: {of['judged']:.1e} from Transformers on rank {rank}, allowed {LOGITS_BOUND:.0e}"
        for rank, of in enumerate(every)
        if not (math.isfinite(of["logits"].max) and of["judged"] <= LOGITS_BOUND)
    ]
    wanted = ["all_reduce"] if bound.layout.split_axes else []
    layers = [_block(replaced[name], [of["blocks"][name] for of in every], weight.dtype, wanted) for name in found]
    return RanksReport(
        **told,
        layers=layers,
        logits=max((of["logits"] for of in every), key=lambda gap: gap.max),
        judged_tokens=judged,
        same_top_token=min(of["same"] for of in every),
        all_reduces=sum(names.count("all_reduce") for names in issued.values()),
        skipped=skipped + [f"{name}: not reached by these tokens" for name in replaced if name not in found],
        problems=problems,
        seconds=time.perf_counter() - start,
    )


def _in_one_process(
    model: Any, path: str | Path | None, text: str | None, num_tokens: int, dtype: torch.dtype | None, seed: int
) -> tuple[tuple[Any, ...], dict[str, Call]]:
    """What the ranks are told, and the call of each block, both in host memory."""
    weight = model.get_input_embeddings().weight
    ids, sample = sample_of(model, None if path is None else read_tokenizer(path), text, num_tokens, seed)
    changed, unsure = compare_digests(path) if path is not None else ([], [])
    facts: dict[str, Any] = {"dtype": str(weight.dtype).removeprefix("torch."), "device": weight.device.type}
    facts |= {"sample": sample, "tokens": ids.shape[1], "damaged": changed + damaged_weights(model)}
    if facts["damaged"]:
        return (facts, None, ids, []), {}
    loading, notes = compare_loading(model, path, dtype) if path is not None else ([], [])
    routers = adapt.routers(model)
    adapt.unpatch(model)
    with torch.no_grad(), recorded(model, routers) as calls:
        logits = run(model, ids.to(weight.device)).cpu()
    facts |= {"loading": loading, "notes": notes + unsure}
    return (facts, logits, ids, list(calls)), {name: moved(call, "cpu") for name, call in calls.items()}


def _counted(model: Any, names: list[str], bound: BoundLayout, ids: torch.Tensor) -> tuple[dict[str, list[str]], torch.Tensor]:
    """The collectives that each block issues in one forward, and the logits."""
    issued: dict[str, list[str]] = {}
    hooks = []

    def before(*_: Any) -> None:
        bound.comm.log.clear()

    for name in names:

        def after(*_: Any, name: str = name) -> None:
            issued[name] = [kind for kind, _ in bound.comm.log]

        block: nn.Module = model.get_submodule(name)
        hooks += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    try:
        return issued, run(model, ids)
    finally:
        for hook in hooks:
            hook.remove()


def _block(replaced: Any, every: list[Any], dtype: torch.dtype, wanted: list[str]) -> BlockCheck:
    """One block's verdict from what each rank found."""
    allowed = BLOCK_BOUND if dtype == torch.float32 else 2 * oracle_bound(dtype)
    problems = []
    for rank, (gap, _, misrouted, issued, ran) in enumerate(every):
        if not ran:
            problems.append(f"rank {rank} ran Transformers' own code, not moerunner")
        if misrouted:
            problems.append(f"rank {rank} chooses other experts than Transformers on {misrouted} tokens that are not tied")
        if not gap.max <= allowed:
            problems.append(f"output {gap.max:.1e} from Transformers on rank {rank}, allowed {allowed:.0e}")
        if issued != wanted:
            problems.append(f"rank {rank} issued {issued}, not {wanted}")
    gap, tied, _, issued, _ = max(every, key=lambda of: of[0].max)
    return BlockCheck(replaced.name, replaced.family, replaced.backend, gap, tied, issued, problems)
