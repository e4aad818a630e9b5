"""Turns pytest's junit XML into the small JSON record that is kept in docs/results.

python scripts/write_results.py JUNIT_XML RESULT_JSON
"""

import json
import os
import platform
import subprocess
import sys
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RECORDED = ("moerunner", "torch", "triton", "transformers", "safetensors", "numpy")
SLOWEST = 15


def summarise(junit_xml: str) -> dict[str, Any]:
    """Counts, wall seconds, failures and the slowest tests of one pytest run."""
    root = ET.fromstring(junit_xml)
    suites = [root] if root.tag == "testsuite" else root.findall("testsuite")
    tests, failures, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    cases = [
        (f"{case.get('classname', '')}::{case.get('name', '')}", float(case.get("time", 0)), case)
        for suite in suites
        for case in suite.iter("testcase")
    ]
    bad = [name for name, _, case in cases if case.find("failure") is not None or case.find("error") is not None]
    return {
        "passed": tests - failures - errors - skipped,
        "failed": failures,
        "errors": errors,
        "skipped": skipped,  # expected failures too: junit does not tell them apart
        "wall_s": round(sum(float(suite.get("time", 0)) for suite in suites), 1),
        "failed_tests": sorted(set(bad)),
        "slowest": [
            {"test": name, "s": round(seconds, 2)} for name, seconds, _ in sorted(cases, key=lambda case: -case[1])[:SLOWEST]
        ],
    }


def surroundings() -> dict[str, Any]:
    """Where and on what the tests ran."""
    versions = {}
    for name in RECORDED:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "seed": os.environ.get("MOERUNNER_SEED"),
        "pytest_args": os.environ.get("PYTEST_ARGS", ""),  # what was left out, if anything was
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions,
    }


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print("usage: write_results.py JUNIT_XML RESULT_JSON", file=sys.stderr)
        return 2
    source, target = Path(argv[0]), Path(argv[1])
    try:
        summary = summarise(source.read_text())
    except (OSError, ET.ParseError) as error:
        print(f"write_results: {source}: {error}", file=sys.stderr)
        return 2
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**summary, **surroundings()}, indent=2) + "\n")
    print(f"{target}: {summary['passed']} passed, {summary['failed'] + summary['errors']} failed, {summary['wall_s']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
