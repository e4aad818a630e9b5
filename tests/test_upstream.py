"""What the script that runs Transformers' own tests makes of their outcomes."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def upstream():
    sys.path.insert(0, str(SCRIPTS))
    try:
        module_spec = importlib.util.spec_from_file_location("scripts_upstream_tests", SCRIPTS / "upstream_tests.py")
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


def test_only_tests_that_pass_unpatched_and_not_patched_differ(upstream):
    names = ["test_a", "test_b", "test_c", "test_d", "test_e"]
    nodes = [f"file.py::Test_some::{name}" for name in names]
    plain = ["passed", "passed", "failed", "failed", "skipped"]
    patched = ["passed", "failed", "failed", "passed", "skipped"]
    found = upstream.compare(
        {node: [outcome, ""] for node, outcome in zip(nodes, plain, strict=True)},
        {node: [outcome, "why"] for node, outcome in zip(nodes, patched, strict=True)},
    )
    assert found == {
        "some": {
            "passed_unpatched": 2,
            "passed_patched": 2,
            "fail_both_ways": ["test_c"],
            "differ": [{"test": "test_b", "message": "failed: why"}],
        }
    }


def test_a_difference_with_a_known_reason_has_it_and_a_test_that_did_not_run_differs(upstream):
    start = next(iter(upstream.INHERENT))
    plain = {"file.py::Test_some::" + name: ["passed", ""] for name in (f"{start}_0_fp16", "test_gone")}
    found = upstream.compare(plain, {f"file.py::Test_some::{start}_0_fp16": ["failed", "why"]})
    assert found["some"]["differ"] == [
        {"test": f"{start}_0_fp16", "reason": upstream.INHERENT[start]},
        {"test": "test_gone", "message": "absent: "},
    ]
