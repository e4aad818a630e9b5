"""The scripts that hold `make test` to its time and that record `make test-all`."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def load(name):
    module_spec = importlib.util.spec_from_file_location(f"scripts_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


check_budget = load("check_budget")
write_results = load("write_results")


@pytest.fixture
def times(tmp_path, monkeypatch):
    monkeypatch.delenv("MOERUNNER_TEST_BUDGET_S", raising=False)
    path = tmp_path / "times.txt"

    def write(text):
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize(("pytest_s", "status"), [("100.0", 0), ("719.0", 0), ("719.1", 1), ("5000", 1)])
def test_the_sum_of_the_phases_is_held_to_twelve_minutes(times, capsys, pytest_s, status):
    assert check_budget.main([times(f"ruff check\t0.2\npyright\t0.8\npytest\t{pytest_s}\n")]) == status
    said = capsys.readouterr()
    total = f"make test: {float(pytest_s) + 1:.1f} s of 720 s (ruff check 0.2, pyright 0.8, pytest "
    assert total in (said.err if status else said.out)
    assert ("OVER BUDGET" in said.err) == bool(status)


def test_the_message_names_the_slowest_phase_and_the_excess():
    within, text = check_budget.verdict({"pyright": 3.0, "pytest": 20.0}, 10.0)
    assert not within
    assert "OVER BUDGET by 13.0 s, most of it in pytest." in text


def test_the_environment_can_move_the_budget(times, monkeypatch):
    path = times("pytest\t50\n")
    monkeypatch.setenv("MOERUNNER_TEST_BUDGET_S", "40")
    assert check_budget.main([path]) == 1
    monkeypatch.setenv("MOERUNNER_TEST_BUDGET_S", "60")
    assert check_budget.main([path]) == 0
    monkeypatch.setenv("MOERUNNER_TEST_BUDGET_S", "soon")
    assert check_budget.main([path]) == 2


def test_a_repeated_phase_counts_twice(times):
    assert check_budget.read_times(Path(times("pytest\t1.5\npytest\t2\n"))) == {"pytest": 3.5}


@pytest.mark.parametrize("text", ["", "pytest\n", "pytest\tlong\n"])
def test_a_damaged_file_of_times_is_bad_input(times, capsys, text):
    assert check_budget.main([times(text)]) == 2
    assert "check_budget: " in capsys.readouterr().err


def test_a_missing_file_of_times_is_bad_input(tmp_path):
    assert check_budget.main([str(tmp_path / "absent")]) == 2
    assert check_budget.main([]) == 2


JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites name="pytest tests"><testsuite name="pytest" errors="1" failures="1" skipped="1" tests="5" time="12.34">
<testcase classname="tests.test_a" name="test_fast" time="0.5" />
<testcase classname="tests.test_a" name="test_long" time="9.126" />
<testcase classname="tests.test_a" name="test_wrong" time="0.1"><failure message="no">trace</failure></testcase>
<testcase classname="tests.test_b" name="test_broken" time="0.1"><error message="no">trace</error></testcase>
<testcase classname="tests.test_b" name="test_left" time="0.0"><skipped message="no gpu" /></testcase>
</testsuite></testsuites>"""


def test_results_are_counted_and_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOERUNNER_SEED", "77")
    source, target = tmp_path / "junit.xml", tmp_path / "results" / "all.json"
    source.write_text(JUNIT)
    assert write_results.main([str(source), str(target)]) == 0
    record = json.loads(target.read_text())
    counts = {key: record[key] for key in ("passed", "failed", "errors", "skipped", "wall_s", "seed")}
    assert counts == {"passed": 2, "failed": 1, "errors": 1, "skipped": 1, "wall_s": 12.3, "seed": "77"}
    assert record["failed_tests"] == ["tests.test_a::test_wrong", "tests.test_b::test_broken"]
    assert record["slowest"][0] == {"test": "tests.test_a::test_long", "s": 9.13}
    assert record["cores"] >= 1
    assert record["versions"]["torch"]
    assert "2 passed, 2 failed, 12.3 s" in capsys.readouterr().out


def test_results_of_a_run_that_never_wrote_its_xml_are_an_error(tmp_path, capsys):
    target = tmp_path / "all.json"
    assert write_results.main([str(tmp_path / "absent.xml"), str(target)]) == 2
    assert not target.exists()
    assert "write_results: " in capsys.readouterr().err
