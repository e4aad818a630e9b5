"""What lies outside of the MoE blocks, split over ranks by Transformers' own `tp_plan`, on the ranks of a layout.

Transformers' styles put a DTensor in place of each tensor and a forward of theirs in place of a module's, and reduce there by
themselves. What lies inside of a block is left to the runner.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from moerunner.errors import UnsupportedError
from moerunner.models.dtensors import Placed
from moerunner.models.places import Cut
from moerunner.models.prepare import sites
from moerunner.parallel.layout import BoundLayout

_WHERE = "attention='tp_plan'"
_ALONE = ("colwise_gather_output", "colwise_rep", "embedding_rowwise", "embedding_colwise")  # what comes out is whole again


@dataclass(frozen=True)
class Spread:
    """modules: those that Transformers' plan computes with. held: of their tensors, how each lies on the ranks, and which part
    of it is here."""

    modules: list[str] = field(default_factory=list)
    held: dict[str, tuple[Placed, Cut]] = field(default_factory=dict)

    @property
    def cuts(self) -> dict[str, Cut]:
        return {name: cut for name, (_, cut) in self.held.items()}

    def placed(self, name: str, part: Tensor, whole: Tensor) -> Tensor:
        """This rank's part as the model is to have it; the same tensor where the plan does not speak of it.

        whole: without data.
        """
        if name not in self.held:
            return part
        how = self.held[name][0]
        return DTensor.from_local(part, how.mesh, how.placements, run_check=False, shape=whole.shape, stride=whole.stride())


def check(attention: str, layout: BoundLayout | None) -> None:
    """Raises UnsupportedError: there is no such way, or there are no ranks to split anything over."""
    if attention not in ("replicate", "tp_plan"):
        raise UnsupportedError(f"cannot be {attention!r}", where="attention", next_step="Give 'replicate' or 'tp_plan'")
    if attention == "tp_plan" and (layout is None or not layout.layout.split_axes):
        step = "Give a layout whose ep or tp is above 1"
        raise UnsupportedError("there is one rank, or there are only copies of the model", where=_WHERE, next_step=step)


def spread(model: Any, layout: BoundLayout, device: str) -> Spread:
    """Splits the attention and the dense parts of a model without data over all ranks of one copy.

    A module whose output is whole again, the language model's head say, stays whole where its size does not divide, where its
    tensor is another module's too, or where it has modules inside.

    Raises:
        UnsupportedError: the family has no such plan, or sizes do not divide. On every rank alike.
    """
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    size = layout.layout.ep * layout.layout.tp
    blocks = tuple(f"{site.name}." for site in sites(model))
    tied = getattr(model, "all_tied_weights_keys", {})
    shared = {*tied, *tied.values()}

    def style_of(name: str) -> str | None:
        return None if f"{name}.".startswith(blocks) else model.tp_plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))

    modules = {name: style for name, _ in model.named_modules() if (style := style_of(name)) is not None}
    for name, style in list(modules.items()):
        module = model.get_submodule(name)
        own = [f"{name}.{n}" for n, _ in module.named_parameters(recurse=False)]
        uneven = any(t.shape[style == "embedding_colwise"] % size for t in map(model.get_parameter, own) if t.ndim > 1)
        norm_inside = any(True for _ in module.children())  # Inkling's embedding: needs the whole sum, which comes after it
        if style in _ALONE and (uneven or norm_inside or shared & set(own)):
            del modules[name]
    if not modules:
        what = f"{type(model).__name__} has no tp_plan for what lies outside of its MoE blocks"
        raise UnsupportedError(what, where=_WHERE, next_step="attention='replicate'")
    _check_heads(model, modules, size)
    mesh = DeviceMesh.from_group(layout.comm.process_group(("ep", "tp")), device, mesh_dim_names=("tp",))
    held = {}
    for name, whole in list(model.named_parameters()):
        path, _, attribute = name.rpartition(".")
        style = style_of(name) or modules.get(path)
        if style is None:
            continue
        ALL_PARALLEL_STYLES[style].shard_param(model.get_submodule(path), attribute, mesh)
        placed = Placed.of(model.get_parameter(name))
        if placed is None:
            continue
        cut = placed.cut(tuple(whole.shape))
        if cut is None:
            raise UnsupportedError(f"{name}, {list(whole.shape)}, does not divide into {placed}", where=_WHERE)
        held[name] = placed, cut
    for name, style in modules.items():
        if style == "mla_kv_a_proj":
            model.get_submodule(name).config = model.config.get_text_config()  # the style reads the rotary width there
        ALL_PARALLEL_STYLES[style].install_forward(model.get_submodule(name), mesh)
    model._tp_size = size  # Transformers makes caches for so many of the heads
    return Spread(list(modules), held)


def _check_heads(model: Any, modules: dict[str, str], size: int) -> None:
    """Raises unless every rank gets whole heads."""
    if not any("attn" in name or "attention" in name for name in modules):
        return
    config = model.config.get_text_config()
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, key, None)
        for count in heads if isinstance(heads, list | tuple) else [heads]:
            if isinstance(count, int) and count % size:
                what = f"{key} is {count}, which {size} ranks cannot share"
                raise UnsupportedError(what, where=_WHERE, next_step="attention='replicate', or fewer ranks of one copy")
