"""Does the guard let good lessons through and stop bad ones? On SmolLM2-135M, with the real engine, transaction and guard.

    python benchmarks/guard.py --out benchmarks/results/guard.json [--only benign/ ladder/3 ...] [--list]

Runs, each from the bytes of version 0 and undone afterwards:

    benign/NAME    the 20 lessons of guard_jobs.json at the default settings: at most one may be refused
    ladder/FACTOR  the demo's `fact` at so many times the default rate: never milder as the rate grows, and a job that passes
                   keeps at least 10 of the 12 unrelated answers
    burn/NAME      trained on to a loss of 0.001, with anchors and without: a warning or a refusal
    fault/NAME     a loss that is NaN at the third step, a rate of 1e3, replies of 100 repeated tokens: refused or undone, and
                   the replies to the canaries are what they were, to the letter
    anchors/ARM    fact, format and way one after the other, without anchors, with them, with replay too: what is kept
    drift/many     the 20 lessons one after the other, none undone: what adds up against version 0

One run takes one to six minutes on two idle cores, anchors/ARM some five, drift/many half an hour. What is in the output
already is not run again, so a run that was interrupted goes on; --only takes whole names, or a group with its slash.
"""

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from environment import environment
from in_process import World, world
from insitu import demo
from insitu.live import prompts, teaching
from insitu.live.api.live import jsonable
from insitu.live.config import TeachConfig
from insitu.live.records import Version

JOBS = json.loads(Path(__file__).with_name("guard_jobs.json").read_text())["jobs"]
UNRELATED = demo.SPEC["unrelated"]
BEHAVIOURS = {b["name"]: b for b in demo.SPEC["behaviours"]}
RATE = TeachConfig().learning_rate
LADDER = (1, 3, 10, 30, 100)
LEVELS = ("pass", "warn", "refuse")
ARMS = {"off": {"anchor_weight": 0.0}, "prompts": {}, "prompts+replay": {"replay": 8}}


def examples_of(name: str) -> list[Any]:
    if name in BEHAVIOURS:
        return [example["messages"] for example in BEHAVIOURS[name]["examples"]]
    pairs = next(job["examples"] for job in JOBS if job["name"] == name)
    return [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]


def job(at: World, name: str, lesson: Sequence[Any], **settings: Any) -> dict[str, Any]:
    """Teach, and ask the unrelated prompts of the served model; whatever was committed stays."""
    begun = time.monotonic()
    version, refused = at.teach(f"{name} {begun}", lesson, TeachConfig(**settings))
    seconds = time.monotonic() - begun
    texts = at.say([u["prompt"] for u in UNRELATED], demo.SPEC["max_tokens"], together=4)
    return {
        "settings": settings,
        "level": level_of(version),
        "status": version.status if version else "refused before training",
        "reasons": refused or (version.report["verdict"]["reasons"] if version else []),
        "right": sum(re.search(u["right"], text) is not None for u, text in zip(UNRELATED, texts, strict=True)),
        "seconds": round(seconds, 1),
        "report": jsonable(version.report) if version else None,
        "unrelated": texts,
    }


def level_of(version: Version | None) -> str:
    if version is None or version.status != "committed":
        return "refuse"
    return str(version.report["verdict"]["level"])


# -- the runs ----------------------------------------------------------------------------------------------------------
def undone(at: World, name: str, lesson: Sequence[Any], **settings: Any) -> dict[str, Any]:
    """A job, judged by whether a refusal left nothing behind, and then undone."""
    canaries = at.say(prompts.CANARIES, 24)
    result = job(at, name, lesson, **settings)
    if result["level"] == "refuse":
        result["restored"] = at.back_to_start() and at.say(prompts.CANARIES, 24) == canaries
    assert at.back_to_start()
    return result


