"""Holds `make test` to its time budget.

Reads the file of `phase<TAB>seconds` lines that the Makefile writes, prints one line with the total and fails when
the total is over the budget: 720 s, or MOERUNNER_TEST_BUDGET_S.

    python scripts/check_budget.py TIMES
"""

import os
import sys
from pathlib import Path

DEFAULT_BUDGET_S = 720.0


def read_times(path: Path) -> dict[str, float]:
    """Phase name to seconds, in the order in which they ran; a phase that ran twice counts twice."""
    times: dict[str, float] = {}
    for line in path.read_text().splitlines():
        name, _, seconds = line.rpartition("\t")
        times[name] = times.get(name, 0.0) + float(seconds)
    if not times:
        raise ValueError(f"{path} holds no phase")
    return times


def verdict(times: dict[str, float], budget_s: float) -> tuple[bool, str]:
    """Whether the total is within the budget, and the line to print."""
    total = sum(times.values())
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in times.items())
    line = f"make test: {total:.1f} s of {budget_s:.0f} s ({parts})"
    if total <= budget_s:
        return True, line
    slowest = max(times, key=times.__getitem__)
    return False, (
        f"{line}\nOVER BUDGET by {total - budget_s:.1f} s, most of it in {slowest}. Make tests smaller or mark the long"
        " ones `slow`; on a slower machine set MOERUNNER_TEST_BUDGET_S."
    )


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: check_budget.py TIMES", file=sys.stderr)
        return 2
    try:
        budget_s = float(os.environ.get("MOERUNNER_TEST_BUDGET_S") or DEFAULT_BUDGET_S)
        within, text = verdict(read_times(Path(argv[0])), budget_s)
    except (OSError, ValueError) as error:
        print(f"check_budget: {error}", file=sys.stderr)
        return 2
    print(text, file=sys.stdout if within else sys.stderr)
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
