"""Expert backends, one file each, and the registry that picks one and says why."""

from moerunner.experts.functional import fused_experts
from moerunner.experts.registry import Chosen, available, choose, register

__all__ = ["Chosen", "available", "choose", "fused_experts", "register"]
