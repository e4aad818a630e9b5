"""A model that is running while other weights are written into its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moerunner.errors import CheckpointError, UnsupportedError
from moerunner.models.fill import Filling, check, check_kind
from moerunner.models.names import Arrangement
from moerunner.models.places import Part, whole

_WHERE = "the weights that came"
_AGAIN = "The model now has some weights old and some new: load all of them again"


class Live:
    """The tensors of a model that holds data, as places to write to.

    Where two names share a tensor, the second one that is written gets a place of its own, to be compared at the end.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        for name, tensor in self._tensors.items():
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
                kind = "without data" if tensor.is_meta else f"a {type(tensor).__name__}"
                raise UnsupportedError(f"is {kind}; only plain tensors can be given new weights", where=name)
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}
        self.device = next((tensor.device for tensor in self._tensors.values()), torch.device("cpu"))
        self._first: dict[int, str] = {}
        self._second: list[tuple[str, str, Tensor]] = []

    def place(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        first = self._first.setdefault(id(tensor), name)
        if first == name:
            return tensor.detach()  # shares the data and the count of changes, and needs no gradient
        copy = torch.empty_like(tensor)
        self._second.append((first, name, copy))
        return copy

    def compare_tied(self) -> None:
        for first, second, copy in self._second:
            if not torch.equal(self._tensors[first], copy):
                raise CheckpointError(
                    f"{first} and {second} are one tensor in the model, and differ", where=_WHERE, next_step=_AGAIN
                )


def take(filling: Filling, live: Live, source: Iterable[tuple[str, Tensor]]) -> None:
    """Writes tensors as they come, to where they would be in a checkpoint that this model saves, or under their own names.

    Others, which belong to a conversion, are copied and kept until all have come.
    """
    naming, came = filling.naming, Counter[str]()
    shapes = {name: shape for name, shape in naming.expected.items() if naming.find(name)[0] in naming.wanted}
    places = naming.arrange(shapes, all_there=False).parts
    wrong, later, seen = Arrangement(), {}, set()
    for name, tensor in source:
        if name in seen:
            wrong.doubled.append(name)
            continue
        seen.add(name)
        if name not in places:
            target, conversion, _ = naming.find(name)
            if target not in naming.wanted:
                (wrong.ignored if naming.may_be_extra(target) else wrong.extra).append(name)
                continue
            if conversion is not None:
                later[name] = tensor.clone()
                continue
            shapes[name] = tuple(naming.wanted[target].shape)
            places[name] = [(target, part) for part in whole(name, shapes[name]).parts]
        if tuple(tensor.shape) != shapes[name]:
            wrong.misshapen[name] = f"is {list(tensor.shape)}, the model has {list(shapes[name])}"
            continue
        check_kind(name, tensor.dtype, live.dtypes[places[name][0][0]], _WHERE)
        _write(filling, came, places[name], tensor)
    _take_together(filling, live, came, later, wrong)
    sizes = {name: tensor.numel() for name, tensor in naming.wanted.items()}
    wrong.doubled += [name for name, size in sizes.items() if came[name] > size]
    lost = naming.without([name for name, size in sizes.items() if came[name] >= size])
    wrong.missing += [name for name in naming.stored_names(lost) if name not in seen]
    check(wrong, _WHERE, _AGAIN)
    filling.finish([name for name in sizes if came[name]], _WHERE)


def _write(filling: Filling, came: Counter[str], parts: list[tuple[str, Part]], tensor: Tensor) -> None:
    """came: how many numbers of each of the model's whole tensors have come, those too of which this rank keeps nothing."""
    for name, part in parts:
        came[name] += part.numel
    filling.write(filling.kept(parts), tuple(slice(0, size) for size in tensor.shape), tensor)


def _take_together(filling: Filling, live: Live, came: Counter[str], later: dict[str, Tensor], wrong: Arrangement) -> None:
    arranged = filling.naming.arrange({name: tuple(tensor.shape) for name, tensor in later.items()}, all_there=False)
    for name, parts in arranged.parts.items():
        check_kind(name, later[name].dtype, live.dtypes[parts[0][0]], _WHERE)
        _write(filling, came, parts, later[name])
    for group in arranged.whole:
        came.update({name: filling.naming.wanted[name].numel() for name in filling.write_group(group, later.__getitem__)})
    wrong.missing += arranged.missing
    wrong.extra += arranged.extra
    wrong.doubled += arranged.doubled
    wrong.misshapen |= arranged.misshapen
