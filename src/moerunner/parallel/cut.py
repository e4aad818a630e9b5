"""The part of a layer's whole weights that one rank holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from moerunner.parallel.comm import Comm
from moerunner.parallel.pairs import SlotMap
from moerunner.spec import MoESpec, SharedSpec
from moerunner.values import LayerWeights, cut_width


def local_part(w: LayerWeights, spec: MoESpec, comm: Comm, slots: SlotMap) -> LayerWeights:
    """This rank's experts, its slice of their width, and its slice of the shared experts; the rest is whole."""
    layout, here = comm.layout, comm.coordinates
    if not layout.split_axes and slots.plain:
        return w
    size, per_set, mine = spec.num_experts // len(w.experts), slots.per_rank // len(w.experts), slots.slots[here["ep"]]
    experts = []
    for index, one in enumerate(w.experts):
        own = [e - index * size if e >= 0 else -1 for e in mine[index * per_set : (index + 1) * per_set]]
        experts.append(one.shard(None if layout.ep == 1 and slots.plain else own, here["tp"], layout.tp))
    tensors = w.tensors
    if spec.shared is not None and layout.shards_shared:
        axes = layout.split_axes
        tensors = _cut_shared(spec.shared, tensors, comm.index(axes), layout.ep * layout.tp)
    return dataclasses.replace(w, experts=tuple(experts), tensors=tensors)


def _cut_shared(spec: SharedSpec, tensors: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """The slice of the intermediate width that rank `rank` of `size` holds, padded with zeros where it does not divide."""
    cut, halves = dict(tensors), 2 if spec.gated else 1
    for name, dim, parts in (
        ("shared_w13", -2, halves),
        ("shared_gate_proj", -2, 1),
        ("shared_up_proj", -2, 1),
        ("shared_w2", -1, 1),
        ("shared_b13", -1, halves),
        ("shared_gate_proj_bias", -1, 1),
        ("shared_up_proj_bias", -1, 1),
    ):
        if name in cut:
            cut[name] = cut_width(cut[name], dim, rank, size, parts=parts)
    return cut
