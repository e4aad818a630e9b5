"""`load` makes a model from a folder; `load_weights` puts other weights into a model that is running.

Both work out the place of every tensor first, from names and shapes alone, and read afterwards. Each number is read once and
written once to where it stays: beside the model itself, host memory holds one piece of a few MiB.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moerunner.errors import CheckpointError, PlanError, UnsupportedError, WeightsError
from moerunner.models.attention import Spread, spread
from moerunner.models.attention import check as check_attention
from moerunner.models.block import Changed, PatchedForward
from moerunner.models.checkpoint import CONFIG, GENERATION, Recipe, guarded, read_json, read_recipe, read_tensors, some
from moerunner.models.entry import pieces
from moerunner.models.fill import Filling, check, check_kind, stream
from moerunner.models.live import Live, take
from moerunner.models.names import Arrangement, Naming
from moerunner.models.prepare import prepare, sites, spec_of
from moerunner.models.quantized import known, quantized
from moerunner.models.shards import bound_to, cuts_of, refuse_saving
from moerunner.models.tensorfile import Stored
from moerunner.parallel.layout import BoundLayout, Layout
from moerunner.plan import Options

_SELECTION_BIAS = re.compile(r"(^|\.)(e_score_correction_bias|correction_bias|expert_bias|router_bias)$")
_SWITCH = re.compile(r"(do|use|output|return|renormalize|remove)_")  # settings for generation that are on or off
_HELD = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MOST_LAYERS = 10_000  # of a config without files: the deepest models have some hundred
_MOST_COMPUTED = 4 * 2**30  # bytes of rotary tables and the like: none comes near


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Python's collector waits: names and places of thousands of tensors would have it look at all that PyTorch holds, again
    and again, which takes longer than to make them."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_uncollected()
def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    layout: Layout | BoundLayout | None = None,
    quantize: str | None = None,
    attention: str = "replicate",
) -> Any:
    """A language model from a folder, patched and in eval mode; what was patched is its `moerunner_report`.

    A block of a family that moerunner does not know runs as Transformers has it, and the report says so.

    On several ranks each reads and holds its part of the experts only, and all else whole; what `patch` says of such a model
    holds. Every rank calls it with the same folder.

    Args:
        path: a folder in the format of `save_pretrained`. Nothing is downloaded, no code and no pickle from it is run.
        dtype: of the weights; None keeps the checkpoint's. A router's correction bias is never rounded below float32.
        device: where the weights go; None: host memory. layout: as for `patch`.
        attention: what each rank has of all that lies outside of the MoE blocks: "replicate", or "tp_plan", which is
            Transformers' own plan for the family over all ranks of one copy, with collectives of its own. Such a model takes no
            other weights by `load_weights`.
        quantize: "int8" holds the experts in whole numbers with a scale per row, `quant.int8`; all else stays as it is. Such a
            model is neither saved nor unpatched, takes no other weights, and runs on one rank.

    Raises:
        CheckpointError: the folder, one of its files or a tensor is missing, damaged or contradicts the config.
        UnsupportedError: the model, or the format of its weights, is not known; the layout shards tokens; the family has no
            `tp_plan`, or not for so many ranks; or `quantize`.
        DistributedError: there are no processes for the layout.
        SpecError: a config key may change a layer and the family's entry does not know it.
    """
    from moerunner.models.adapt import install

    path, device, bound = Path(path), _device(device), bound_to(layout)
    known(quantize)
    check_attention(attention, bound)
    if quantize is not None and bound is not None:
        raise UnsupportedError("experts are quantised on one rank only", where="quantize", next_step="Give no layout")
    plan = blueprint(path, dtype)
    model, naming, arranged, stored = plan.model.eval(), plan.naming, plan.arranged, plan.stored
    _generation_config(model, path)
    ready = _on_ranks(model, bound, device)
    cuts = cuts_of(model, [forward.source for forward in ready.values()])
    rest = spread(model, bound, device.type) if attention == "tp_plan" and bound is not None else Spread()
    cuts |= rest.cuts

    def place(name: str) -> Tensor:
        shape = cuts[name].local if name in cuts else naming.wanted[name].shape
        tensor = torch.empty(shape, dtype=plan.held_as[name], device=device)
        _set(model, name, rest.placed(name, tensor, naming.wanted[name]))
        return tensor

    filling = Filling(naming, place, cuts)
    _stream(filling, arranged, stored, device, path)
    guarded(lambda: _compute_the_rest(model, arranged, device), path / CONFIG)
    _refuse_unset(model, path / CONFIG)
    model._weight_conversions = [rule for rule in naming.rules if rule.was_used()]  # saving goes back the same way
    model.name_or_path = str(path)
    if quantize is not None:
        ready = quantized(model, quantize)
    report = install(model, Options(), bound, ready)
    if rest.modules:
        model.save_pretrained = refuse_saving
    model.moerunner_report = dataclasses.replace(report, tp_plan=rest.modules)
    return model


def _on_ranks(model: nn.Module, layout: BoundLayout | None, device: torch.device) -> dict[nn.Module, PatchedForward]:
    """What will stand in for the forward of each block that can be split over ranks; the model has no data yet."""
    ready = {}
    for site in sites(model) if layout is not None else ():
        with contextlib.suppress(UnsupportedError, PlanError, WeightsError, Changed):  # such a block stays whole
            ready[site.block] = prepare(site, Options(), layout, device=device)
    return ready


@dataclass(frozen=True)
class Blueprint:
    """A checkpoint before a weight is read.

    model: the whole model without data. stored: the tensors of the files, by name. dtype: of the weights; held_as: that of
    each tensor of the model that the files give, since some are kept in float32.
    """

    recipe: Recipe
    model: Any
    naming: Naming
    stored: Mapping[str, Stored]
    arranged: Arrangement
    dtype: torch.dtype
    held_as: Mapping[str, torch.dtype]


def blueprint(path: Path, dtype: torch.dtype | None = None, *, config_only: bool = False) -> Blueprint:
    """What `load` finds out before it reads a weight, and raises for, from the config and the headers of the files.

    config_only: the files are not looked at, and quantised weights are no fault.
    """
    recipe = read_recipe(path, quantised=config_only)
    stored = {} if config_only else read_tensors(path)
    dtype = _dtype(dtype, recipe, stored)
    model = _skeleton(recipe, dtype, path, None if config_only else len(stored))
    naming = Naming(model)
    if config_only:
        arranged = Arrangement(led_by={name: name for name in naming.wanted})
    else:
        arranged = naming.arrange({name: tensor.shape for name, tensor in stored.items()})
        check(arranged, str(path))
    held_as = _dtypes(naming, arranged, dtype)
    _check_kinds(stored, arranged, held_as)
    return Blueprint(recipe, model, naming, stored, arranged, dtype, held_as)


@_uncollected()
@torch.no_grad()
def load_weights(model: nn.Module, source: str | Path | Iterable[tuple[str, Tensor]]) -> None:
    """Other weights for a model that is there, patched or not: the result is that of loading them afresh.

    They are written into the model's own tensors, in their dtypes and on their devices. Every weight must come, once. A model
    that is one rank's part is given the whole weights, on every rank, and takes its part of them.

    Args:
        model: a Transformers model.
        source: a checkpoint folder, whose config is not looked at; or names and tensors in any order, each used before the
            next is asked for, with the names of a checkpoint or the model's own.

    Raises:
        CheckpointError: tensors are missing, unknown, doubled or misshapen, or a file is damaged. What the headers of files
            show is seen before the model is touched; after that, it is left with some weights old and some new.
        UnsupportedError: a tensor of the model is not a plain one (sharded, quantised, without data).
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    cuts = cuts_of(model)
    naming, live = Naming(model, {name: cut.shape for name, cut in cuts.items()}), Live(model)
    filling = Filling(naming, live.place, cuts)
    if isinstance(source, str | Path):
        path = Path(source)
        stored = read_tensors(path)
        arranged = naming.arrange({name: tensor.shape for name, tensor in stored.items()})
        check(arranged, str(path))
        _check_kinds(stored, arranged, live.dtypes)
        _stream(filling, arranged, stored, live.device, path)
    else:
        take(filling, live, source)
    live.compare_tied()


