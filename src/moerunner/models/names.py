"""From the names in a checkpoint to the places in a model, by Transformers' own table of conversions, read as data.

Transformers describes every checkpoint format by renamings and by lists of operations (merge a list of experts, then
concatenate gate and up; transpose; ...), and reverses them to save. Here the operations are carried out on shapes (see
places.py), so that each stored tensor can go straight to its place; one that is not known here is left to Transformers, which
converts its group of tensors in one piece.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from moerunner.models.places import Laid, Part, Shape, Unfit, concatenate, evens_then_odds, split, stack, transpose, whole

_Given = dict[str, list[Laid] | Laid]


@dataclass
class Group:
    """The stored tensors that together give some tensors of the model.

    sources: their names by the pattern of the conversion that they match; just one name if there is no conversion.
    """

    target: str
    conversion: Any = None
    sources: dict[str, list[str]] = field(default_factory=dict)

    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]

    def convert(self, read: Callable[[str], torch.Tensor], naming: Naming) -> dict[str, torch.Tensor]:
        """The group's tensors of the model, as Transformers converts them: all of its sources are in memory at once."""
        given = {pattern: [read(name) for name in names] for pattern, names in self.sources.items()}
        for operation in self.conversion.operations:
            given = operation.convert(
                given,
                source_patterns=self.conversion.source_patterns,
                target_patterns=self.conversion.target_patterns,
                full_layer_name=self.target,
                model=naming.model,
                config=naming.model.config,
                missing_keys=None,
            )
        values = {name: value[0] if isinstance(value, list) else value for name, value in given.items()}
        return _full_names(values, self.target)


@dataclass
class Arrangement:
    """Where every stored tensor goes, and what is wrong.

    parts: for each stored tensor, the model's tensors and the boxes in them. whole: groups that are converted in one piece.
    led_by: for each of the model's tensors, the first one of its group, whose dtype rules the group.
    """

    parts: dict[str, list[tuple[str, Part]]] = field(default_factory=dict)
    whole: list[Group] = field(default_factory=list)
    led_by: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    misshapen: dict[str, str] = field(default_factory=dict)


