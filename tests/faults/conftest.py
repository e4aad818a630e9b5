"""What the sections of docs/faults.md share as fixtures."""

import importlib

import pytest


@pytest.fixture(params=["one launch", "PyTorch"])
def both_routes(request, monkeypatch):
    """Layers route by the kernels that their plan prefers, then by PyTorch's operators."""
    if request.param == "PyTorch":
        monkeypatch.setattr(importlib.import_module("moerunner.plan.resolve"), "_ONE_LAUNCH", {})
