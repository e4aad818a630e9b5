"""Every snippet and command of README and docs/ is run; what takes long, in the long tier."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tests.serve.conftest import Server, shipped
from tests.support.pages import ROOT, all_pages, read

import moerunner
from moerunner.cli import app
from moerunner.experts import registry as backends
from moerunner.models import registry as families

PAGES = {page.name: page for page in all_pages()}
OWN = "docs/add-a-family.md"  # tests/models/test_add_a_family.py runs its Python and more
PLACE = re.compile(r"path/to/model|\bPATH\b")


def with_model(text):
    return PLACE.sub(str(shipped()), text)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of one's own to run in, and registries as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known = set(backends.names()), {family.name for family in families.registered()}
    modules = set(sys.modules)
    yield tmp_path
    for name in set(backends.names()) - known[0]:
        backends.unregister(name)
    for name in {family.name for family in families.registered()} - known[1]:
        families.unregister(name)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def before(page):
    """What README's snippets speak of and do not make: a model that is loaded already, weights that are new, tensors."""
    if page != "README.md":
        return {}
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(shipped(), dtype=torch.float32)
    ids = torch.stack([torch.randperm(8)[:2] for _ in range(5)])
    experts = {"w13": torch.randn(8, 64, 48) * 0.1, "w2": torch.randn(8, 48, 32) * 0.1}
    return (
        {"model": model, "new_weights": shipped(), "x": torch.randn(5, 48), "topk_ids": ids}
        | experts
        | {"topk_weights": torch.rand(5, 2)}
    )


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if page.snippets() and name != OWN])
def test_snippets_run_in_their_order(name, here, capsys):
    page = PAGES[name]
    for file, text in page.files().items():
        (here / file).write_text(text, encoding="utf-8")
    names = before(name)
    given = {n: names[n] for n in ("x", "w13", "w2") if n in names}
    for snippet in page.snippets():
        if "fused_experts(x," in snippet:
            names |= given  # an earlier snippet has an x of its own
        exec(compile(with_model(snippet), f"{name}", "exec"), names)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_lm_eval_recipe(here, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(here / "hub"))
    names = {}
    for snippet in PAGES["docs/lm-eval.md"].snippets("lm-eval"):
        exec(with_model(snippet), names)
    assert names["patched"] == pytest.approx(names["bits_per_byte"](), rel=1e-4)
    assert 0.1 < names["patched"] < 8


# ---- commands