class Naming:
    """The names and shapes of one model's tensors, and what they are called in files.

    model: a Transformers model, or a module that names its tensors as files do; with or without data. It is not changed.
    shapes: of the whole tensors of which the model holds a part.
    """

    def __init__(self, model: Any, shapes: Mapping[str, Shape] | None = None) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.model = model
        self.wanted: dict[str, Any] = {name: t for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
        for name, shape in (shapes or {}).items():
            self.wanted[name] = torch.empty(shape, dtype=self.wanted[name].dtype, device="meta")
        self.rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in self.rules if isinstance(rule, WeightRenaming)]
        self._conversions = [rule for rule in self.rules if isinstance(rule, WeightConverter)]
        self._by_pattern = {pattern: rule for rule in self._conversions for pattern in rule.source_patterns}
        self._tied = _ties(model)
        self.may_be_missing = _any_of(getattr(model, "_keys_to_ignore_on_load_missing", None))
        self.may_be_extra = _any_of({*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_moved(model)})

    def find(self, name: str) -> tuple[str, Any, str]:
        """The model's tensor that a stored one belongs to, the conversion in between or None, and the pattern it matches."""
        from transformers.core_model_loading import rename_source_key

        prefix = getattr(self.model, "base_model_prefix", None) or None
        target, pattern = rename_source_key(name, self._renamings, self._conversions, prefix, self.wanted)
        if target not in self.wanted and name in self.wanted:
            target, pattern = rename_source_key(name, [], [], prefix, self.wanted)
        return target, self._by_pattern[pattern] if pattern is not None else None, pattern or ""

    @cached_property
    def expected(self) -> dict[str, Shape]:
        """What `save_pretrained` would call the model's tensors, and their shapes; empty if that cannot be said."""
        from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

        empty = {name: torch.empty(t.shape, device="meta", dtype=t.dtype) for name, t in self.wanted.items()}
        try:
            names = revert_weight_conversion(self.model, empty)
        except Exception:  # noqa: BLE001 - an operation may not know how to go back; then names are told as the model has them
            return {}
        return {name: tuple(names[name].shape) for name in sorted(names, key=dot_natural_key)}

    @cached_property
    def _expected_of(self) -> dict[str, list[str]]:
        """The names in `expected` by the tensor that `find` gives for them."""
        found: dict[str, list[str]] = {}
        for name in self.expected:
            found.setdefault(self.find(name)[0], []).append(name)
        return found

    def arrange(self, shapes: Mapping[str, Shape], *, all_there: bool = True) -> Arrangement:
        """Places for stored tensors. all_there: those of the model that get none are a fault."""
        from transformers.core_model_loading import dot_natural_key

        found, groups = Arrangement(), {}
        for name in sorted(shapes, key=dot_natural_key):  # the order that the rules count on
            target, conversion, pattern = self.find(name)
            if target not in self.wanted:
                (found.ignored if self.may_be_extra(target) else found.extra).append(name)
                continue
            group = groups.setdefault(target, Group(target, conversion))
            if group.sources and (conversion is None or group.conversion is not conversion):
                found.doubled += [name, *(n for n in group.names() if n not in found.doubled)]
                continue
            group.sources.setdefault(pattern, []).append(name)
        for group in groups.values():
            self._place(group, shapes, found)
        if all_there:
            blamed = {self.find(n)[0] for n in (*found.missing, *found.extra, *found.doubled, *found.misshapen)}
            found.missing += self.stored_names(n for n in self.without(found.led_by) if n not in blamed)
        found.absent = [name for name in self.wanted if name not in found.led_by]
        return found

    def _place(self, group: Group, shapes: Mapping[str, Shape], found: Arrangement) -> None:
        try:
            laid = self._lay(group, shapes)
        except NotImplementedError:
            found.whole.append(group)
            targets = _full_names(dict.fromkeys(group.conversion.target_patterns), group.target)
            found.led_by |= {name: group.target for name in targets if name in self.wanted}
            return
        except Unfit as reason:
            self._explain(group, shapes, str(reason), found)
            return
        for name, tensor in laid.items():
            if name not in self.wanted or name in found.led_by:
                (found.extra if name not in self.wanted else found.doubled).extend(group.names())
                return
            if tensor.shape != tuple(self.wanted[name].shape):
                reason = f"is {list(tensor.shape)}, the config asks for {list(self.wanted[name].shape)}"
                self._explain(group, shapes, reason, found)
                return
        for name, tensor in laid.items():
            found.led_by[name] = group.target
            for part in tensor.parts:
                found.parts.setdefault(part.source, []).append((name, part))

    def _lay(self, group: Group, shapes: Mapping[str, Shape]) -> dict[str, Laid]:
        if group.conversion is None:
            (name,) = group.names()
            return {group.target: whole(name, shapes[name])}
        given: _Given = {}
        for pattern, names in group.sources.items():
            if not _counts_up(names):
                raise Unfit("its list of tensors has gaps")
            given[pattern] = [whole(name, shapes[name]) for name in names]
        for operation in group.conversion.operations:
            verb = _VERBS.get(type(operation).__name__)
            if verb is None:
                raise NotImplementedError
            given = verb(operation, given, group, self)
        return _full_names({name: _one(value) for name, value in given.items()}, group.target)

    def _explain(self, group: Group, shapes: Mapping[str, Shape], reason: str, found: Arrangement) -> None:
        """Names the tensors that are at fault in a group, by comparing with what would be saved."""
        if group.conversion is None:
            found.misshapen[group.names()[0]] = reason
            return
        there, expected = group.names(), self._expected_of.get(group.target, [])
        missing = [name for name in expected if name not in there]
        extra = [name for name in there if name not in expected]
        wrong = [name for name in there if name in expected and shapes[name] != self.expected[name]]
        found.missing += missing
        found.extra += extra
        for name in wrong:
            found.misshapen[name] = f"is {list(shapes[name])}, the config asks for {list(self.expected[name])}"
        if not (missing or extra or wrong):
            found.misshapen[there[0]] = reason

    def without(self, there: Collection[str]) -> list[str]:
        """The model's tensors that would be left without a value: not there, nor tied to one that is, nor optional."""
        lost = [name for name in self.wanted if name not in there and not self.may_be_missing(name)]
        return [name for name in lost if not any(other in there for other in self._tied.get(name, ()))]

    def stored_names(self, wanted: Iterable[str]) -> list[str]:
        """What the files call these tensors of the model."""
        names: list[str] = []
        for target in wanted:
            names += self._expected_of.get(target, [target])
        return names


def _one(value: list[Laid] | Laid) -> Laid:
    if isinstance(value, Laid):
        return value
    if len(value) != 1:
        raise Unfit(f"{len(value)} tensors stand where one belongs")
    return value[0]


def _full_names(values: dict[str, Any], target: str) -> dict[str, Any]:
    """The results of a conversion, which bear the names of patterns, under the model's names."""
    for pattern in values:
        if pattern in target:
            before, _, after = target.partition(pattern)
            return {before + name + after: value for name, value in values.items()}
    return values


def _counts_up(names: list[str]) -> bool:
    """Whether names that differ do so by one number, which counts up from 0."""
    if len(names) == 1:
        return True
    parts = [name.split(".") for name in names]
    differing = [place for place in zip(*parts, strict=False) if len(set(place)) > 1]
    same_length = len({len(p) for p in parts}) == 1
    return same_length and len(differing) == 1 and list(differing[0]) == [str(i) for i in range(len(names))]