def _stream(filling: Filling, arranged: Arrangement, stored: Mapping[str, Stored], device: torch.device, path: Path) -> None:
    stream(filling, arranged, stored, device)
    filling.finish(arranged.led_by, str(path))


def _device(given: str | torch.device | None) -> torch.device:
    try:
        # With its index: in a thread that reads, "cuda" would be the first GPU and not the one that the caller has chosen.
        device = torch.empty(1, device=given if given is not None else "cpu").device
    except (RuntimeError, AssertionError, TypeError) as error:  # an unknown name, and a torch built without that device
        raise UnsupportedError(f"torch has no device {given!r} here", where="device") from error
    if device.type == "meta":
        raise UnsupportedError("weights on the meta device have no data", where="device")
    return device


def _dtype(given: torch.dtype | None, recipe: Recipe, stored: Mapping[str, Stored]) -> torch.dtype:
    """The dtype asked for, or the config's, or that of most bytes in the files."""
    bytes_of: Counter[torch.dtype] = Counter()
    for tensor in stored.values():
        if tensor.dtype in _HELD:
            bytes_of[tensor.dtype] += tensor.nbytes
    dtype = given or recipe.dtype or (bytes_of.most_common(1)[0][0] if bytes_of else torch.float32)
    if dtype not in _HELD:
        names = ", ".join(str(held).removeprefix("torch.") for held in _HELD)
        raise UnsupportedError(f"weights cannot be held in {dtype!r}", where="dtype", next_step=f"Choose one of {names}")
    return dtype


