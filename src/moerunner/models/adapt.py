"""`patch` and `unpatch`: moerunner inside a Transformers model, whose modules, names and tensors stay its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType

from torch import nn

from moerunner.errors import PlanError, ReferenceWarning, UnsupportedError, WeightsError
from moerunner.experts import registry
from moerunner.models import reference
from moerunner.models.block import Changed, PatchedForward, forward_of, slot_of
from moerunner.models.load import load as load  # callers find it here too
from moerunner.models.prepare import copied_bytes, prepare, sites
from moerunner.models.report import Replaced, Report, Skipped
from moerunner.models.shards import bound_to, cut_in_place, refuse_saving
from moerunner.parallel.balance import LoadCounter
from moerunner.parallel.layout import BoundLayout, Layout
from moerunner.plan import Options
from moerunner.runner import MoERunner


def patch(model: nn.Module, layout: Layout | BoundLayout | None = None, backend: str = "auto") -> Report:
    """Has moerunner run every MoE block of a model, in place; a block that cannot be run is left as it is and reported.

    Only the `forward` of the blocks is replaced, and weights are read from the model's own tensors at each call: names,
    hooks, saving, training, copies of the model, `.to()` go on as before. A block that is changed later in a way that the
    runner cannot honour (an adapter, a hook on its experts) warns and runs its own forward. Patching twice changes nothing.
    One whose source in Transformers is none that its family was verified with is run, with a `ReferenceWarning`.

    On several ranks every rank calls it with the same whole model, and keeps its part of the experts: their parameters have
    the shapes of the part from then on, and the rest is freed. All else stays whole; a block that is left as it is runs whole
    on every rank. Such a model can neither be saved nor unpatched, and a block of it that is changed later raises.

    A model that Transformers itself has spread over ranks (`DistributedConfig` with tp_size, or ep_size equal to it) is patched
    as it is, without a layout, by every rank: the blocks run on its DTensors and process groups, with one all-reduce each.

    Args:
        model: a Transformers model, or any module that contains blocks of a known family.
        layout: who holds what, None for one rank. A `Layout` of several ranks is bound as `Layout.bind()` does it. The ranks of
            one copy are called with the same inputs. backend: of the experts, or "auto".

    Raises:
        SpecError: a config has a key that may change the layer and that the family's entry does not know.
        UnsupportedError: the layout shards tokens or is another than the model is patched with, or no backend has this name.
        DistributedError: there are no processes for the layout. In all cases the model is as it was.
    """
    if backend != "auto":
        registry.get(backend)
    return install(model, Options(backend=backend), bound_to(layout), {})


def install(model: nn.Module, options: Options, layout: BoundLayout | None, cut: Mapping[nn.Module, PatchedForward]) -> Report:
    """What `patch` does. cut: forwards of blocks that hold this rank's part of their tensors already."""
    report, found, new = Report(layout=layout and layout.layout, rank=layout.comm.rank if layout else 0), [], []
    for site in sites(model):
        present = forward_of(site.block)
        if present is not None:
            _same_ranks(present, layout, site.name)
        try:
            forward = present or cut.get(site.block) or prepare(site, options, layout)
            if present is not None or layout is None:
                _ = forward.source(), forward.runner  # what is wrong with a whole block is told now
        except (UnsupportedError, PlanError, WeightsError, Changed) as reason:
            report.skipped.append(Skipped(site.name, str(reason)))
            continue
        found.append((site, forward, present is not None))
        new += [forward.source] * (present is None and site.block not in cut)
    cut_in_place(new)
    changed: dict[str, set[str]] = {}
    for site, forward, already in found:
        source, block = forward.source, site.block
        copied, backend = copied_bytes(source(), block), forward.runner.plan.backend
        setattr(block, slot_of(block), forward)
        if source.is_cut:
            for owner in (block, *site.owners):
                if hasattr(owner, "save_pretrained"):
                    owner.save_pretrained = refuse_saving
        changed.setdefault(source.family.name, set()).update(reference.unknown(source.family, block))
        report.replaced.append(Replaced(site.name, source.family.name, backend, copied, already=already))
    report.notes.extend(reference.warning(family, sorted(classes)) for family, classes in changed.items() if classes)
    for note in report.notes:
        warnings.warn(note, ReferenceWarning, stacklevel=3)
    return report


def unpatch(model: nn.Module) -> None:
    """Gives every patched block its own forward back. A model that is not patched stays as it is.

    Raises:
        UnsupportedError: this rank holds a part of the experts, or holds them quantised; a block's own forward cannot run so.
    """
    for block in model.modules():
        forward = forward_of(block)
        if forward is not None and forward.source.is_cut:
            what = f"{forward.source.holds}, with which a block's own forward cannot run"
            raise UnsupportedError(what, where="unpatch", next_step="Load the model without a layout and not quantised")
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


def count_loads(model: nn.Module) -> dict[str, LoadCounter]:
    """Has the runner of every patched block count how often each expert is chosen, from zero on; its counter by the block's
    name."""
    found = runners(model)
    for runner in found.values():
        runner.loads = LoadCounter(runner.spec.num_experts)
    return {name: runner.loads for name, runner in found.items() if runner.loads is not None}


def routers(model: nn.Module) -> dict[str, str | None]:
    """The path of the router inside every patched block, by the block's name; None where it has none of its own."""
    found = {name: forward_of(block) for name, block in model.named_modules()}
    families = {name: forward.source.family for name, forward in found.items() if forward is not None}
    return {name: family.router.path if family.router else None for name, family in families.items()}


def _same_ranks(present: PatchedForward, layout: BoundLayout | None, where: str) -> None:
    """Raises unless a patched block is one for the layout that is asked for; None asks for none."""
    here = present.layout.layout if present.layout is not None else Layout()
    if layout is not None and layout.layout != here:
        what = f"is patched for {here}, not for {layout.layout}"
        raise UnsupportedError(what, where=where, next_step="Load the model anew with the other layout")
