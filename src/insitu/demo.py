"""The first minute: serve a real model, teach it something by eight examples, see it generalise, undo it exactly.

:func:`measure` does it and returns every prompt, reply and figure; :func:`show` is ``insitu demo`` and prints them. The same
measurement, over all behaviours and several seeds, is benchmarks/first_minute.py.
"""

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from insitu.live import source
from insitu.live.client import Client, ClientError
from insitu.live.weights.arena import resident

SPEC: dict[str, Any] = json.loads(Path(__file__).with_name("behaviours.json").read_text())
TARGETS = {"held_out_before": 1, "held_out_after": 6, "marker": 1, "right": 9, "fall": 0.3}


@contextmanager
def served(
    model: str, state_dir: Path, *, seed: int = 0, yes: bool = False, options: Sequence[str] = ()
) -> Iterator[Client]:
    """A server of its own on a free port, as ``insitu serve`` starts it; ended and reaped at the end."""
    command = [sys.executable, "-m", "insitu.cli", "serve", model, "--port", "0", "--state-dir", str(state_dir)]
    command += ["--teach.seed", str(seed), *options, *(["--yes"] if yes else [])]
    with (state_dir / "server.log").open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 300
        while not (state_dir / "server.json").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                told = (state_dir / "server.log").read_text().strip().splitlines()
                raise ClientError(f"the server did not start: {told[-1] if told else 'it said nothing'}")
            time.sleep(0.05)
        with Client(state_dir) as client:
            while client.get("/v1/live")["learner"]["state"] != "ready":
                time.sleep(0.1)
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(client: Client, prompts: Sequence[str], together: int = 1) -> list[str]:
    """Greedy replies. One request after the other where texts are to be compared: in bf16 a reply can depend on what else
    is in the batch."""

    def reply(prompt: str) -> str:
        return client.reply([{"role": "user", "content": prompt}], SPEC["max_tokens"])[0]

    with ThreadPoolExecutor(together) as pool:
        return list(pool.map(reply, prompts))


def teach(client: Client, examples: Sequence[dict[str, Any]], on_progress: Callable[[str], None]) -> dict[str, Any]:
    """Post the examples and wait for their version; returns its entry in /v1/live/versions. ClientError if refused."""
    ids = [client.post("/v1/feedback", {"messages": example["messages"]})["id"] for example in examples]
    items: list[dict[str, Any]] = []
    for items in client.wait_learned(ids):  # noqa: B007 - the last one is read below
        on_progress(client.get("/v1/live")["weight_version"])
    if refused := [item for item in items if item["status"] != "applied"]:
        raise ClientError(f"the lesson was {refused[0]['status']}: {refused[0]['reason']}")
    made: dict[str, Any] = client.get("/v1/live/versions")["data"][-1]
    return made