def _merge(operation: Any, given: _Given, group: Group, _: Naming) -> _Given:
    if len(given) == 1:
        return {group.conversion.target_patterns[0]: stack(_list(given)[0], operation.dim)}
    return {pattern: stack(value if isinstance(value, list) else [value], operation.dim) for pattern, value in given.items()}


def _concatenate(operation: Any, given: _Given, group: Group, _: Naming) -> _Given:
    tensors: list[Laid] = []
    for pattern in group.conversion.source_patterns:
        value = given.get(pattern, [])
        tensors += value if isinstance(value, list) else [value]
    (name,) = group.conversion.target_patterns
    return {name: concatenate(tensors, operation.dim)}


def _chunk(operation: Any, given: _Given, group: Group, _: Naming) -> _Given:
    if operation.num_shards_attribute is not None:
        raise NotImplementedError
    tensor, names = _only(given), group.conversion.target_patterns
    size = math.ceil(tensor.shape[operation.dim] / len(names)) if tensor.shape else 0
    if size * len(names) != (tensor.shape[operation.dim] if tensor.shape else 1):
        raise Unfit(f"{list(tensor.shape)} cannot be cut into {len(names)} along dimension {operation.dim}")
    return dict(zip(names, split(tensor, [size] * len(names), operation.dim), strict=True))


def _split(operation: Any, given: _Given, group: Group, naming: Naming) -> _Given:
    names = group.conversion.target_patterns
    targets = [group.target.replace(names[0], name) for name in names]
    if any(target not in naming.wanted for target in targets):
        raise Unfit(f"{group.target} belongs to tensors that the model does not have")
    sizes = [naming.wanted[target].shape[operation.dim] for target in targets]
    return dict(zip(names, split(_only(given), sizes, operation.dim), strict=True))


def _transpose(operation: Any, given: _Given, group: Group, naming: Naming) -> _Given:
    tensor, targets = _only(given), group.conversion.target_patterns
    name = targets[0] if len(targets) == 1 else group.conversion.source_patterns[0]
    if operation.check_dims and tensor.shape == tuple(naming.wanted[group.target].shape):
        return {name: tensor}
    return {name: transpose(tensor, operation.dim0, operation.dim1)}


def _interleave(operation: Any, given: _Given, group: Group, _: Naming) -> _Given:
    if operation.inverse:
        raise NotImplementedError
    return {group.conversion.target_patterns[0]: evens_then_odds(_only(given), operation.dim)}


def _text_and_vision(operation: Any, given: _Given, group: Group, _: Naming) -> _Given:
    """Each list of experts is cut into one list per target; a target stacks its pieces and concatenates them."""
    patterns, targets = group.conversion.source_patterns, group.conversion.target_patterns
    if any(pattern not in given for pattern in patterns):
        raise Unfit(f"only {', '.join(sorted(given))} are there")
    joined: dict[str, list[Laid]] = {name: [] for name in targets}
    for pattern in patterns:
        tensors = _list({pattern: given[pattern]})[0]
        size = math.ceil(len(tensors) / len(targets))
        for index, name in enumerate(targets):
            joined[name].append(stack(tensors[index * size : (index + 1) * size], operation.stack_dim))
    return {name: concatenate(pieces, operation.concat_dim) for name, pieces in joined.items()}


# By the name of the class, as releases of Transformers differ in which there are.
_VERBS: dict[str, Callable[[Any, _Given, Group, Naming], _Given]] = {
    "Chunk": _chunk,
    "Concatenate": _concatenate,
    "ErnieFuseAndSplitTextVisionExperts": _text_and_vision,
    "Interleave": _interleave,
    "MergeModulelist": _merge,
    "Split": _split,
    "Transpose": _transpose,
}


def _list(given: _Given) -> list[list[Laid]]:
    return [value if isinstance(value, list) else [value] for value in given.values()]


def _only(given: _Given) -> Laid:
    if len(given) != 1:
        raise Unfit(f"{len(given)} kinds of tensors stand where one belongs")
    return _one(next(iter(given.values())))


def _ties(model: Any) -> dict[str, set[str]]:
    """For each tensor that is tied to others by the model's definition, all of them."""
    sets: dict[str, set[str]] = {}
    for one, other in getattr(model, "all_tied_weights_keys", {}).items():
        joined = sets.get(one, {one}) | sets.get(other, {other})
        sets |= dict.fromkeys(joined, joined)
    return sets


def _moved(model: Any) -> list[str]:
    """Tensors that old files hold and that models compute now."""
    names = [name for name, _ in model.named_buffers()]
    patterns = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
    return [pattern for end, pattern in patterns.items() if any(name.endswith(end) for name in names)]


def _any_of(patterns: Iterable[str] | None) -> Callable[[str], bool]:
    if not patterns:
        return lambda name: False
    found = re.compile("|".join(f"({pattern})" for pattern in patterns))
    return lambda name: found.search(name) is not None
