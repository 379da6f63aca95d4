"""The verbs that talk to the model and teach it."""

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from insitu.cli.common import StateDir, connect, plainly


@plainly
def chat(*, state_dir: StateDir = None, max_tokens: int = 256, temperature: float = 0.0) -> None:
    """Talk to the served model. After a reply, `/no TEXT` teaches what it should have said.

    Args:
        max_tokens: Longest reply.
        temperature: 0 takes the likeliest token each time.
    """
    from rich.console import Console

    client = connect(state_dir)
    console = Console()
    console.print(f"{client.facts['model']} at {client.facts['url']}. /no TEXT corrects the last reply, /quit ends.")
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = console.input("[bold]you:[/] ").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line.startswith("/no ") and messages:
            lesson = [*messages[:-1], {"role": "assistant", "content": line.removeprefix("/no ").strip()}]
            _learn(client, [{"messages": lesson}])
            messages = []
        elif line:
            messages.append({"role": "user", "content": line})
            pieces = []
            for piece in client.stream(messages, max_tokens, temperature):
                pieces.append(piece)
                console.out(piece, end="")
            console.print()
            messages.append({"role": "assistant", "content": "".join(pieces)})


@plainly
def learn(file: Annotated[str, Parameter(allow_leading_hyphen=True)], /, *, state_dir: StateDir = None) -> None:
    """Teach the served model the examples of FILE (JSONL with `messages`), `-` for standard input.

    Args:
        file: One example a line: {"messages": [...]} or {"context_ids": [...], "continuation_ids": [...]}.
    """
    from insitu.data.jsonl import read_jsonl
    from insitu.live.client import ClientError

    if file != "-" and not Path(file).is_file():
        raise ClientError(f"{file} does not exist; give a JSONL file, or - for standard input")
    examples = [example for _, example in read_jsonl(sys.stdin if file == "-" else Path(file))]
    if not examples:
        raise ClientError(f"{file} holds no examples")
    _learn(connect(state_dir), examples)


def _learn(client: Any, examples: list[dict[str, Any]]) -> None:
    """Post the examples, show progress, and tell what became of them; exit code 1 if any was refused."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    ids: list[str] = []
    items: list[dict[str, Any]] = []
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("posting", total=None)
        for example in examples:
            ids.append(client.post("/v1/feedback", example)["id"])
            progress.update(task, description=f"posted {len(ids)} of {len(examples)} examples")
        for items in client.wait_learned(ids):
            live = client.get("/v1/live")
            progress.update(
                task, description=f"learning {len(ids)} examples ({len(items)} done), weights {live['weight_version']}"
            )
    refused = [item for item in items if item["status"] != "applied"]
    for item in refused:
        console.print(f"{item['status']} {item['id']}: {item['reason'] or 'see insitu feedback list'}")
    if made := sorted({int(item["weight_version"]) for item in items if item["status"] == "applied"}):
        way = f", the last of {len(made)} since version {made[0]}" if len(made) > 1 else ""
        console.print(f"learned: the model is now version {made[-1]}{way}; undo with: insitu rollback V")
    if refused:
        sys.exit(1)
