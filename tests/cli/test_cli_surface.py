"""The verbs and options are a promise: a change to them must change this file."""

import math
import os
import resource
import subprocess
import sys

import pytest
import typer.main

from moerunner.cli import app

SURFACE = {
    "demo": {"--prompt", "--max-new-tokens", "--temperature", "--seed", "--json", "--debug"},
    "verify": {
        "path",
        "--family",
        "--text",
        "--tokens",
        "--oracle-tokens",
        "--record",
        "--dtype",
        "--device",
        "--seed",
        "--tp",
        "--ep",
        "--dp",
        "--attention",
        "--timeout",
        "--json",
        "--debug",
    },
    "generate": {
        "path",
        "prompt",
        "--prompts",
        "--chat",
        "--max-new-tokens",
        "--temperature",
        "--top-p",
        "--top-k",
        "--min-p",
        "--repetition-penalty",
        "--set",
        "--stop",
        "--seed",
        "--prefill-chunk",
        "--dtype",
        "--device",
        "--allow-unpatched",
        "--tp",
        "--ep",
        "--dp",
        "--attention",
        "--timeout",
        "--json",
        "--debug",
    },
    "serve": {
        "path",
        "--host",
        "--port",
        "--name",
        "--api-key",
        "--chat-template",
        "--max-new-tokens",
        "--max-running",
        "--max-waiting",
        "--max-body",
        "--context",
        "--cache-tokens",
        "--dtype",
        "--device",
        "--allow-unpatched",
        "--json",
        "--debug",
    },
    "route": {"path", "--text", "--plot", "--tokens", "--dtype", "--device", "--json", "--debug"},
    "inspect": {"path", "--ep", "--tp", "--dp", "--layout", "--skew", "--trace", "--dtype", "--device", "--explain"}
    | {"--json", "--debug"},
    "plan": {
        "--ranks",
        "--nvlink",
        "--net",
        "--hbm",
        "--tflops",
        "--config",
        "--family",
        "--memory",
        "--gpus-per-node",
        "--latency",
        "--tokens",
        "--skew",
        "--trace",
        "--top",
        "--dtype",
        "--json",
        "--debug",
    },
    "bench": {
        "--layer",
        "--model",
        "--layers",
        "--batches",
        "--prompts",
        "--shapes",
        "--tokens",
        "--routing",
        "--only",
        "--bandwidth",
        "--tflops",
        "--seconds",
        "--save",
        "--plot",
        "--dtype",
        "--device",
        "--seed",
        "--json",
        "--debug",
    },
    "tune": {"shapes", "--tokens", "--activation", "--plain", "--dtype", "--seed", "--json", "--debug"},
    "families": {"--markdown", "--json", "--debug"},
    "env": {"--json", "--debug"},
}


def test_the_verbs_and_their_options_are_these():
    verbs = typer.main.get_command(app).commands
    found = {
        name: {opt for param in verb.params for opt in param.opts if opt not in ("--help", "-h")}
        for name, verb in verbs.items()
    }
    assert found == SURFACE
    root = {opt for param in typer.main.get_command(app).params for opt in param.opts}
    assert root == {"--version", "--install-completion", "--show-completion"}


def test_every_verb_speaks_json_and_can_be_debugged():
    assert all({"--json", "--debug"} <= options for options in SURFACE.values())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_verbs_and_options(shell):
    """The script that a shell is given asks the program itself."""

    def asked(**variables):
        run = [sys.executable, "-m", "moerunner"]
        return subprocess.run(run, env=os.environ | variables, capture_output=True, text=True, timeout=60).stdout

    assert "_MOERUNNER_COMPLETE" in asked(_MOERUNNER_COMPLETE=f"source_{shell}")
    words = {"bash": {"COMP_WORDS": "moerunner ins", "COMP_CWORD": "1"}}.get(
        shell, {"_TYPER_COMPLETE_ARGS": "moerunner ins", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    )
    assert "inspect" in asked(_MOERUNNER_COMPLETE=f"complete_{shell}", **words)


def test_every_option_says_what_it_does():
    verbs = typer.main.get_command(app).commands
    silent = [f"{name} {p.opts}" for name, verb in verbs.items() for p in verb.params if not p.help]
    assert not silent
    assert all(verb.help for verb in verbs.values())


def test_help_is_fast_and_needs_no_torch():
    code = """
import sys
from moerunner.cli import app
try:
    app(["--help"])
except SystemExit:
    heavy = {"torch", "transformers"} & set(sys.modules)
    sys.exit(f"{heavy} imported for --help" if heavy else 0)
"""
    best = math.inf
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "verify" in done.stdout
    assert best < 0.5, "seconds of the processor, whatever else the machine is doing"


def test_no_arguments_give_the_help(cli):
    outcome = cli()
    assert "Usage: moerunner" in outcome.out + outcome.err
    assert outcome.code in (0, 2), "Typer's own choice, it differs between its releases"


def test_the_version(cli):
    import moerunner

    outcome = cli("--version")
    assert (outcome.code, outcome.out) == (0, f"moerunner {moerunner.__version__}\n")
