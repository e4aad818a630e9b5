"""What each rank does with a model, and what it tells; in a module of its own, so that the processes can import it."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import moerunner
from moerunner import Layout
from moerunner.generate import generate
from moerunner.models import runners, tensorfile
from moerunner.models.checkpoint import read_tokenizer
from moerunner.models.dtensors import local
from moerunner.verify.tiny import tiny_inputs, tiny_model

LENGTH, NEW = 12, 8


def prompt(model: Any, which: int = 0) -> torch.Tensor:
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(3, vocab, (1, LENGTH), generator=torch.Generator().manual_seed(5 + which))


@torch.no_grad()
def answer(model: Any, which: int = 0, *, generates: bool = True) -> tuple[Any, Any]:
    """The logits (or the last hidden states) of a prompt, and what the model says next."""
    ids = prompt(model, which)
    out = model(**tiny_inputs(model, ids))
    said = None
    if generates:
        said = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)[0, LENGTH:].tolist()
    return out[0].double().numpy(), said


def collectives(model: Any) -> dict[str, Any]:
    """Which collectives each block issues in one forward of the model, and which its plan has."""
    made = runners(model)
    comm = next(iter(made.values()))._comm
    issued: dict[str, list[Any]] = {}
    hooks = []
    for name, block in model.named_modules():
        if name in made:
            hooks.append(block.register_forward_pre_hook(lambda *_: comm.log.clear()))
            hooks.append(block.register_forward_hook(lambda *_, name=name: issued.__setitem__(name, list(comm.log))))
    with torch.no_grad():
        model(**tiny_inputs(model, prompt(model)))
    for hook in hooks:
        hook.remove()
    assert issued.keys() == made.keys()
    assert all(issued[name] == list(runner.plan.collectives) for name, runner in made.items())
    return issued


def facts(model: Any, generates: bool = True) -> dict[str, Any]:
    """What a test looks at, of one rank."""
    comm = next(iter(runners(model).values()))._comm
    logits, said = answer(model, comm.coordinates["dp"], generates=generates)
    return {
        "logits": logits,
        "said": said,
        "collectives": collectives(model),
        "shapes": {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        "report": str(model.moerunner_report),
    }


def load_and_run(folder: Path, layout: Layout, generates: bool = True, attention: str = "replicate") -> dict[str, Any]:
    """Loads for this rank and counts the bytes that are read of each stored tensor."""
    read: Counter[str] = Counter()
    own = tensorfile.Reader.read

    def count(self: Any, tensors: Any, position: int, into: torch.Tensor) -> None:
        (tensor,) = tensors  # in host memory each is read by itself
        read[tensor.name] += into.nbytes
        own(self, tensors, position, into)

    tensorfile.Reader.read = count
    try:
        model = moerunner.load(folder, layout=layout, attention=attention)
    finally:
        tensorfile.Reader.read = own
    found = facts(model, generates)
    kept = sum(local(tensor).nbytes for tensor in model.state_dict().values())
    return {**found, "read": dict(read), "kept": kept, "split": model.moerunner_report.tp_plan}


def patch_and_run(family: str, changes: dict[str, Any], layout: Layout, generates: bool = True) -> dict[str, Any]:
    """Patches a whole model, of which this rank keeps a part."""
    model = tiny_model(family, **changes)
    parameters = dict(model.named_parameters())
    model.moerunner_report = moerunner.patch(model, layout)
    found = facts(model, generates)
    same = all(parameters[name] is parameter for name, parameter in model.named_parameters())
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    kept = sum(t.nbytes for t in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values())
    return {**found, "same parameters": same, "memory": sum(memory.values()), "kept": kept}


def same(model: Any, fresh: Any) -> list[str]:
    """The names of tensors that differ."""
    other = fresh.state_dict()
    return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, other[name])]


def load_new_weights(old: Path, new: Path, layout: Layout) -> dict[str, Any]:
    """A live part of `old` is given the weights of `new` in every way; what differs from loading `new` afresh."""
    bound = layout.bind()
    fresh, whole = moerunner.load(new, layout=bound), moerunner.load(new)
    of_files = load_file(new / "model.safetensors")
    told: dict[str, Any] = {}
    for how, source in {
        "a folder": new,
        "names of files": of_files.items(),
        "names of the model": whole.state_dict().items(),
    }.items():
        model = moerunner.load(old, layout=bound)
        parameter = next(p for name, p in model.named_parameters() if name.endswith("down_proj"))
        assert same(model, fresh)
        for tensor in model.state_dict().values():
            tensor.add_(1) if tensor.is_floating_point() else None  # zeros of the padding too: they must come back
        moerunner.load_weights(model, source)
        told[how] = same(model, fresh)
        assert any(parameter is p for p in model.parameters())
    expert = [name for name in of_files if ".experts." in name]
    for what, left in {"gone": expert[-1], "missing": expert[0]}.items():
        try:
            moerunner.load_weights(model, [(n, t) for n, t in of_files.items() if n != left])
        except moerunner.CheckpointError as error:
            told[what] = "1 missing" in str(error)
    return told


def load_in(folder: Path, dtype: torch.dtype, layout: Layout) -> dict[str, Any]:
    """The bits of each tensor of this rank."""
    model = moerunner.load(folder, dtype=dtype, layout=layout)
    return {name: tensor.contiguous().view(torch.int16).numpy() for name, tensor in model.state_dict().items()}


def refusals_of_a_part(folder: Path, layout: Layout, empty: Path) -> dict[str, Any]:
    """What a model of which this rank holds a part says to what it cannot do."""
    model = moerunner.load(folder, layout=layout)
    told: dict[str, Any] = {}
    before, _ = answer(model, generates=False)
    twin = copy.deepcopy(model)
    told["copy"] = float(abs(answer(twin, generates=False)[0] - before).max())
    report = moerunner.patch(model, layout)
    told["again"] = [all(r.already for r in report.replaced), report.layout == layout, bool(report.replaced)]
    block = next(m for name, m in model.named_modules() if name in runners(model))
    for what, act in {
        "save": lambda: model.save_pretrained(empty),
        "unpatch": lambda: moerunner.unpatch(model),
        "pickle": lambda: pickle.dumps(model),
        "another layout": lambda: moerunner.patch(model, Layout(tp=2)),
    }.items():
        told[what] = refusal(act)
    block.experts.register_forward_hook(lambda *_: None)
    told["hook"] = refusal(lambda: answer(model, generates=False))
    return told


def refusal(act: Callable[[], Any]) -> str:
    try:
        act()
    except moerunner.MoEError as error:
        return str(error)
    return "nothing was refused"


def patch_twice(layout: Layout) -> tuple[Any, Any, Any]:
    model, bound = tiny_model("mixtral"), layout.bind()
    moerunner.patch(model, bound)
    before = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    told = [all(r.already for r in moerunner.patch(model, bound).replaced)]
    return before, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, told


def mixed_blocks(layout: Layout) -> tuple[dict[str, Any], float]:
    """A model whose blocks cannot be split: the report, and how far its answer is from before."""
    model = tiny_model("switch_transformers")
    before, _ = answer(model, generates=False)
    report = moerunner.patch(model, layout)
    after, _ = answer(model, generates=False)
    told = {"replaced": [r.name for r in report.replaced], "skipped": [(s.name, s.reason) for s in report.skipped]}
    return told, float(abs(after - before).max())


def wrong_layouts() -> dict[str, Any]:
    """The error, and whether the model is as it was."""
    told = {}
    for what, layout in {
        "placement": Layout(ep=2, placement=((0, 1), (2, 3))),
        "tokens": Layout(ep=2, tokens="sharded"),
        "world": Layout(ep=4),
        "patched for one": Layout(ep=2),
    }.items():
        model = tiny_model("mixtral")
        if what == "patched for one":
            moerunner.patch(model)
        before, shapes = runners(model).keys(), [p.shape for p in model.parameters()]
        try:
            moerunner.patch(model, layout)
        except moerunner.MoEError as error:
            same = runners(model).keys() == before and [p.shape for p in model.parameters()] == shapes
            told[what] = [type(error).__name__, same]
    return told


def sample_apart(folder: Path, layout: Layout) -> str:
    """The text of ranks that compute other scores and draw other numbers."""
    bound = layout.bind()
    model, rank = moerunner.load(folder, layout=bound), bound.comm.rank
    torch.manual_seed(rank)
    head = model.get_output_embeddings().weight
    head.data += rank * torch.randn(head.shape)
    tokenizer = read_tokenizer(folder)
    return generate(model, tokenizer, "def f(", max_new_tokens=12, temperature=1.0, layout=bound, prefill_chunk=2).text


def memory_of_loading(folder: Path, small: Path, layout: Layout) -> tuple[int, int]:
    """The most memory that this process had during loading beyond what it had before, and what the model takes."""
    bound = layout.bind()
    moerunner.load(small, layout=bound)  # imports and pools of threads are there then

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))

    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = status("VmRSS")
    model = moerunner.load(folder, layout=bound)
    return status("VmHWM") - before, sum(tensor.nbytes for tensor in model.state_dict().values())


def rebalanced_model(folder: Path, layout: Layout) -> dict[str, Any]:
    """Counts while it reads a prompt, moves the experts, and reads it again."""
    model = moerunner.load(folder, layout=layout)
    counters = moerunner.count_loads(model)
    nothing = refusal(lambda: moerunner.rebalance(model))
    before, _ = answer(model, generates=False)
    moved = moerunner.rebalance(model, redundant=layout.ep)
    left = [int(counter.counts.sum()) for counter in counters.values()]
    after, said = answer(model)
    told = {"before": before, "after": after, "said": said, "moved": moved, "collectives": collectives(model)}
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in model.state_dict().values():
        tensor.add_(1) if tensor.is_floating_point() else None
    moerunner.load_weights(model, folder)
    told["differ after load_weights"] = [n for n, tensor in model.state_dict().items() if not torch.equal(tensor, kept[n])]
    told |= {"nothing counted": nothing, "counts afterwards": left, "tokens": LENGTH}
    return told | {"top_k": next(iter(runners(model).values())).spec.top_k}


def split_model(folder: Path, empty: Path, layout: Layout) -> dict[str, Any]:
    """What a model says to what it cannot do, of which Transformers' plan splits all but the blocks."""
    bound = layout.bind()
    model = moerunner.load(folder, layout=bound, attention="tp_plan")
    told: dict[str, Any] = {
        "save": refusal(lambda: model.save_pretrained(empty)),
        "load_weights": refusal(lambda: moerunner.load_weights(model, folder)),
    }
    for name, ranks in {"alone": None, "ranks": bound}.items():
        made = moerunner.generate(model, None, input_ids=prompt(model), max_new_tokens=NEW, layout=ranks)
        told[name], told[f"{name}, note"] = made.sequences.tolist(), made.note
    before, _ = answer(model, generates=False)
    moerunner.rebalance(model, loads={name: [9, 0, 0, 0, 9, 1, 1, 1] for name in runners(model)})
    after, _ = answer(model, generates=False)
    told["moved"] = float(abs(after - before).max() / abs(before).max())
    return told
