"""One seed for everything, printed in the header: MOERUNNER_SEED=... repeats a run."""

import os
import random
import sys
import time
import zlib

SEED = int(os.environ.setdefault("MOERUNNER_SEED", str(int(time.time()) % 10**9)))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import hypothesis.core  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "moerunner",
    deadline=None,  # a shared core stalls at times
    print_blob=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("moerunner")


def pytest_configure(config):
    if config.getoption("--hypothesis-seed", None) is None:
        hypothesis.core.global_force_seed = SEED


def _pooled(item):
    return getattr(getattr(item.module, "on_ranks", None), "__module__", "") == "tests.parallel.pool"


@pytest.hookimpl(tryfirst=True)  # before those that are slow are left out
def pytest_collection_modifyitems(items):
    """Of a grid the part whose turn it is stays in the fast tier. Long tests have the time that a busy machine takes.

    With `--dist loadgroup` the tests of a file share a worker and what its fixtures made; all files that want processes of
    a process group share theirs.
    """
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ranks" if _pooled(item) else item.nodeid.partition("::")[0]))
        rotating = item.get_closest_marker("rotating")
        if rotating and (zlib.crc32(item.nodeid.encode()) + SEED) % rotating.args[0]:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))


def pytest_runtest_teardown(item, nextitem):
    """Idle processes of a group are not idle: their threads poll, beside every test that comes after."""
    if _pooled(item) and not (nextitem and _pooled(nextitem)):
        sys.modules["tests.parallel.pool"].end_all()


def pytest_report_header():
    return f"MOERUNNER_SEED={SEED}, torch {torch.__version__}, {torch.get_num_threads()} thread"


@pytest.fixture(autouse=True)
def _seed(request):
    """Every test has a stream of its own, which does not depend on the tests before it."""
    name = f"{request.node.parent.nodeid}::{request.node.name}"  # its nodeid, to which xdist may have put a group
    seed = (SEED + zlib.crc32(name.encode())) % 2**32
    random.seed(seed)
    torch.manual_seed(seed)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(seed)  # noqa: NPY002 - the global stream is the one a test may read by accident
