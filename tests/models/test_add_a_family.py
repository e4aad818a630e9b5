"""docs/add-a-family.md is run: its files are written, its snippets executed in order, its messages looked up."""

import re
import shlex
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import moerunner
from moerunner.cli import app
from moerunner.models import Family, patch, registry
from moerunner.verify.tiny import tiny_model

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-family.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
PYTHON = [code for kind, code in BLOCKS if kind == "python"]
FILES = {found[1]: code for code in PYTHON if (found := re.match(r"# (\w+\.py)\n", code))}
SNIPPETS = [code for code in PYTHON if code not in FILES.values()]
MESSAGES = re.findall(r"^\| `(.+?)` \|", PAGE.partition("## What the messages mean")[2], flags=re.MULTILINE)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """Everything that the page defines, after all of it has run."""
    for name, code in FILES.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    found: dict[str, Any] = {}
    try:
        for snippet in SNIPPETS:
            exec(snippet, found)
        yield found
    finally:
        registry.unregister("toy")
        for name in FILES:
            sys.modules.pop(Path(name).stem, None)


def test_the_page_has_what_these_tests_look_for():
    assert {kind for kind, _ in BLOCKS} == {"python", "sh", "toml"}
    assert list(FILES) == ["toy_model.py", "toy_family.py"]
    assert len(SNIPPETS) == 4
    assert len(MESSAGES) > 10


def test_the_example_runs_and_its_case_can_be_built(names):
    assert names["checked"].ok
    assert {"w13": (6, 48, 32), "w2": (6, 32, 24)}.items() <= names["spec"].weight_shapes().items()
    for family, changes in names["CASES"].values():
        assert patch(tiny_model(family, **changes)).replaced


@pytest.mark.usefixtures("names")
def test_the_entry_point_names_the_entry():
    (toml,) = (code for kind, code in BLOCKS if kind == "toml")
    ((group, points),) = tomllib.loads(toml)["project"]["entry-points"].items()
    assert group == registry.GROUP
    for name, value in points.items():
        assert isinstance(EntryPoint(name, value, group).load(), Family)


@pytest.mark.parametrize("line", [line for kind, code in BLOCKS if kind == "sh" for line in code.splitlines()])
def test_the_commands_run(line):
    program, *args = shlex.split(line)
    with pytest.raises(SystemExit) as end:
        app(args, prog_name=program)
    assert not end.value.code


@pytest.mark.parametrize("message", MESSAGES)
def test_the_messages_exist(message):
    sources = (path.read_text(encoding="utf-8") for path in Path(moerunner.__file__).parent.rglob("*.py"))
    text = re.sub(r'"\s+f?"', "", "\n".join(sources))  # strings that are written in several pieces
    fragments = [re.escape(part) for part in message.split("…")]
    assert re.search(r"[^\n]*?".join(fragments), text), message
