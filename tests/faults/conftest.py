"""What the sections of docs/faults.md share as fixtures."""

import pytest

from moerunner.plan.kernels import ONE_LAUNCH


@pytest.fixture(params=["one launch", "PyTorch"])
def both_routes(request, monkeypatch):
    """Layers route by the kernels that their plan prefers, then by PyTorch's operators."""
    if request.param == "PyTorch":
        for device in list(ONE_LAUNCH):
            monkeypatch.delitem(ONE_LAUNCH, device)
