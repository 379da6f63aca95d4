"""The verbs that look into the queue and at what happened: ``insitu feedback ...`` and ``insitu events``."""

import json
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from cyclopts import App

from insitu.cli.common import StateDir, connect, plainly
from insitu.live.records import FeedbackStatus

feedback = App(
    name="feedback", help="What was posted to be learned: look at it, hold it back, let it go on, withdraw it."
)

_PAGE = 1000


@feedback.command(name="list")
@plainly
def list_(*, status: FeedbackStatus | None = None, limit: int = 100, state_dir: StateDir = None) -> None:
    """Feedback in order of arrival.

    Args:
        status: Only what is in this status.
        limit: Most items to show; 0 shows all.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table("id", "posted", "kind", "status", "version", "reason")
    for i, item in enumerate(_all(connect(state_dir), "" if status is None else f"&status={status}")):
        if i == limit > 0:
            break
        posted = datetime.fromtimestamp(item["created"]).strftime("%Y-%m-%d %H:%M:%S")
        reason = item["reason"] or ""
        table.add_row(item["id"], posted, item["kind"], item["status"], item["weight_version"] or "", reason)
    Console().print(table)


@feedback.command
@plainly
def show(id: str, /, *, state_dir: StateDir = None) -> None:
    """One item with what it is to teach."""
    item = connect(state_dir).get(f"/v1/feedback/{id}?content=true")
    sys.stdout.write(json.dumps(item, indent=2, ensure_ascii=False) + "\n")


@feedback.command
@plainly
def hold(*ids: str, state_dir: StateDir = None) -> None:
    """Let no job take these up until they are released."""
    _each(state_dir, ids, "POST", "/hold")


@feedback.command
@plainly
def release(*ids: str, state_dir: StateDir = None) -> None:
    """Put held ones back into the queue, in their old place."""
    _each(state_dir, ids, "POST", "/release")


@feedback.command
@plainly
def withdraw(*ids: str, state_dir: StateDir = None) -> None:
    """Never learn these; only what is queued or held can be withdrawn."""
    _each(state_dir, ids, "DELETE", "")


@plainly
def events(*, follow: bool = False, limit: int = 50, state_dir: StateDir = None) -> None:
    """What happened last: one JSON object a line.

    Args:
        follow: Go on as more happens, until Ctrl-C.
        limit: How many to begin with, 1000 at most.
    """
    client = connect(state_dir)
    page = client.get(f"/v1/live/events?limit={limit}")
    last = 0
    while True:
        for event in page["data"]:
            sys.stdout.write(json.dumps(event, ensure_ascii=False) + "\n")
            last = event["id"]
        sys.stdout.flush()
        if not follow:
            return
        if len(page["data"]) < _PAGE:
            time.sleep(0.5)
        page = client.get(f"/v1/live/events?after={last}&limit={_PAGE}")


def _all(client: Any, query: str) -> Iterator[dict[str, Any]]:
    """Every item, page by page."""
    after = ""
    while True:
        page = client.get(f"/v1/feedback?limit={_PAGE}{query}{after}")
        yield from page["data"]
        if not page["has_more"]:
            return
        after = f"&after={page['last_id']}"


def _each(state_dir: Any, ids: tuple[str, ...], method: str, path: str) -> None:
    client = connect(state_dir)
    for id in ids:
        item = client.request(method, f"/v1/feedback/{id}{path}").json()
        sys.stdout.write(f"{item['id']} {item['status']}\n")
