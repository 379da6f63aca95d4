"""``insitu canary``: the prompts by which updates are judged."""

import sys
from typing import Annotated

from cyclopts import App, Parameter

from insitu.cli.common import StateDir, connect, plainly

canary = App(name="canary", help="Prompts whose replies no lesson should change: every update is judged by them.")


@canary.command
@plainly
def add(prompt: Annotated[str, Parameter(allow_leading_hyphen=True)], /, *, state_dir: StateDir = None) -> None:
    """Judge updates by the reply to PROMPT too, from the next lesson on.

    Args:
        prompt: A question, as a user would ask it. What the model says to it now is what it is held to.
    """
    added = connect(state_dir).post("/v1/live/canaries", {"prompt": prompt})
    sys.stdout.write(
        f"{added['id']} judges every update from now on; take it back with: insitu canary remove {added['id']}\n"
    )


@canary.command(name="list")
@plainly
def list_(*, state_dir: StateDir = None) -> None:
    """All canaries, those that ship first."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("id", "prompt")
    for row in connect(state_dir).get("/v1/live/canaries")["data"]:
        table.add_row(row["id"], escape(row["prompt"]))
    Console().print(table)


@canary.command
@plainly
def remove(id: str, /, *, state_dir: StateDir = None) -> None:
    """Stop judging by a canary that was added.

    Args:
        id: As `insitu canary list` shows it.
    """
    removed = connect(state_dir).request("DELETE", f"/v1/live/canaries/{id}").json()
    sys.stdout.write(f"{removed['id']} is removed\n")
