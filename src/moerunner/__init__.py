"""moerunner: the Mixture-of-Experts layers of any model, right on every layout and at the speed of the hardware.

Names are imported on first use, so that `moerunner --help` needs no torch and `import moerunner` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moerunner import announce

if TYPE_CHECKING:
    from moerunner.errors import (
        CheckpointError,
        DistributedError,
        MoEError,
        PlanError,
        ReferenceWarning,
        SpecError,
        UnsupportedError,
        WeightsError,
    )
    from moerunner.experts import fused_experts
    from moerunner.generate import Generated, generate
    from moerunner.models import (
        Rebalanced,
        Replaced,
        Report,
        Skipped,
        count_loads,
        load,
        load_weights,
        patch,
        rebalance,
        unpatch,
    )
    from moerunner.parallel import Layout
    from moerunner.plan import Options, Plan, resolve
    from moerunner.runner import MoERunner
    from moerunner.spec import (
        ActivationSpec,
        Custom,
        ExpertsSpec,
        GroupSpec,
        Linear,
        MoESpec,
        RMSNorm,
        RoutingSpec,
        SharedSpec,
        TransformSpec,
    )
    from moerunner.values import ExpertWeights, LayerWeights, TopK

__version__ = "0.1.0"

__all__ = [
    "ActivationSpec",
    "CheckpointError",
    "Custom",
    "DistributedError",
    "ExpertWeights",
    "ExpertsSpec",
    "Generated",
    "GroupSpec",
    "LayerWeights",
    "Layout",
    "Linear",
    "MoEError",
    "MoERunner",
    "MoESpec",
    "Options",
    "Plan",
    "PlanError",
    "RMSNorm",
    "Rebalanced",
    "ReferenceWarning",
    "Replaced",
    "Report",
    "RoutingSpec",
    "SharedSpec",
    "Skipped",
    "SpecError",
    "TopK",
    "TransformSpec",
    "UnsupportedError",
    "WeightsError",
    "count_loads",
    "fused_experts",
    "generate",
    "load",
    "load_weights",
    "patch",
    "rebalance",
    "resolve",
    "unpatch",
]

_HOME = {
    "errors": "CheckpointError DistributedError MoEError PlanError ReferenceWarning SpecError UnsupportedError WeightsError",
    "experts": "fused_experts",
    "generate": "Generated generate",
    "models": "Rebalanced Replaced Report Skipped count_loads load load_weights patch rebalance unpatch",
    "parallel": "Layout",
    "plan": "Options Plan resolve",
    "runner": "MoERunner",
    "spec": "ActivationSpec Custom ExpertsSpec GroupSpec Linear MoESpec RMSNorm RoutingSpec SharedSpec TransformSpec",
    "values": "ExpertWeights LayerWeights TopK",
}
_module_of = {name: module for module, names in _HOME.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _module_of:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"moerunner.{_module_of[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


announce.install()
