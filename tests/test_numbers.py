"""The tables of numbers are those of the committed results."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("numbers_script", ROOT / "scripts" / "numbers_page.py")
numbers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(numbers)


@pytest.mark.parametrize(("path", "short"), numbers.PAGES.items(), ids=lambda value: getattr(value, "name", ""))
def test_a_page_has_the_numbers_of_the_results(path, short):
    text = path.read_text(encoding="utf-8")
    assert numbers.page(text, numbers.tables(short)) == text, "run `make numbers`"
    assert len(text.partition(numbers.BEGIN)[2].partition(numbers.END)[0].splitlines()) > 10


def written(folder, name, **data):
    (folder / name).write_text(json.dumps({"environment": {"device": "X1", "torch": "9.9"}, **data}))


def layer(implementation, graph, **more):
    row = {"shape": "qwen3-30b", "tokens": 1, "routing": "uniform", "implementation": implementation, "floor": 1e-5}
    return row | {"graph": graph, "eager": 1.0} | more


def test_layers_beside_floor_and_peers(tmp_path):
    written(tmp_path, "2020-01-01-a.json", results=[layer("triton", 9e-5)])
    rows = [layer("triton", 2e-5), layer("eager", 8e-5), layer("vllm", 3e-5, ours=False), layer("zipf", 1e-5, routing="zipf")]
    written(tmp_path, "2020-01-02-b.json", results=rows)
    table = numbers.tables(True, tmp_path)
    assert "X1, uniform routing (torch 9.9; 2020-01-02)" in table
    assert "| qwen3-30b | 1 | 10.0 | **20.0** | 2.00x | 30.0 |" in table
    assert "90.0" not in table, "the newer file wins"


def test_what_cannot_be_captured_is_timed_from_python(tmp_path):
    written(tmp_path, "2020-01-01-a.json", results=[layer("triton", None, eager=5e-4, dtype="float32")])
    assert "**500**" in numbers.tables(True, tmp_path)


def test_whole_models(tmp_path):
    def part(name, graph, python):
        decode = {"batch": 8, "implementation": name, "graph": graph, "python": 1.0, "floor": 0.005}
        prefill = {"tokens": 2048, "implementation": name, "python": python, "floor": 0.05}
        return {"decode": [decode], "prefill": [prefill]}

    parts = {"ours": part("generate", 0.01, 0.1), "theirs": part("grouped_mm", 0.02, None)}
    written(tmp_path, "2020-01-01-a.json", layers=12, generate=[{"batch": 1}], **parts)
    table = numbers.tables(False, tmp_path)
    assert "| model | step | floor | moerunner generate | Transformers grouped_mm |" in table
    assert "12 layers | decode, batch 8 in a CUDA graph | 5.00 | 10.00 | 20.00 |" in table
    assert "12 layers | decode, batch 8, launched from Python | 5.00 | 1000.00 | 1000.00 |" in table
    assert "12 layers | prefill, 2,048 tokens | 50.00 | 100.00 | - |" in table


def test_tiles_that_are_taken(tmp_path):
    cells = [{"shape": "olmoe", "tokens": n, "floor": 1e-5 * n, "best": {"seconds": 2e-5 * n}} for n in (1, 2048)]
    written(tmp_path, "2020-01-01-a.json", cells=cells)
    assert "| olmoe | 20.0 (2.00x) | 40,960 (2.00x) |" in numbers.tables(False, tmp_path)
    assert "olmoe" not in numbers.tables(True, tmp_path)


def test_a_page_without_marks_is_an_error():
    with pytest.raises(SystemExit, match="has no"):
        numbers.page("no marks", "table")
