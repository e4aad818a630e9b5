"""Model families as data, and moerunner inside the models that have them."""

from moerunner.models import families, registry
from moerunner.models.adapt import count_loads, patch, runners, unpatch
from moerunner.models.balance import Rebalanced, rebalance
from moerunner.models.entry import Family, Joined, Keys, Router, View
from moerunner.models.load import load, load_weights
from moerunner.models.report import Replaced, Report, Skipped

__all__ = [
    "Family",
    "Joined",
    "Keys",
    "Rebalanced",
    "Replaced",
    "Report",
    "Router",
    "Skipped",
    "View",
    "count_loads",
    "families",
    "load",
    "load_weights",
    "patch",
    "rebalance",
    "registry",
    "runners",
    "unpatch",
]
