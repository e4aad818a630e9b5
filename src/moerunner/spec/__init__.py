"""What an MoE layer computes, as frozen data. No torch here.

A spec says nothing about machines, kernels or file names. It goes to JSON and back without loss, and every impossible
value is refused when it is built. Sizes are counts of elements.
"""

from moerunner.spec.layer import SPEC_VERSION, MoESpec
from moerunner.spec.parts import (
    ActivationSpec,
    Custom,
    ExpertsSpec,
    GroupSpec,
    Linear,
    RMSNorm,
    RoutingSpec,
    SharedSpec,
    TransformSpec,
)

__all__ = [
    "SPEC_VERSION",
    "ActivationSpec",
    "Custom",
    "ExpertsSpec",
    "GroupSpec",
    "Linear",
    "MoESpec",
    "RMSNorm",
    "RoutingSpec",
    "SharedSpec",
    "TransformSpec",
]
