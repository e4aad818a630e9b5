"""`patch` and `unpatch`: moerunner inside a Transformers model, whose modules, names and tensors stay its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

from torch import nn

from moerunner.errors import PlanError, ReferenceWarning, UnsupportedError, WeightsError
from moerunner.experts import registry
from moerunner.models import reference
from moerunner.models.block import Changed, forward_of, slot_of
from moerunner.models.load import load as load  # callers find it here too
from moerunner.models.prepare import copied_bytes, prepare, sites
from moerunner.models.report import Replaced, Report, Skipped
from moerunner.parallel.layout import Layout
from moerunner.plan import Options
from moerunner.runner import MoERunner


def patch(model: nn.Module, layout: Layout | None = None, backend: str = "auto") -> Report:
    """Has moerunner run every MoE block of a model, in place; a block that cannot be run is left as it is and reported.

    Only the `forward` of the blocks is replaced, and weights are read from the model's own tensors at each call: names,
    hooks, saving, training, copies of the model, `.to()` go on as before. A block that is changed later in a way that the
    runner cannot honour (an adapter, a hook on its experts) warns and runs its own forward. Patching twice changes nothing.
    One whose source in Transformers is none that its family was verified with is run, with a `ReferenceWarning`.

    Args:
        model: a Transformers model, or any module that contains blocks of a known family.
        layout: one rank, or None. backend: of the experts, or "auto".

    Raises:
        SpecError: a config has a key that may change the layer and that the family's entry does not know.
        UnsupportedError: the layout has several ranks, or no backend has this name. In all cases the model is as it was.
    """
    _one_rank(layout)
    if backend != "auto":
        registry.get(backend)
    report, ready = Report(), []
    changed: dict[str, set[str]] = {}
    for site in sites(model):
        block, present = site.block, forward_of(site.block)
        try:
            forward = present or prepare(site, Options(backend=backend))
            source, runner = forward.source, forward.runner
            copied = copied_bytes(source(), block)
        except (UnsupportedError, PlanError, WeightsError, Changed) as reason:
            report.skipped.append(Skipped(site.name, str(reason)))
            continue
        if present is None:
            ready.append((block, forward))
        changed.setdefault(source.family.name, set()).update(reference.unknown(source.family, block))
        report.replaced.append(
            Replaced(site.name, source.family.name, runner.plan.backend, copied, already=present is not None)
        )
    for block, forward in ready:
        setattr(block, slot_of(block), forward)
    report.notes.extend(reference.warning(family, sorted(classes)) for family, classes in changed.items() if classes)
    for note in report.notes:
        warnings.warn(note, ReferenceWarning, stacklevel=2)
    return report


def unpatch(model: nn.Module) -> None:
    """Gives every patched block its own forward back. A model that is not patched stays as it is."""
    for block in model.modules():
        if forward_of(block) is None:
            continue
        if slot_of(block) == "forward":
            del block.forward
        else:
            setattr(block, slot_of(block), MethodType(type(block).forward, block))


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Patch and unpatch inside as you like: afterwards each block runs what it ran before, with the same runner."""
    before = [(block, forward) for block in model.modules() if (forward := forward_of(block)) is not None]
    try:
        yield
    finally:
        unpatch(model)
        for block, forward in before:
            setattr(block, slot_of(block), forward)


def runners(model: nn.Module) -> dict[str, MoERunner]:
    """The runner of every patched block, by the block's name."""
    found = {name: forward_of(block) for name, block in model.named_modules()}
    return {name: forward.runner for name, forward in found.items() if forward is not None}


def routers(model: nn.Module) -> dict[str, str | None]:
    """The path of the router inside every patched block, by the block's name; None where it has none of its own."""
    found = {name: forward_of(block) for name, block in model.named_modules()}
    families = {name: forward.source.family for name, forward in found.items() if forward is not None}
    return {name: family.router.path if family.router else None for name, family in families.items()}


def _one_rank(layout: Layout | None) -> None:
    if layout is not None and layout.world > 1:
        raise UnsupportedError(
            f"a model can be run on one rank only, not on {layout.world}",
            where="layout",
            next_step="Use MoERunner with a bound layout for a single layer",
        )
