"""Finds the MoE blocks of a model and makes everything ready to replace their forward, without touching the model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moerunner.errors import UnsupportedError
from moerunner.models import reference, registry
from moerunner.models.block import PLAIN, Held, Part, PatchedForward, Source, reach, refuse_training, slot_of
from moerunner.models.dtensors import Placed, hooked_by_plan, local
from moerunner.models.entry import Family, Keys, MissingKey, View, pieces
from moerunner.models.experts_function import as_family, is_experts_module
from moerunner.models.plans import layout_of
from moerunner.models.shards import part_of
from moerunner.parallel.layout import BoundLayout
from moerunner.plan import Options, resolve
from moerunner.spec import MoESpec
from moerunner.values import LayerWeights

_LOOKS_LIKE_MOE = re.compile(r"(MoE|Moe)(Block|Layer)?$|SparseMLP$")
_PLAIN_MODULES = ("torch.nn.modules.", "transformers.activations")
_MAY_DIFFER = ("gate", "selection_bias", "per_expert_scale", "global_scale", "hash_table")  # in dtype from the experts


@dataclass(frozen=True)
class Site:
    """A module that is, or looks like, an MoE block. owners: what encloses it, nearest first."""

    name: str
    block: nn.Module
    family: Family | None
    owners: tuple[nn.Module, ...]

    @property
    def layer(self) -> int | None:
        """The block's index in its stack of layers, as it has it or from its name."""
        named = next((int(part) for part in reversed(self.name.split(".")) if part.isdigit()), None)
        return getattr(self.block, "layer_idx", named)


def sites(model: nn.Module) -> Iterator[Site]:
    """Every MoE block of a model, by the class of the module. Nothing is looked for inside a block of a known family.

    Of an unknown block whose experts can be run alone, those are the site.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, name: str, owners: tuple[nn.Module, ...]) -> Iterator[Site]:
        if id(module) in seen:
            return
        seen.add(id(module))
        family = registry.find(type(module))
        if family is not None or is_experts_module(module):
            yield Site(name, module, family, owners)
            return
        children = module.named_children()
        inside = [s for child, m in children for s in walk(m, f"{name}.{child}" if name else child, (module, *owners))]
        if _looks_like_moe(module) and not any(is_experts_module(site.block) for site in inside):
            yield Site(name, module, None, owners)
        yield from inside

    return walk(model, "", ())


def _looks_like_moe(module: nn.Module) -> bool:
    named = _LOOKS_LIKE_MOE.search(type(module).__name__) and not hasattr(module, "save_pretrained")
    return isinstance(getattr(module, "experts", None), nn.Module) or bool(named)


def prepare(
    site: Site, options: Options, layout: BoundLayout | None = None, *, device: torch.device | None = None
) -> PatchedForward:
    """What can take the place of the block's forward. Everything that can be wrong is found here.

    layout: of several ranks; the block's tensors are whole, and are to be cut before the first call. device: where tensors
    will be that have no data yet.

    Raises:
        UnsupportedError: the block has to stay as it is; the reason is given.
        SpecError: its config has keys that the family's entry does not know.
    """
    source = source_of(site)
    tensors = _tensors(source())
    without_data = [name for name, tensor in tensors.items() if tensor.is_meta and device is None]
    if without_data:
        raise UnsupportedError(f"{', '.join(without_data)} have no data: they are on the meta device")
    spread = layout_of(source, (site.block, *site.owners))
    if spread is not None:
        if layout is not None:
            raise UnsupportedError("Transformers has spread it over ranks already; patch(model) without a layout runs it so")
        source.layout = spread
        return PatchedForward(source, options)
    if layout is not None:
        source = part_of(source, layout)
        kind = (device or next(iter(tensors.values())).device).type
        resolve(source.spec, layout.layout, source.planned().meta(), kind, options)
    return PatchedForward(source, options)


def source_of(site: Site) -> Source:
    """The block's spec and tensors, which may be without data. Raises as `prepare` does."""
    block = site.block
    present = block.__dict__.get(slot_of(block))
    if hooked_by_plan(block):
        raise UnsupportedError("its forward is hooked by the TP or EP plan that Transformers spread the model with")
    if slot_of(block) == "forward" and present is not None:
        raise UnsupportedError(f"its forward was replaced by {present!r}")
    family, config, spec = spec_of(site)
    if block.training:
        refuse_training(block, family)
    built = {path: reach(block, path) for path in family.holds}
    keys = Keys(config, site.layer)
    for path, key in family.holds.items():
        now = keys(key) if isinstance(key, str) else key(keys)
        if built[path] != now:
            says = f"its config now says {f'{key} = ' * isinstance(key, str)}{now!r}"
            raise UnsupportedError(f"it was built with {path} = {built[path]!r}, {says}")
    shapes = spec.weight_shapes(vocab_size=getattr(config, "vocab_size", None))
    source = Source(block, _parts(block, family, shapes), built, family, spec)
    _check_tensors(source())
    return source


