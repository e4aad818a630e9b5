"""Runs Transformers' own common model tests without and with moerunner.patch, and records where the outcomes differ.

python scripts/upstream_tests.py [FAMILY...]

The tests come from the source distribution of the installed Transformers, kept in .cache-make; the small models that they
run on are those of upstream_models.py. All families if none is named; the others in docs/results/upstream.json stay.
Exits with 1 if a test passes without moerunner and not with it, for a reason that is not listed here.
"""

import json
import os
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from write_results import surroundings

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache-make" / "upstream"
RESULT = ROOT / "docs" / "results" / "upstream.json"
NEEDED = ["parameterized"]  # by the tests, beside what moerunner's own tests need
SECONDS = 120  # for one test

# Tests that cannot pass on a patched model, by the beginning of their names, with the reason.
INHERENT = {
    "test_eager_matches_batched_and_grouped_inference": (
        "it asks that Transformers' own experts functions be called, and a patched block does not call them"
    ),
}


def main(families: list[str]) -> int:
    tests = source()
    return record(run(tests, families, patched=False), run(tests, families, patched=True))


def record(plain: dict[str, Any], patched: dict[str, Any]) -> int:
    """Writes and prints what the two runs found. A family's place in the record is that of its last run, which it names."""
    before = json.loads(RESULT.read_text())["families"] if RESULT.exists() else {}
    now, where = compare(plain["outcomes"], patched["outcomes"]), surroundings()
    for family, result in now.items():
        result["blocks_patched"] = patched["replaced"].get(family, 0)
        result["run"] = {key: where[key] for key in ("date", "commit")}
    families = dict(sorted((before | now).items()))
    RESULT.write_text(json.dumps({"families": families, **where}, indent=2) + "\n")
    for reason, count in Counter(patched["left"]).most_common():
        print(f"{count} blocks were not patched: {reason}")
    unexplained = [f"{family}: {d['test']}: {d['message']}" for family in now for d in now[family]["differ"] if "message" in d]
    for difference in unexplained:
        print(difference)
    passed = [sum(result[way] for result in now.values()) for way in ("passed_unpatched", "passed_patched")]
    print(f"{len(now)} families: {passed[0]} tests pass unpatched, {passed[1]} patched, {len(unexplained)} unexplained")
    return 1 if unexplained or not now else 0


def source() -> Path:
    """The folder of the source distribution, downloaded if it is not there."""
    name = f"transformers-{version('transformers')}"
    folder, site = CACHE / name, CACHE / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    if not site.exists():
        subprocess.run([*pip, "install", "--no-deps", "--target", site, *NEEDED], check=True)
    if not folder.exists():
        wanted = name.replace("-", "==")
        subprocess.run([*pip, "download", "--no-deps", "--no-binary", ":all:", "--dest", CACHE, wanted], check=True)
        with tarfile.open(CACHE / f"{name}.tar.gz") as archive:
            archive.extractall(CACHE, filter="data")
    return folder


def run(tests: Path, families: list[str], *, patched: bool) -> dict[str, Any]:
    """One pytest run, in a process of its own since the patched one changes Transformers' classes."""
    file, out = Path(__file__).with_name("upstream_models.py"), CACHE / f"{'patched' if patched else 'unpatched'}.json"
    out.unlink(missing_ok=True)
    asked = [f"{file}::Test_{family}" for family in families] or [str(file)]
    own = {
        "PYTHONPATH": os.pathsep.join([str(tests), str(file.parent), str(CACHE / "site")]),
        "MOERUNNER_UPSTREAM_OUT": str(out),
        "MOERUNNER_UPSTREAM_PATCH": str(int(patched)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    flags = ["-q", "--tb", "no", "-r", "N", "--disable-warnings", "--timeout", str(SECONDS), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-p", "upstream_plugin", "-c", os.devnull, "--rootdir", str(tests)]
    subprocess.run([*command, *flags, *asked], cwd=tests, env=os.environ | own, check=False)
    if not out.exists():
        sys.exit("pytest did not come to its end")
    return json.loads(out.read_text())


def compare(plain: dict[str, list[str]], patched: dict[str, list[str]]) -> dict[str, Any]:
    """By family: how many tests pass, and those that pass unpatched only."""
    families: dict[str, dict[str, Any]] = defaultdict(
        lambda: {"passed_unpatched": 0, "passed_patched": 0, "fail_both_ways": [], "differ": []}
    )
    for node, (outcome, _) in plain.items():
        _, kind, test = node.rsplit("::", 2)
        family = families[kind.removeprefix("Test_")]
        now, message = patched.get(node, ("absent", ""))
        family["passed_unpatched"] += outcome == "passed"
        family["passed_patched"] += now == "passed"
        if outcome == now == "failed":
            family["fail_both_ways"].append(test)
        elif outcome == "passed" != now:
            reason = next((why for start, why in INHERENT.items() if test.startswith(start)), None)
            family["differ"].append({"test": test} | ({"reason": reason} if reason else {"message": f"{now}: {message}"}))
    return dict(families)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
