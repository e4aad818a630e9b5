"""A pytest plugin for Transformers' own tests: writes every outcome to a file and, if asked, patches every model.

It takes part in pytest through `-p upstream_plugin`. MOERUNNER_UPSTREAM_OUT names the file; MOERUNNER_UPSTREAM_PATCH=1 has
`moerunner.patch` called on each model once it is made: after the outermost `__init__`; after `from_pretrained`, where
tensors get their data; and at `eval()`, for blocks that do in training what the runner does not.
"""

import functools
import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

import moerunner
from moerunner.errors import MoEError

OUTCOMES: dict[str, tuple[str, str]] = {}
REPLACED: Counter[str] = Counter()
LEFT: Counter[str] = Counter()

# What the source distribution leaves out of its own tests folder.
ABSENT = {"tests.exporters.test_export": "ExportTesterMixin", "tests.generation.test_utils": "GenerationTesterMixin"}


def pytest_configure() -> None:
    for name, mixin in ABSENT.items():
        if not (Path.cwd() / name.replace(".", "/")).with_suffix(".py").exists():
            package, module = ModuleType(name.rpartition(".")[0]), ModuleType(name)
            package.__path__ = []
            setattr(module, mixin, type(mixin, (), {}))
            sys.modules |= {package.__name__: package, name: module}
    if os.environ.get("MOERUNNER_UPSTREAM_PATCH") == "1":
        patch_every_model()


def patch_every_model() -> None:
    base: Any = transformers.PreTrainedModel
    prepare_class, load = base.__init_subclass__.__func__, base.from_pretrained.__func__

    def prepare_and_wrap(cls: type, **kwargs: Any) -> None:
        prepare_class(cls, **kwargs)
        own = cls.__dict__.get("__init__")
        if own is not None:
            cls.__init__ = wrapped(own)  # pyright: ignore[reportAttributeAccessIssue]

    def wrapped(init: Any) -> Any:
        @functools.wraps(init)
        def make(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            if type(self).__init__ is make:  # not a subclass's, which goes on
                patch(self)

        return make

    def load_and_patch(cls: type, *args: Any, **kwargs: Any) -> Any:
        loaded = load(cls, *args, **kwargs)
        patch(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def eval_and_patch(model: Any) -> Any:
        model = torch.nn.Module.eval(model)
        patch(model)
        return model

    base.eval = eval_and_patch
    base.__init_subclass__ = classmethod(prepare_and_wrap)
    base.from_pretrained = classmethod(load_and_patch)


def patch(model: Any) -> None:
    try:
        report = moerunner.patch(model)
    except MoEError as error:
        LEFT[str(error)] += 1
        return
    REPLACED.update(block.family for block in report.replaced if not block.already)
    LEFT.update(block.reason for block in report.skipped)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test's outcome is the worst of its subtests', which come under its name, and its own."""
    was = OUTCOMES.get(report.nodeid, ("passed", ""))[0]
    if was != "failed" and (report.when == "call" or report.outcome != "passed"):
        crash = getattr(report.longrepr, "reprcrash", None)
        OUTCOMES[report.nodeid] = (report.outcome, crash.message if crash else str(report.longrepr or ""))


def pytest_warning_recorded(warning_message: Any) -> None:
    if str(warning_message.message).startswith("a patched "):
        LEFT[str(warning_message.message)] += 1


def pytest_sessionfinish() -> None:
    found = {"outcomes": OUTCOMES, "replaced": REPLACED, "left": LEFT}
    Path(os.environ["MOERUNNER_UPSTREAM_OUT"]).write_text(json.dumps(found, indent=1))