def _skeleton(recipe: Recipe, dtype: torch.dtype, path: Path, tensors: int | None) -> Any:
    """The model without data. Everything that its config can make fail fails here, before weights are read."""
    file = path / CONFIG

    def make() -> Any:
        layers = getattr(recipe.config.get_text_config(), "num_hidden_layers", 0)
        most = tensors if tensors is not None else _MOST_LAYERS
        if isinstance(layers, int) and layers > most:  # a wrong digit must not take hours
            why = f"the files hold {tensors} tensors" if tensors is not None else f"at most {most} are believed"
            raise CheckpointError(f"asks for {layers} layers, {why}", where=str(file))
        with torch.device("meta"):
            return recipe.auto_class.from_config(recipe.config, dtype=dtype)

    def know_every_key() -> None:
        for site in sites(model):
            with contextlib.suppress(UnsupportedError):
                spec_of(site)

    model = guarded(make, file)
    guarded(know_every_key, file)
    return model


def _generation_config(model: Any, path: Path) -> None:
    from transformers import GenerationConfig

    kind = getattr(model, "generation_config_class", GenerationConfig)
    there = (path / GENERATION).exists()
    if not model.can_generate() or not (there or kind is GenerationConfig):
        return
    own = {} if there else {"config_file_name": CONFIG, "_from_model_config": True}
    file = path / (GENERATION if there else CONFIG)
    if not isinstance(read_json(file), dict):
        raise CheckpointError("is not a JSON object", where=str(file))
    found = guarded(lambda: kind.from_pretrained(path, local_files_only=True, **own), file, "does not say how to generate")
    wrong = [f"{key} = {value!r}" for key, value in vars(found).items() if not _fits(key, value)]
    if wrong:
        raise CheckpointError(f"does not say how to generate: {some(wrong)}", where=str(file))
    model.generation_config = found


