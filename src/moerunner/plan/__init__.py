"""The plan of one layer: which steps run, in which order, with which kernels, checked before anything runs."""

from moerunner.plan.options import Options
from moerunner.plan.plan import Plan
from moerunner.plan.resolve import resolve
from moerunner.plan.steps import Step

__all__ = ["Options", "Plan", "Step", "resolve"]