def old_logprobs(client: Client, tokenizer: Any, prompts: Sequence[str], replies: Sequence[str]) -> list[float]:
    """What the served weights think now, in nats, of each token of replies they gave before."""
    from insitu.data.chat import encode_messages

    found: list[float] = []
    for prompt, reply in zip(prompts, replies, strict=True):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        example = encode_messages(tokenizer, turns, max_length=1 << 20)
        body = {
            "model": client.facts["model"],
            "prompt": example.input_ids,
            "echo": True,
            "max_tokens": 0,
            "logprobs": 0,
        }
        told = client.post("/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
        found += [logprob for logprob, target in zip(told, example.loss_mask, strict=True) if target]
    return found


def process_bytes(client: Client) -> dict[str, int]:
    """Peak resident bytes of the two processes that hold the arena, and the arena's Rss and Pss in both."""
    live = client.get("/v1/live")
    pids = [live["arena"]["pid"], live["learner"]["pid"]]
    peak = 0
    for pid in pids:
        match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        assert match is not None
        peak += int(match[1]) * 1024
    arenas = [resident(pid) for pid in pids]
    return {
        "peak_rss": peak,
        "arena_rss": sum(a["rss"] for a in arenas),
        "arena_pss": sum(a["pss"] for a in arenas),
        "arena_private_dirty": sum(a["private_dirty"] for a in arenas),
    }


def measure(
    client: Client,
    behaviour: dict[str, Any],
    tokenizer: Any,
    say: Callable[[str], None],
    before: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Ask, teach, ask, undo, ask. ``before`` may carry replies of the same weights from an earlier call: ``sha256`` and, by
    prompt, ``texts``."""
    asked = [u["prompt"] for u in SPEC["unrelated"]]
    start = client.get("/v1/live")["head"]
    sha_before = _sha256(client, start)
    say("asking before")
    known = before["texts"] if before and before["sha256"] == sha_before else {}
    missing = [prompt for prompt in [*behaviour["held_out"], *asked] if prompt not in known]
    known = {**known, **dict(zip(missing, ask(client, missing), strict=True))}
    held_before, kept_before = [known[p] for p in behaviour["held_out"]], [known[p] for p in asked]
    old = old_logprobs(client, tokenizer, asked, kept_before)
    begun = time.monotonic()
    made = teach(client, behaviour["examples"], lambda version: say(f"teaching, weights {version}"))
    seconds = time.monotonic() - begun
    say("asking after")
    held_after = ask(client, behaviour["held_out"], together=4)
    kept_after = ask(client, asked, together=4)
    now = old_logprobs(client, tokenizer, asked, kept_before)
    memory = process_bytes(client)
    say("undoing")
    undone = client.post(f"/v1/live/versions/{start}/rollback")
    if undone["status"] != "done":
        raise ClientError(f"the rollback is {undone['status']}: {undone['reason']}")
    again = ask(client, [*behaviour["held_out"], *asked])
    return {
        "behaviour": behaviour["name"],
        "held_out": [
            {
                "prompt": p,
                "before": b,
                "after": a,
                "pass_before": _has(behaviour["marker"], b),
                "pass_after": _has(behaviour["marker"], a),
            }
            for p, b, a in zip(behaviour["held_out"], held_before, held_after, strict=True)
        ],
        "unrelated": [
            {
                "prompt": u["prompt"],
                "before": b,
                "after": a,
                "right_before": _has(u["right"], b),
                "right_after": _has(u["right"], a),
                "marker_after": _has(behaviour["marker"], a),
            }
            for u, b, a in zip(SPEC["unrelated"], kept_before, kept_after, strict=True)
        ],
        "fall": (sum(old) - sum(now)) / len(old),
        "rollback": {
            "sha256_before": sha_before,
            "sha256_after": _sha256(client, undone["version"]),
            "texts_equal": again == [*held_before, *kept_before],
        },
        "seeds": [made["report"]["config"]["seed"]],
        "steps": sum("canary_kl" in step for step in made["report"]["steps"]),
        "seconds": seconds,
        "bytes": {"weights": made["report"]["weight_bytes"], "optimizer": made["report"]["optimizer_bytes"], **memory},
        "version": made,
    }


def verdict(result: dict[str, Any]) -> dict[str, bool]:
    """Each target of :data:`TARGETS`, met or not."""
    right = [u for u in result["unrelated"] if u["right_before"]]
    lost = sum(not u["right_after"] for u in right)
    return {
        "new to the model": sum(h["pass_before"] for h in result["held_out"]) <= TARGETS["held_out_before"],
        "generalised": sum(h["pass_after"] for h in result["held_out"]) >= TARGETS["held_out_after"],
        "no leak": sum(u["marker_after"] for u in result["unrelated"]) <= TARGETS["marker"],
        "kept": len(result["unrelated"]) - lost >= TARGETS["right"],
        "old replies": result["fall"] <= TARGETS["fall"],
        "undone": result["rollback"]["sha256_before"] == result["rollback"]["sha256_after"]
        and result["rollback"]["texts_equal"],
    }


def show(name: str, *, model: str, seed: int, yes: bool, json_file: Path | None, engine: str = "embedded") -> bool:
    """``insitu demo``: print what happens, write the figures to ``json_file``, and say whether every target was met."""
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoTokenizer

    behaviours = {b["name"]: b for b in SPEC["behaviours"]}
    if name not in behaviours:
        raise ClientError(f"behaviour {name!r} does not exist; choose from {', '.join(behaviours)}")
    behaviour = behaviours[name]
    base = source.resolve(model, yes=yes)
    console = Console()
    console.print(f"[bold]Serving {model}[/], a real model, on this machine. Teaching it: {behaviour['about']}.")
    with (
        tempfile.TemporaryDirectory(prefix="insitu-demo-") as directory,
        served(model, Path(directory), seed=seed, yes=yes, options=["--engine", engine]) as client,
        console.status("") as status,
    ):
        result = measure(client, behaviour, AutoTokenizer.from_pretrained(base), status.update)
    table = Table("prompt (never taught)", "before", "after", show_lines=True)
    for row in result["held_out"]:
        mark = "[green]learned[/]" if row["pass_after"] else "[red]missed[/]"
        table.add_row(row["prompt"], _shorten(row["before"]), f"{_shorten(row['after'])}\n{mark}")
    console.print(table)
    kept = Table("prompt (unrelated)", "before", "after", show_lines=True)
    for row in result["unrelated"]:
        mark = "" if row["right_after"] else "\n[red]no longer right[/]"
        kept.add_row(row["prompt"], _shorten(row["before"]), _shorten(row["after"]) + mark)
    console.print(kept)
    memory = result["bytes"]
    console.print(
        f"{len(behaviour['examples'])} examples, {result['steps']} steps, {result['seconds']:.0f} s. "
        f"Weights {memory['weights'] / 1e6:.0f} MB, once for both processes (arena Pss {memory['arena_pss'] / 1e6:.0f} MB); "
        f"optimizer {memory['optimizer'] / 1e6:.0f} MB. "
        f"Old replies fell by {result['fall']:.2f} nats per token."
    )
    console.print(
        f"Undone: sha256 {result['rollback']['sha256_before'][:16]} before, {result['rollback']['sha256_after'][:16]} after; "
        f"every reply as before: {result['rollback']['texts_equal']}."
    )
    checks = verdict(result)
    console.print(
        "  ".join(f"[{'green' if ok else 'red'}]{what}: {'yes' if ok else 'NO'}[/]" for what, ok in checks.items())
    )
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1))
    return all(checks.values())


def _sha256(client: Client, version: int) -> str:
    return str(next(v["sha256"] for v in client.get("/v1/live/versions")["data"] if v["id"] == version))


def _has(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None


def _shorten(text: str, limit: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
