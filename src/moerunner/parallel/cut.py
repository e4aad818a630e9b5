"""The part of a layer's whole weights that one rank holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor, nn

from moerunner.parallel.comm import Comm
from moerunner.parallel.pairs import SlotMap
from moerunner.spec import MoESpec
from moerunner.values import EXPERT_NAMES, GateUp, LayerWeights, Runs, kept_runs, take, width_runs

Shape = tuple[int, ...]


def local_part(w: LayerWeights, spec: MoESpec, comm: Comm, slots: SlotMap) -> LayerWeights:
    """This rank's experts, its slice of their width, and its slice of the shared experts; the rest is whole.

    The part of a parameter is a parameter of its own, which this rank trains; other tensors are cut differentiably.
    """
    layout, tp_rank = comm.layout, comm.coordinates["tp"]
    if not layout.split_axes and slots.plain:
        return w
    own = _experts_of_sets(spec, comm, slots)
    experts = tuple(one.shard(mine, tp_rank, layout.tp) for one, mine in zip(w.experts, own, strict=True))
    tensors = dict(w.tensors)
    for name, runs in _kept_of_shared(spec, {name: tuple(t.shape) for name, t in tensors.items()}, comm).items():
        for dim, places in runs.items():
            tensors[name] = take(tensors[name], dim, places)
    whole: dict[str, Tensor] = {}
    w.map(lambda name, tensor: whole.setdefault(name, tensor))
    return dataclasses.replace(w, experts=experts, tensors=tensors).map(lambda name, part: _trained(whole[name], part))


def _trained(whole: Tensor, part: Tensor) -> Tensor:
    if part is whole or not isinstance(whole, nn.Parameter):
        return part
    return nn.Parameter(part.detach(), requires_grad=whole.requires_grad)


def kept(spec: MoESpec, shapes: Mapping[str, Shape], gate_up: GateUp, comm: Comm, slots: SlotMap) -> dict[str, dict[int, Runs]]:
    """What `local_part` keeps of whole tensors of these shapes, along each dimension that it cuts; names that it does not cut
    are left out.

    shapes: by the names of `MoESpec.weight_shapes`, or with `shared_gate_proj` and `shared_up_proj` for `shared_w13`.
    """
    own, tp_rank = _experts_of_sets(spec, comm, slots), comm.coordinates["tp"]
    found = _kept_of_shared(spec, shapes, comm)
    for index, experts in enumerate(own):
        for name in EXPERT_NAMES:
            full = f"{name}.{index}" if len(own) > 1 else name
            if full in shapes:
                found[full] = kept_runs(name, shapes[full], gate_up, experts, tp_rank, comm.layout.tp)
    return {name: runs for name, runs in found.items() if runs}


def _experts_of_sets(spec: MoESpec, comm: Comm, slots: SlotMap) -> list[list[int] | None]:
    """The experts of this rank in each modality set, counted within the set, by slot; None where it has all in order."""
    sets = spec.routing.modalities
    if comm.layout.ep == 1 and slots.plain:
        return [None] * sets
    size, per_set, mine = spec.num_experts // sets, slots.per_rank // sets, slots.slots[comm.coordinates["ep"]]
    each = [mine[index * per_set : (index + 1) * per_set] for index in range(sets)]
    return [[e - index * size if e >= 0 else -1 for e in one] for index, one in enumerate(each)]


_SHARED = {  # the dimension that is the intermediate width, and whether gate and up lie along it
    "shared_w13": (-2, True),
    "shared_gate_proj": (-2, False),
    "shared_up_proj": (-2, False),
    "shared_w2": (-1, False),
    "shared_b13": (-1, True),
    "shared_gate_proj_bias": (-1, False),
    "shared_up_proj_bias": (-1, False),
}


def _kept_of_shared(spec: MoESpec, shapes: Mapping[str, Shape], comm: Comm) -> dict[str, dict[int, Runs]]:
    """The slice of the shared experts' intermediate width, padded with zeros where it does not divide."""
    layout = comm.layout
    if spec.shared is None or not layout.shards_shared:
        return {}
    rank, size, gated = comm.index(layout.split_axes), layout.ep * layout.tp, spec.shared.gated
    return {
        name: {dim % len(shapes[name]): width_runs(shapes[name][dim], rank, size, parts=2 if both and gated else 1)}
        for name, (dim, both) in _SHARED.items()
        if name in shapes
    }