def environment():
    """Of ranks: one thread each, no GPU, and the package that this process has imported."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src")}


KNOWN = {"moerunner", ".venv/bin/moerunner", "make", "pip", "torchrun", "curl"}
LONG = {"bench", "demo", "generate", "plan", "route"}  # verbs with tests of their own in the fast tier
NEEDS_GPU = {"tune"}


def commands():
    """Each command once, with the first page that has it."""
    found = {}
    for page in PAGES.values():
        for block in page.blocks:
            for words in block.commands() if block.kind == "sh" else ():
                long = "slow" in block.how or words[0] == "torchrun" or words[1] in LONG
                same = PLACE.sub("PATH", shlex.join(words)).removeprefix(".venv/bin/")
                marks = [pytest.mark.slow] * long
                found.setdefault(same, pytest.param(page.name, words, id=f"{page.name}: {same[:70]}", marks=marks))
    return list(found.values())


COMMANDS = commands()
SERVED = [param for param in COMMANDS if "serve" in param.values[1][:2] or param.values[1][0] == "curl"]


@pytest.mark.parametrize(("page", "words"), [param for param in COMMANDS if param not in SERVED])
def test_a_command(page, words, here, monkeypatch, capsys):
    assert words[0] in KNOWN, f"{page}: nothing runs {words[0]} here"
    words = [with_model(word) for word in words]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(words[1:]) <= set(targets), "CI runs `make test`; the rest is too long"
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"\[([\w,]+)\]", " ".join(words))
        assert {extra for names in named for extra in names.split(",")} <= set(extras)
    elif words[0] == "torchrun":
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
        done = subprocess.run(run, capture_output=True, text=True, timeout=280, env=environment())
        assert done.returncode == 0, done.stderr
    else:
        with pytest.raises(SystemExit) as end:
            app(words[1:], prog_name="moerunner")
        refused = words[1] in NEEDS_GPU and not torch.cuda.is_available()
        refused |= "--chat" in words  # the shipped model has no chat template
        assert (end.value.code or 0) == (3 if refused else 0), capsys.readouterr()


@pytest.fixture(scope="module")
def served():
    """The server that docs/serve.md starts, with the options that it gives."""
    (options,) = (tuple(param.values[1][3:]) for param in SERVED if param.values[1][1] == "serve")
    assert options == ("--port", "8000"), "all pages start it alike"
    server = Server(shipped())
    yield server
    assert server.stop()[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("page", "words"), [param for param in SERVED if param.values[1][0] == "curl"])
def test_a_question_to_the_server(page, words, served):
    run = ["curl", "-sS", "--fail", *(word.replace("http://127.0.0.1:8000", served.url) for word in words[1:])]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.slow
def test_snippets_that_ask_the_server(served, capsys):
    for page in PAGES.values():
        for snippet in page.snippets("server"):
            exec(snippet.replace("http://127.0.0.1:8000", served.url), {})
    assert capsys.readouterr().out


def test_every_block_is_of_a_kind_that_is_run():
    kinds = {(page.name, block.kind, block.how) for page in PAGES.values() for block in page.blocks}
    assert {kind for _, kind, _ in kinds} <= {"python", "sh", "toml", "text"}
    assert {how for _, _, how in kinds} <= {"", "slow", "server", "torchrun 4", "lm-eval"}


def test_entry_points_name_what_the_page_defines(here):
    (toml,) = (block.text for block in PAGES["docs/write-a-backend.md"].blocks if block.kind == "toml")
    ((group, points),) = tomllib.loads(toml)["project"]["entry-points"].items()
    assert group == "moerunner.backends"
    ((_, value),) = points.items()
    module, _, attribute = value.partition(":")
    assert f"class {attribute}" in PAGES["docs/write-a-backend.md"].files()[f"{module}.py"]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/layouts.md"])
def test_a_snippet_for_torchrun(here, page):
    (snippet,) = PAGES[page].snippets("torchrun 4")
    (here / "program.py").write_text(f"import moerunner\n{with_model(snippet)}\nassert model.moerunner_report.replaced\n")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "program.py"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=280, env=environment())
    assert done.returncode == 0, done.stderr


# ---- the site


def test_the_api_reference_has_every_public_name():
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    assert sorted(name.rpartition(".")[2] for name in listed) == sorted(moerunner.__all__)
    for name in listed:
        module, _, attribute = name.rpartition(".")
        public, found = getattr(moerunner, attribute), getattr(importlib.import_module(module), attribute)
        assert found is public or found is getattr(public, attribute, None)  # `generate` is a module that is called as well


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    assert set(re.findall(r"[\w-]+\.md", nav)) == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_our_names_in_the_table_for_people_from_vllm_exist():
    """Every `Class(field=...)` and `Class.field` in the right column."""
    table = (ROOT / "docs" / "from-vllm.md").read_text().partition("| --- |")[2] or (ROOT / "docs" / "from-vllm.md").read_text()
    right = [line.split(" | ")[1] for line in table.splitlines() if line.startswith("| ") and " | " in line]
    checked = 0
    for kind, field in re.findall(r"\b([A-Z]\w+)(?:\(|\.)(\w+)", " ".join(right)):
        if hasattr(moerunner, kind):
            made = getattr(moerunner, kind)
            assert field in getattr(made, "__dataclass_fields__", {}) or hasattr(made, field) or kind == "MoERunner", (
                kind,
                field,
            )
            checked += 1
    assert checked > 15


@pytest.mark.slow
def test_the_site_builds_without_the_network(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    run = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    pages = {path.name: path.read_text() for path in Path(tmp_path / "site").glob("*.html")}
    assert "MoERunner" in pages["api.html"]
    for name, text in pages.items():
        fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', text)
        assert not [url for url in fetched if "canonical" not in url], name


def test_what_is_run_is_what_the_pages_say():
    page = read("docs/serve.md")
    assert [block.how for block in page.blocks if block.kind == "python"] == ["server"]
    assert {param.values[1][1] for param in COMMANDS if param.values[1][0] == "moerunner"} >= {
        "serve",
        "route",
        "verify",
        "demo",
    }
    assert any("-d" in words for block in page.blocks if block.kind == "sh" for words in block.commands())