def spec_of(site: Site) -> tuple[Family, Any, MoESpec]:
    """The block's family, config and spec.

    The config is the first that has all the keys of the family: the block's own, a child's, or of what encloses the block.
    Raises as `prepare` does.
    """
    family = site.family
    if family is None and is_experts_module(site.block):
        family = as_family(site.block)
    if family is None:
        raise UnsupportedError(registry.why_not(type(site.block)))
    if family.older:
        family = dataclasses.replace(family, **family.older.get(reference.fingerprint(type(site.block)) or "", {}))
    missing = "there is none"
    for module in (site.block, *site.block.children(), *site.owners):
        config = getattr(module, "config", None)
        for candidate in (config, getattr(config, "text_config", None)):
            if candidate is None:
                continue
            try:
                return family, candidate, family.read(candidate, site.layer)
            except MissingKey as error:
                missing = str(error)
    raise UnsupportedError(f"no config around it has the keys of the family {family.name!r}: {missing}")


def _parts(block: nn.Module, family: Family, shapes: dict[str, tuple[int, ...]]) -> tuple[Part, ...]:
    """Every module of the block with its tensors, each with the shape that the spec wants."""
    if "shared_gate_proj" in family.weights and "shared_w13" in shapes:
        *each, rows, hidden = shapes.pop("shared_w13")
        shapes["shared_gate_proj"] = shapes["shared_up_proj"] = (*each, rows // 2, hidden)
        if shapes.pop("shared_b13", None):
            shapes["shared_gate_proj_bias"] = shapes["shared_up_proj_bias"] = (rows // 2,)
    held: dict[str, list[Held]] = {}
    for name, shape in shapes.items():
        if name not in family.weights:
            raise UnsupportedError(f"the entry {family.name!r} does not say where {name} is")
        for index, (view, seen) in enumerate(pieces(family.weights[name], shape)):
            path, _, attribute = view.path.rpartition(".")
            tensor = reach(block, view.path)
            one = Held(name, attribute, view.change, seen, index, placed=Placed.of(tensor))
            _check_tensor(tensor, view, one)
            held.setdefault(path, []).append(one)
    router = family.router.path if family.router is not None else None
    if router is not None and not isinstance(reach(block, router), nn.Module):
        raise UnsupportedError(f"it has no router {router}")
    parts = []
    for path, module in block.named_modules():
        _check_kind(block, path, type(module))
        inside = router is not None and f"{path}.".startswith(f"{router}.")
        parts.append(Part(path, type(module), inside, tuple(held.pop(path, ()))))
    assert not held, "a tensor's path leads through modules"
    return tuple(parts)


def _check_kind(block: nn.Module, path: str, kind: type) -> None:
    """Adapters and quantisers put classes of their own in place of the model's; a runner would pass over what they do.

    Its own are, in Transformers, those of the model's package; elsewhere all of the same program, and Transformers' models.
    """
    owner = registry.forward_owner(kind)
    theirs, home = owner.__module__, registry.forward_owner(type(block)).__module__
    own = theirs.rpartition(".")[0] == home.rpartition(".")[0]
    if not home.startswith("transformers."):
        own |= theirs.partition(".")[0] == home.partition(".")[0] or theirs.startswith("transformers.models.")
    if not own and not theirs.startswith(_PLAIN_MODULES):
        raise UnsupportedError(f"{path} is a {owner.__module__}.{owner.__qualname__}, not the model's own module")


def _check_tensor(tensor: Any, view: View, held: Held) -> None:
    if not isinstance(tensor, Tensor):
        raise UnsupportedError(f"it has no tensor {view.path}")
    if held.placed is not None:
        rows = view.change == "leading" and any(getattr(placement, "dim", None) == 0 for placement in held.placed.placements)
        if rows or (not held.placed.whole and view.change.startswith("reshaped")):
            raise UnsupportedError(f"{view.path} is {held.placed}, and stored {view.change}")
        tensor = torch.empty(tensor.shape, device="meta")  # the whole
    if type(tensor) not in PLAIN:
        raise UnsupportedError(f"{view.path} is a {type(tensor).__name__}, not a plain tensor")
    try:
        fits = tuple(held.see(tensor).shape) == held.shape
    except RuntimeError:
        fits = False
    if not fits:
        change = f", {view.change}" * bool(view.change)
        raise UnsupportedError(f"{view.path} has shape {list(tensor.shape)}, its config asks for {list(held.shape)}{change}")


def _check_tensors(weights: LayerWeights) -> None:
    """That the experts are floating and of one dtype, and that everything lies on one device."""
    named = _tensors(weights)
    main = {name: t for name, t in named.items() if name.split(".")[0] not in _MAY_DIFFER}
    dtypes, devices = {t.dtype for t in main.values()}, {t.device for t in named.values()}
    if len(dtypes) > 1 or not all(d.is_floating_point and d.itemsize > 1 for d in dtypes):
        raise UnsupportedError(f"its tensors are stored as {', '.join(sorted(map(str, dtypes)))}")
    if len(devices) > 1:
        raise UnsupportedError(f"its tensors lie on {', '.join(sorted(map(str, devices)))}")


def _tensors(weights: LayerWeights) -> dict[str, Tensor]:
    experts = {f"{n}.{i}": e.tensor for i, one in enumerate(weights.experts) for n, e in one.tensors.items()}
    return experts | dict(weights.tensors)


def copied_bytes(weights: LayerWeights, block: nn.Module) -> int:
    """Memory of the tensors that are not the block's own."""
    own = {local(t).untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
    return sum(t.nbytes for t in _tensors(weights).values() if t.untyped_storage().data_ptr() not in own)
