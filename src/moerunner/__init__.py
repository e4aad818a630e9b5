"""moerunner: the Mixture-of-Experts layers of any model, right on every layout and at the speed of the hardware."""

from moerunner.errors import (
    CheckpointError,
    DistributedError,
    MoEError,
    PlanError,
    SpecError,
    UnsupportedError,
    WeightsError,
)
from moerunner.experts import fused_experts
from moerunner.models import Replaced, Report, Skipped, load, patch, unpatch
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
    "fused_experts",
    "load",
    "patch",
    "resolve",
    "unpatch",
]
