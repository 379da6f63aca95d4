"""The verbs about versions: list them, go back to one, keep one, take one elsewhere."""

import sys
from datetime import datetime
from pathlib import Path

from insitu.cli.common import StateDir, connect, plainly
from insitu.live.config import default_state_dir


@plainly
def versions(*, state_dir: StateDir = None) -> None:
    """The versions of the weights, and what became of each."""
    from rich.console import Console
    from rich.table import Table

    table = Table("version", "kind", "status", "from", "made", "examples", "loss", "MB", "verdict", "reason")
    for row in connect(state_dir).get("/v1/live/versions")["data"]:
        report = row["report"]
        steps = report.get("steps") or [{}]
        losses = f"{steps[0]['loss']:.2f} -> {steps[-1]['loss']:.2f}" if "loss" in steps[0] else ""
        origin = (
            f"= {row['target']}"
            if row["target"] is not None
            else str(row["parent"] if row["parent"] is not None else "")
        )
        made = datetime.fromtimestamp(row["created"]).strftime("%Y-%m-%d %H:%M:%S")
        examples = str(report.get("examples", ""))
        status = "pruned" if row["pruned"] else row["status"] + (", pinned" if row["pinned"] else "")
        size = f"{row['bytes'] / 1e6:.1f}" if row["bytes"] else ""
        verdict = report.get("verdict", {})
        level = str(verdict.get("level", ""))
        reason = str(report.get("reason", "; ".join(verdict.get("reasons", []))))
        table.add_row(str(row["id"]), row["kind"], status, origin, made, examples, losses, size, level, reason)
    Console().print(table)


@plainly
def rollback(version: int, /, *, state_dir: StateDir = None) -> None:
    """Serve the bytes of an older VERSION again, as a new version.

    Args:
        version: As `insitu versions` numbers them; 0 is the model as it was first served.
    """
    done = connect(state_dir).post(f"/v1/live/versions/{version}/rollback")
    if done["status"] == "done":
        sys.stdout.write(f"version {done['version']} is served, bit for bit equal to version {version}\n")
    else:
        sys.stdout.write(f"the rollback is {done['status']}: the learner is busy; see insitu versions\n")


@plainly
def pin(version: int, /, *, state_dir: StateDir = None) -> None:
    """Never prune VERSION, however old it gets."""
    connect(state_dir).post(f"/v1/live/versions/{version}/pin")
    sys.stdout.write(f"version {version} is kept until: insitu unpin {version}\n")


@plainly
def unpin(version: int, /, *, state_dir: StateDir = None) -> None:
    """Let VERSION be pruned again when it is old."""
    connect(state_dir).post(f"/v1/live/versions/{version}/unpin")
    sys.stdout.write(f"version {version} is no longer kept for ever\n")


def export(version: int, directory: Path, /, *, state_dir: StateDir = None) -> None:
    """Write VERSION to a new DIRECTORY, as a checkpoint that Transformers and vLLM load. No server need run.

    Args:
        version: As `insitu versions` numbers them; 0 is the model as it was first served.
        directory: A directory that does not exist yet.
    """
    from insitu.live.checkpoint import VersionError
    from insitu.live.export import export as write
    from insitu.live.records import StateError

    try:
        origin = write(state_dir or default_state_dir(), version, directory)
    except (VersionError, StateError, OSError) as error:
        sys.exit(f"insitu: {error}")
    sys.stdout.write(f"{directory} holds version {version} of {origin['base']}\n")
