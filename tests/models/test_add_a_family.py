"""docs/add-a-family.md is run: its files are written, its snippets executed in order, its messages looked up."""

import re
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from tests.support.pages import read

import moerunner
from moerunner.models import Family, patch, registry
from moerunner.verify.tiny import tiny_model

PAGE = read("docs/add-a-family.md")
FILES, SNIPPETS = PAGE.files(), PAGE.snippets()
MESSAGES = re.findall(r"^\| `(.+?)` \|", PAGE.path.read_text().partition("## What the messages mean")[2], flags=re.MULTILINE)


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
    assert {block.kind for block in PAGE.blocks} == {"python", "sh", "toml"}
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
    (toml,) = (block.text for block in PAGE.blocks if block.kind == "toml")
    ((group, points),) = tomllib.loads(toml)["project"]["entry-points"].items()
    assert group == registry.GROUP
    for name, value in points.items():
        assert isinstance(EntryPoint(name, value, group).load(), Family)


@pytest.mark.parametrize("message", MESSAGES)
def test_the_messages_exist(message):
    sources = (path.read_text(encoding="utf-8") for path in Path(moerunner.__file__).parent.rglob("*.py"))
    text = re.sub(r'"\s+f?"', "", "\n".join(sources))  # strings that are written in several pieces
    fragments = [re.escape(part) for part in message.split("…")]
    assert re.search(r"[^\n]*?".join(fragments), text), message
