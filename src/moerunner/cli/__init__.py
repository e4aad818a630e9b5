"""The command line: one file per verb, what they share in `shell`. torch is imported by the verbs, when they run."""

from __future__ import annotations

from typing import Annotated

import typer

import moerunner
from moerunner.cli import bench, demo, env, families, generate, inspect, plan, route, serve, tune, verify

app = typer.Typer(
    name="moerunner",
    rich_markup_mode=None,  # plain help: readable in a pipe, and rich is not imported for it
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"moerunner {moerunner.__version__}")
        raise typer.Exit


@app.callback(no_args_is_help=True)
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Runs the Mixture-of-Experts layers of any model, and proves that the result is right.

    Exit status: 0 success, 1 mismatch, 2 wrong usage or bad input, 3 not supported, 4 failure at run time, 130 interrupted.
    """


for verb in (demo, inspect, plan, verify, generate, serve, route, bench, tune, families, env):
    app.command(verb.__name__.rpartition(".")[2])(verb.run)


def main() -> None:
    """The entry of `moerunner` and of `python -m moerunner`."""
    app(prog_name="moerunner")
