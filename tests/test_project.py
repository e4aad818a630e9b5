"""What must stay true of the repository itself: its set-up commands, its sizes, its floors, its wheel."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "moerunner"
MAX_LINES = 400
RUNNER_LINES = 200
ARCHITECTURE_LINES = 60


@pytest.fixture(scope="module")
def project():
    return tomllib.loads(text_of("pyproject.toml"))


@pytest.fixture(scope="module")
def makefile_targets():
    rules = re.findall(r"^([a-z][a-z-]*):(?!=)", text_of("Makefile"), flags=re.MULTILINE)
    return set(rules)


def tracked_files():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def lines_of(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_readme_sets_up_with_exactly_two_commands(makefile_targets):
    section = re.search(r"^## Set up\n(.*?)^## ", text_of("README.md"), flags=re.MULTILINE | re.DOTALL)
    assert section, "README.md has no section 'Set up'"
    blocks = re.findall(r"```sh\n(.*?)```", section[1], flags=re.DOTALL)
    assert [block.split("\n") for block in blocks] == [["make demo", "make test", ""]]
    assert {"demo", "test"} <= makefile_targets


def test_every_make_target_that_the_readme_names_exists(makefile_targets):
    named = set(re.findall(r"`make (?:[A-Z]+=\S+ )?([a-z-]+)", text_of("README.md")))
    assert named
    assert named <= makefile_targets


def test_ci_runs_what_the_readme_tells_people_to_run():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, "not executable"
    assert "set -euo pipefail" in script.read_text()
    assert "make test" in script.read_text()


def test_no_tracked_file_names_the_place_it_was_written_in():
    # Put together here, so that this file does not name them itself.
    forbidden = [text.encode() for text in ("/" + "work/", "shared" + "/design", "../" + "shared", "bash" + "_jobs")]
    found = [
        f"{path.relative_to(ROOT)}: {text.decode()}"
        for path in tracked_files()
        for text in forbidden
        if text in path.read_bytes()
    ]
    assert not found


def test_no_source_file_outgrows_its_purpose():
    files = [path for path in SOURCES.rglob("*.py") if "kernels" not in path.relative_to(SOURCES).parts]
    assert files
    long = {str(path.relative_to(ROOT)): lines_of(path) for path in files if lines_of(path) > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines"


def test_the_runner_stays_readable_in_one_sitting():
    assert lines_of(SOURCES / "runner.py") < RUNNER_LINES


def test_the_architecture_fits_on_a_page():
    assert lines_of(ROOT / "ARCHITECTURE.md") < ARCHITECTURE_LINES


def test_the_wheel_carries_types_and_assets():
    pytest.importorskip("hatchling", reason="in the dev extra")
    from hatchling.builders.wheel import WheelBuilder

    packed = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert "moerunner/py.typed" in packed
    assert "moerunner/errors.py" in packed
    assets = {f"moerunner/{path.relative_to(SOURCES)}" for path in (SOURCES / "assets").rglob("*") if path.is_file()}
    assert {name for name in assets if "__pycache__" not in name} <= packed


def test_the_wheel_carries_nothing_else():
    pytest.importorskip("hatchling", reason="in the dev extra")
    from hatchling.builders.wheel import WheelBuilder

    packed = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {name.split("/")[0] for name in packed} == {"moerunner"}


def test_the_plain_install_stays_light(project):
    core = {re.match(r"[\w-]+", requirement)[0] for requirement in project["project"]["dependencies"]}
    assert core == {"torch", "safetensors", "typer", "rich"}
    assert "entry-points" not in project["project"], "the entry point groups are for third parties"


def test_a_layer_runs_without_triton():
    """The plain install has none on a CPU, `make demo` neither."""
    code = """
import sys
sys.modules["triton"] = None  # any import of it raises
import torch
from moerunner import ExpertsSpec, MoERunner, MoESpec, RoutingSpec
routing = RoutingSpec(score="softmax", renormalise="sum")
spec = MoESpec(hidden_size=16, num_experts=4, top_k=2, routing=routing, experts=ExpertsSpec(intermediate_size=8),
               apply_routed_scale_to_output=False)
layer = MoERunner(spec, {name: torch.randn(shape) for name, shape in spec.weight_shapes().items()})
with torch.no_grad():
    print(*[layer(torch.randn(3, 16)).isfinite().all().item() for _ in range(3)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True True True\n", done.stderr[-1500:]


def modules_in(folder):
    found = {path.stem for path in folder.glob("[a-z]*") if path.suffix == ".py" or (path / "__init__.py").exists()}
    return found - {"assets"}  # data only


@pytest.fixture(scope="module")
def contracts(project):
    return {contract["id"]: contract for contract in project["tool"]["importlinter"]["contracts"]}


def layers_of(contract):
    return [re.findall(r"[\w.]+", layer) for layer in contract["layers"]]


def test_the_floors_are_those_of_the_house(contracts):
    layers = layers_of(contracts["floors"])
    house = "announce errors spec values kernels ops quant parallel experts shared plan execute runner models".split()
    assert layers[::-1][: len(house)] == [[name] for name in house]
    assert layers[:3] == [["__main__"], ["cli"], ["verify", "bench", "generate", "serve", "env", "planner", "loads"]]
    assert contracts["floors"]["exhaustive"], "an exhaustive contract notices a new module"
    ignored = [line for contract in contracts.values() for line in contract.get("ignore_imports", [])]
    bind = [f"moerunner.parallel.layout -> moerunner.parallel.{to}" for to in ("comm", "group")]
    assert ignored == ["moerunner -> moerunner.generate", *bind], "the public name, and Layout.bind, are the only doors"


def test_every_module_has_a_floor(contracts):
    assert modules_in(SOURCES) <= {name for layer in layers_of(contracts["floors"]) for name in layer}
    for package in ("ops", "parallel"):
        named = {name for layer in layers_of(contracts[package]) for name in layer}
        assert {f"{package}.{name}" for name in modules_in(SOURCES / package)} <= named