def _fits(key: str, value: Any) -> bool:
    """Whether a setting for generation is of its kind; Transformers looks at some of them only, and when it is too late."""
    if key.endswith("_token_id"):
        values = value if isinstance(value, list) else [value]
        return value is None or all(type(v) is int for v in values)
    return not _SWITCH.match(key) or value is None or isinstance(value, bool)


def kept_in_float32(model: Any, dtype: torch.dtype) -> re.Pattern[str]:
    """Finds the names of the tensors that Transformers keeps in float32 in a model of this dtype."""
    kept = model._get_dtype_plan(dtype)
    return re.compile("|".join(f"({pattern.replace('*', '.*')})" for pattern in kept) or r"(?!)")


def _dtypes(naming: Naming, arranged: Arrangement, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What each tensor is held as: as the model is made, except what it wants in float32, and correction biases."""
    in_float32 = kept_in_float32(naming.model, dtype)
    biases = {
        f"{site.name}.{view.path}"
        for site in sites(naming.model)
        if site.family is not None and "selection_bias" in site.family.weights
        for view, _ in pieces(site.family.weights["selection_bias"], (0,))
    }
    found = {}
    for name, leader in arranged.led_by.items():
        held = naming.wanted[leader].dtype
        if held.is_floating_point and (name in biases or _SELECTION_BIAS.search(name)):
            held = torch.promote_types(held, torch.float32)
        elif held.is_floating_point and in_float32.search(leader):
            held = torch.float32
        found[name] = held
    return found


def _check_kinds(stored: Mapping[str, Stored], arranged: Arrangement, dtypes: Mapping[str, torch.dtype]) -> None:
    for name, parts in arranged.parts.items():
        check_kind(name, stored[name].dtype, dtypes[parts[0][0]], str(stored[name].file))
    for group in arranged.whole:
        for name in group.names():
            check_kind(name, stored[name].dtype, dtypes[group.target], str(stored[name].file))


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    """Puts a tensor into the model in place of one without data."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if attribute not in module._buffers:
        value = nn.Parameter(value, requires_grad=value.is_floating_point())
    value._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue] - Transformers leaves it as it is then
    setattr(module, attribute, value)


@torch.no_grad()
def _compute_the_rest(model: Any, arranged: Arrangement, device: torch.device) -> None:
    """What is not in files: ties, tables that are computed from the config, tensors that the model lets files leave out.

    They hold NaN or the smallest integer first, so that one that nobody computes is found.
    """
    model.tie_weights(missing_keys=set(arranged.absent), recompute_mapping=False)
    tied = getattr(model, "all_tied_weights_keys", {})
    own = [name for name in arranged.absent if name not in tied and model.get_parameter_or_buffer(name).is_meta]
    computed = [name for name, _ in model.named_non_persistent_buffers()]
    sizes = [model.get_parameter_or_buffer(name).nbytes for name in (*own, *computed)]
    if sum(sizes) > _MOST_COMPUTED:
        raise CheckpointError(f"asks for tables of {sum(sizes):,} bytes", where="the config")
    for name in (*own, *computed):
        value = torch.empty_like(model.get_parameter_or_buffer(name), device=device)
        if value.dtype != torch.bool:
            value.fill_(_blank(value.dtype))
        _set(model, name, value)
        del model.get_parameter_or_buffer(name)._is_hf_initialized
    model.initialize_weights()


def _refuse_unset(model: Any, file: Path) -> None:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    unset = [name for name, tensor in named.items() if tensor.is_meta]
    for name, buffer in model.named_non_persistent_buffers():
        if buffer.is_meta or buffer.dtype == torch.bool:
            continue
        blank = _blank(buffer.dtype)
        if (buffer.isnan() if blank != blank else buffer == blank).any():
            unset.append(name)
    if unset:
        raise CheckpointError(f"leads to values that are not numbers in {some(unset)}", where=str(file))


def _blank(dtype: torch.dtype) -> float | int:
    """What stands where nothing was written yet."""
    return torch.nan if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min
