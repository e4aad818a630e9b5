"""docs/faults.md and the tests of this folder name each other."""

import re
from pathlib import Path

FOLDER = Path(__file__).parent
TEXT = (FOLDER.parents[1] / "docs" / "faults.md").read_text(encoding="utf-8")
TESTS = [
    name
    for path in sorted(FOLDER.glob("test_*.py"))
    for name in re.findall(r"^def (test_\w+)\(", path.read_text("utf-8"), re.M)
]
SIZES = {"A": 16, "B": 23, "C": 17, "D": 12, "E": 14, "F": 5}


def rows():
    """id -> the row's cells."""
    found = re.findall(r"^\| ([A-F]\d+) \|(.*)\|$", TEXT, flags=re.MULTILINE)
    assert len(found) == len(dict(found))
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in found}


def test_every_fault_of_the_catalogue_has_a_row():
    assert set(rows()) == {f"{section}{n}" for section, count in SIZES.items() for n in range(1, count + 1)}


def test_every_row_has_a_test_of_its_own_or_says_why_not():
    for name, cells in rows().items():
        own = [test for test in TESTS if test.startswith(f"test_{name}_")]
        assert own or "not yet" in cells[-1], name
        assert not (own and cells[-1].startswith("not yet")), f"{name} has tests now"


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"`(test_\w+)(\*?)`", TEXT))
    assert named
    for name, star in named:
        assert any(test.startswith(name) if star else test == name for test in TESTS), name


def test_every_test_that_carries_an_id_is_in_its_row():
    for test in TESTS:
        carried = re.match(r"test_([A-F]\d+)_", test)
        if carried:
            stated = re.findall(r"`(test_\w+)(\*?)`", rows()[carried[1]][-1])
            assert any(test.startswith(name) if star else test == name for name, star in stated), test
