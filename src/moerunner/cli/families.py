"""`moerunner families`: which model families run, and how each one's layer is made."""

from __future__ import annotations

from typing import Annotated

import typer

from moerunner.cli.shell import Answer, DebugOption, JsonOption, Screen, quiet_transformers, verb


@verb
def run(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/families.md.")] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """List the model families that moerunner runs, and what it knowingly leaves to Transformers."""
    quiet_transformers()
    from moerunner.models import matrix

    screen = Screen(quiet=json)
    found = matrix.collect()
    if markdown:
        screen.write(found.markdown())
    else:
        headers, rows = found.cells()
        screen.table(headers, rows, numbers=False, wrap=True)
        screen.say()
        for row in found.rows:
            if row.reason:
                screen.say(f"{row.name}: {row.reason}")
        for name, reason in found.left_alone.items():
            screen.say(f"not run, {name}: {reason}")
    return Answer({"ok": True, **found.to_dict()})
