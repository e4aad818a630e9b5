"""The ways of scripts/mutants.txt to break the code still fit the code, and the tests they name exist."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load():
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "scripts" / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module
    spec.loader.exec_module(module)
    return module


mutants = load()
MUTANTS = mutants.read(mutants.LIST.read_text(encoding="utf-8"))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_fits_the_source(mutant):
    source = (ROOT / "src" / "moerunner" / mutant.file).read_text(encoding="utf-8")
    broken = mutant.apply(source)
    assert broken != source
    compile(broken, mutant.file, "exec")
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^def {name}\(", text, flags=re.MULTILINE), test


def test_every_mutant_is_listed_once():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) > 100


def test_every_refusal_of_the_algebra_has_a_mutant():
    removed = {(m.file, m.edits[0][0].splitlines()[0].strip()) for m in MUTANTS if m.name.startswith("plan check removed")}
    for file in ("values/state.py", "plan/steps.py"):
        lines = (ROOT / "src" / "moerunner" / file).read_text(encoding="utf-8").splitlines()
        condition, refusals = "", 0
        for line in lines:
            condition = line.strip() if re.match(r"\s+(?:if|for) ", line) else condition
            refuses = re.match(r"\s+(?:\w+\._refuse\(|raise PlanError)", line)
            if refuses and condition.startswith("if "):
                assert (file, condition) in removed, f"{file}: {condition}"
                refusals += 1
        assert refusals > 10


def test_a_pattern_that_no_longer_matches_is_reported():
    stale = mutants.Mutant("gone", "errors.py", [("no such text anywhere", "")], ["x"])
    with pytest.raises(LookupError, match=r"gone: errors.py has 0 places"):
        stale.apply("class MoEError")
    with pytest.raises(LookupError, match="2 places"):
        stale.apply("no such text anywhere, no such text anywhere")


def test_an_entry_reads_as_it_is_written():
    text = "# a comment\n\n[a: b] x/y.py\n< old\n<     second\n> new\n< other\n>\n? test_a.py::test_b\n? test_c.py\n"
    (only,) = mutants.read(text)
    assert (only.name, only.file) == ("a: b", "x/y.py")
    assert only.edits == [("old\n    second", "new"), ("other", "")]
    assert only.tests == ["test_a.py::test_b", "test_c.py"]
    with pytest.raises(ValueError, match="line 1"):
        mutants.read("what is this\n")
