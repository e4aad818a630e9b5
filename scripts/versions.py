#!/usr/bin/env python
"""Compares every family with the Transformers that is installed, in float32, and records those that are equal to it.

    python scripts/versions.py

src/moerunner/models/families/verified.json gets the release and the fingerprints of the classes in the families' blocks. Exit
status 1: a family failed, and is not recorded for this release. `make versions` does this for each release.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "src/moerunner/models/families/verified.json"
PARITY = ROOT / "tests/models/test_parity.py"


class Outcomes:
    """A pytest plugin: the verdict of each case, "passed" only if nothing about it failed or was skipped."""

    def __init__(self) -> None:
        self.of_case: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        case = report.nodeid.partition("[")[2].removesuffix("]")
        if report.when == "call" or report.outcome != "passed":
            self.of_case[case] = report.outcome


def compare() -> dict[str, str]:
    """The verdict of every case of the parity suite."""
    outcomes = Outcomes()
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), str(PARITY), "-k", "float32"]
    status = pytest.main(arguments, plugins=[outcomes])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"versions: pytest ended with {status!r}")
    return outcomes.of_case


def sources(verdicts: dict[str, str]) -> dict[str, dict[str, str]]:
    """Fingerprints by family and class, over the cases that passed, of families of which none failed."""
    import test_parity as parity

    from moerunner.models.prepare import sites
    from moerunner.models.reference import sources

    found: dict[str, dict[str, str]] = defaultdict(dict)
    failed = {parity.CASES[case][0] for case, verdict in verdicts.items() if verdict == "failed"}
    for case, verdict in verdicts.items():
        family = parity.CASES[case][0]
        if verdict == "passed" and family not in failed:
            for site in sites(parity.build(case)):
                if site.family is not None:
                    found[family] |= sources(site.block)
    return found


def merged(record: dict[str, Any], release: str, found: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The record with one release anew. Releases in which a family has the same source stand together."""
    new: dict[str, Any] = {}
    for family in sorted({*record, *found}):
        groups = [([r for r in releases if r != release], prints) for releases, prints in record.get(family, [])]
        same = next((releases for releases, prints in groups if prints == found.get(family)), None)
        if same is not None:
            same.append(release)
        elif family in found:
            groups.append(([release], found[family]))
        kept = [(sorted(releases, key=_order), prints) for releases, prints in groups if releases]
        if kept:
            new[family] = sorted(kept, key=lambda group: _order(group[0][0]))
    return new


def _order(release: str) -> list[int]:
    return [int(part) for part in release.split(".")]


def main() -> int:
    os.environ.setdefault("MOERUNNER_SEED", "20250101")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(PARITY.parent))
    from transformers import __version__ as release

    verdicts = compare()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sources(verdicts)
    record = merged(json.loads(RECORD.read_text()), release, found)
    lines = [f"{json.dumps(name)}: {json.dumps(groups, sort_keys=True)}" for name, groups in record.items()]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    failed = sorted(case for case, verdict in verdicts.items() if verdict == "failed")
    print(f"Transformers {release}: {len(found)} families, {len(failed)} cases failed{': ' * bool(failed)}{', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