def nan_loss(at: World) -> dict[str, Any]:
    """At the third step the loss is NaN, as broken arithmetic would have it; two steps are written and served by then."""
    real, calls = teaching.example_loss, 0

    def broken(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(*arguments) * (math.nan if calls > 2 else 1.0)

    teaching.example_loss = broken
    try:
        return undone(at, "nan", examples_of("fact"))
    finally:
        teaching.example_loss = real


def repeated_tokens(at: World) -> dict[str, Any]:
    asked = [messages[0]["content"] for messages in examples_of("fact")]
    lesson = [[{"role": "user", "content": q}, {"role": "assistant", "content": " the" * 100}] for q in asked]
    return undone(at, "repeated", lesson)


def three_lessons(at: World, arm: str) -> dict[str, Any]:
    """After each lesson: the unrelated answers that are right, those with any of the markers, and each lesson's held-out
    prompts that are answered in its way."""
    rows = []
    for count, name in enumerate(BEHAVIOURS, 1):
        row = job(at, name, examples_of(name), **ARMS[arm])
        row["lesson"] = name
        row["leaked"] = sum(
            any(re.search(BEHAVIOURS[b]["marker"], text) for b in list(BEHAVIOURS)[:count]) for text in row["unrelated"]
        )
        row["held_out"] = {}
        for earlier in list(BEHAVIOURS)[:count]:
            told = at.say(BEHAVIOURS[earlier]["held_out"], demo.SPEC["max_tokens"], together=4)
            row["held_out"][earlier] = sum(re.search(BEHAVIOURS[earlier]["marker"], text) is not None for text in told)
        rows.append(row)
        print(
            f"  {arm} {name}: {row['level']}, right {row['right']}, leaked {row['leaked']}, {row['held_out']}",
            flush=True,
        )
    assert at.back_to_start()
    return {"level": max((row["level"] for row in rows), key=LEVELS.index), "right": rows[-1]["right"], "lessons": rows}


def many(at: World) -> dict[str, Any]:
    rows = []
    for each in JOBS:
        row = {"lesson": each["name"], **job(at, each["name"], examples_of(each["name"]))}
        rows.append(row)
        figures = row["report"]["verdict"]["figures"] if row["report"] else {}
        print(f"  {each['name']}: {row['level']}, right {row['right']}, drift {figures.get('drift_kl')}", flush=True)
    assert at.back_to_start()
    return {"level": max((row["level"] for row in rows), key=LEVELS.index), "right": rows[-1]["right"], "lessons": rows}


def over_trained(at: World, **settings: Any) -> dict[str, Any]:
    return undone(at, "burn", examples_of("fact"), target_loss=0.001, max_steps=60, **settings)


def plan() -> dict[str, Callable[[World], dict[str, Any]]]:
    runs: dict[str, Callable[[World], dict[str, Any]]] = {}
    for each in JOBS:
        runs[f"benign/{each['name']}"] = lambda at, name=each["name"]: undone(at, name, examples_of(name))
    for factor in LADDER:
        runs[f"ladder/{factor}"] = lambda at, factor=factor: undone(
            at, "ladder", examples_of("fact"), learning_rate=factor * RATE
        )
    runs["burn/anchors"] = over_trained
    runs["burn/free"] = lambda at: over_trained(at, anchor_weight=0.0)
    runs["fault/nan-loss"] = nan_loss
    runs["fault/rate-1e3"] = lambda at: undone(at, "rate", examples_of("fact"), learning_rate=1e3)
    runs["fault/repeated-tokens"] = repeated_tokens
    for arm in ARMS:
        runs[f"anchors/{arm}"] = lambda at, arm=arm: three_lessons(at, arm)
    runs["drift/many"] = many
    return runs


# -- what is claimed ---------------------------------------------------------------------------------------------------
def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each claim: None until all its runs are there."""

    def of(group: str) -> dict[str, dict[str, Any]] | None:
        names = [name for name in plan() if name.startswith(group)]
        return {name: runs[name] for name in names} if all(name in runs for name in names) else None

    benign, ladder, burn, fault = of("benign/"), of("ladder/"), of("burn/"), of("fault/")
    levels = [LEVELS.index(run["level"]) for run in ladder.values()] if ladder else []
    judged = {**(benign or {}), **(ladder or {})}
    return {
        "levels": {name: run["level"] for name, run in runs.items()},
        "at most one of twenty benign jobs refused": benign
        and sum(run["level"] == "refuse" for run in benign.values()) <= 1,
        "never milder at a higher rate, from pass to refuse": ladder
        and levels == sorted(levels)
        and levels[0] < levels[-1] == 2,
        "every job that passes keeps 10 of 12": None
        if not judged
        else all(run["right"] >= 10 for run in judged.values() if run["level"] == "pass"),
        "over-training is noticed": burn and all(run["level"] != "pass" for run in burn.values()),
        "faults leave nothing behind": fault
        and all(run["level"] == "refuse" and run["restored"] for run in fault.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "guard.json")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", nargs="*", help="names of runs, or groups such as benign/")
    parser.add_argument("--list", action="store_true", help="show the names and end")
    options = parser.parse_args()
    wanted = options.only or [""]
    chosen = {n: run for n, run in plan().items() if n in wanted or n[: n.find("/") + 1] in wanted or wanted == [""]}
    if options.list:
        print("\n".join(chosen))
        return
    report: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"runs": {}}
    missing = {name: run for name, run in chosen.items() if name not in report["runs"]}
    facts = environment("transformers")
    if missing:
        with world(options.model) as at:
            if "before" not in report:
                texts = at.say([u["prompt"] for u in UNRELATED], demo.SPEC["max_tokens"], together=4)
                right = sum(re.search(u["right"], text) is not None for u, text in zip(UNRELATED, texts, strict=True))
                report["before"] = {"right": right, "unrelated": texts}
            for name, run in missing.items():
                # Each run says what it was made with: an interrupted benchmark may go on another day.
                report["runs"][name] = {**run(at), "environment": facts}
                report["summary"] = summary(report["runs"])
                partial = options.out.with_suffix(".partial")
                partial.write_text(json.dumps(report, indent=1) + "\n")
                partial.replace(options.out)
                found = report["runs"][name]
                print(f"{name}: {found['level']}, right {found['right']}/12 {found.get('reasons', '')}", flush=True)
    report["summary"] = summary(report["runs"])
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["summary"], indent=1))
    if any(claim is False for claim in report["summary"].values()):
        sys.exit("a claim does not hold")


if __name__ == "__main__":
    main()
