"""What exact versions cost: bytes, seconds to write, seconds to go back; and that fifty of them rebuild the head bit for bit.

    python benchmarks/versions.py --out benchmarks/results/versions.json

About ten minutes on two idle cores. Real lessons on SmolLM2-135M by the learner's own code, without a server: its arena, its
teaching run, its versions and store. ``restore`` is what a rollback does while serving stands still.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from environment import environment
from insitu import demo
from insitu.data.chat import Example, encode_messages, encode_prompt
from insitu.live import disk, prompts, source
from insitu.live.checkpoint import checkpoint_files, read
from insitu.live.config import TeachConfig
from insitu.live.store import Store
from insitu.live.teaching import TeachingRun
from insitu.live.versions import Versions
from insitu.live.weights import attach
from insitu.live.weights.arena import DTYPES, Arena

LIMITS = {"lesson_share": 0.12, "step_share": 0.05, "write_seconds": 2.0}
LIMITS |= {"rollback_seconds": 1.0, "rollback_ten_seconds": 1.0}


class Lessons:
    """A state directory with versions, and the model that they are of."""

    def __init__(self, base: Path, state_dir: Path, dtype: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        skeleton = attach.skeleton(base, DTYPES[dtype])
        self.aliases = attach.tied(skeleton)
        self.arena = Arena.create(attach.layout(skeleton))
        attach.fill(self.arena.views(), read(checkpoint_files(base)), self.aliases)
        self.model = attach.build(base, self.arena, requires_grad=True)
        self.store = Store(state_dir / "insitu.db")
        self.versions = Versions(state_dir, base, self.store)
        self.versions.bring_up(self.arena, self.aliases)
        self.weight_bytes = sum(slot.num_bytes for slot in self.arena.slots)
        self.anchors = [self._reply(question) for question in prompts.ANCHORS]

    def _reply(self, question: str) -> Example:
        """What the model says itself, as the learner's anchors are."""
        prompt = encode_prompt(self.tokenizer, [{"role": "user", "content": question}])
        told = self.model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0].tolist()
        return Example(told, [False] * len(prompt) + [True] * (len(told) - len(prompt)))

    def teach(self, examples: Sequence[dict[str, Any]], config: TeachConfig) -> dict[str, Any]:
        """One version; returns its figures."""
        encoded = [encode_messages(self.tokenizer, e["messages"], max_length=2048) for e in examples]
        version = self.store.reserve("teach", self.store.head())
        run = TeachingRun(self.model, encoded, self.anchors, config, int(self.tokenizer.pad_token_id or 0))
        steps = 0
        while steps < config.max_steps:
            if run.prepare().loss <= config.target_loss:
                break
            run.write()
            steps += 1
        run.close()
        begun = time.perf_counter()
        file = self.versions.write(version, self.arena.views())
        seconds = time.perf_counter() - begun
        self.store.commit(version, self.arena.sha256(), {}, file)
        self.arena.stamp(version)
        begun = time.perf_counter()
        self.versions.keep_image(version, self.arena.views())
        return {
            "version": version,
            "steps": steps,
            "share": file.bytes / self.weight_bytes,
            "write_seconds": seconds,
            "image_seconds": time.perf_counter() - begun,
            "update_norm_ratio": file.norm_ratio,
        }

    def back_by(self, version: int) -> dict[str, float]:
        """A version far from any that is there in full: seconds beside serving, and seconds while it stands still."""
        kept = self.versions.full()
        begun = time.perf_counter()
        self.versions.bring_near(version)
        beside = time.perf_counter() - begun
        seconds = self.restore(version)
        self.versions.images.keep_only(kept)
        return {"beside": beside, "still": seconds}

    def restore(self, version: int) -> float:
        """Seconds of what a rollback does while serving stands still, its bytes checked."""
        begun = time.perf_counter()
        self.versions.restore(version, self.arena, self.aliases)
        return time.perf_counter() - begun


def one_lesson(base: Path, dtype: str) -> dict[str, Any]:
    """The demo's first lesson at the defaults, and a single step of it, each from version 0."""
    with tempfile.TemporaryDirectory() as directory:
        lessons = Lessons(base, Path(directory), dtype)
        examples = next(b for b in demo.SPEC["behaviours"] if b["name"] == "fact")["examples"]
        lesson = lessons.teach(examples, TeachConfig())
        back = lessons.restore(0)
        lessons.store.commit(lessons.store.reserve("rollback", lesson["version"], target=0), lessons.arena.sha256(), {})
        step = lessons.teach(examples, TeachConfig(max_steps=1))
        return {"lesson": lesson, "step": step, "back_to_base_seconds": back, "weight_bytes": lessons.weight_bytes}


def chain(base: Path, count: int) -> dict[str, Any]:
    """So many small lessons one after the other, each of another example; then every way back."""
    with tempfile.TemporaryDirectory() as directory:
        lessons = Lessons(base, Path(directory), "bfloat16")
        examples = [e for behaviour in demo.SPEC["behaviours"] for e in behaviour["examples"]]
        config = TeachConfig(max_steps=1, warmup_steps=0)
        made = []
        for i in range(count):
            made.append(lessons.teach([examples[i % len(examples)]], replace(config, seed=i)))
            print(
                f"version {made[-1]['version']}: {made[-1]['share']:.2%}, {made[-1]['write_seconds']:.2f} s", flush=True
            )
        head = made[-1]["version"]
        recorded = lessons.store.version(head)
        assert recorded is not None
        found: dict[str, Any] = {"versions": made, "bytes": disk.usage(lessons.versions.directory)}
        found["undo"] = [lessons.restore(head) for _ in range(5)]
        found["rollback_one"] = [lessons.restore(head - 1) for _ in range(5)]
        found["rollback_ten"] = [lessons.back_by(head - distance) for distance in (10, 11, 12)]
        begun = time.perf_counter()
        lessons.arena.mark_writing()
        with torch.no_grad():
            attach.fill(lessons.arena.views(), lessons.versions.iter_version(head, replay=True), lessons.aliases)
        found["replay_seconds"] = time.perf_counter() - begun
        found["replay_is_the_head_bit_for_bit"] = lessons.arena.sha256() == recorded.sha256
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count", type=int, default=50)
    told = parser.parse_args()
    base = source.resolve(told.model, yes=True)
    result: dict[str, Any] = {"environment": environment("zstandard"), "model": told.model, "limits": LIMITS}
    for dtype in ("bfloat16", "float32"):
        result[dtype] = one_lesson(base, dtype)
        print(dtype, json.dumps(result[dtype], indent=1), flush=True)
    result["chain"] = found = chain(base, told.count)
    figures = {
        "lesson_share": result["bfloat16"]["lesson"]["share"],
        "step_share": max(result["bfloat16"]["step"]["share"], *(v["share"] for v in found["versions"])),
        "write_seconds": statistics.median(v["write_seconds"] for v in found["versions"]),
        "rollback_seconds": statistics.median(found["rollback_one"]),
        "rollback_ten_seconds": statistics.median(row["still"] for row in found["rollback_ten"]),
    }
    result["figures"] = {
        **figures,
        "longest_write_seconds": max(v["write_seconds"] for v in found["versions"]),
        "lesson_write_seconds": result["bfloat16"]["lesson"]["write_seconds"],
    }
    result["met"] = {name: figures[name] < limit for name, limit in LIMITS.items()}
    result["met"]["replay"] = found["replay_is_the_head_bit_for_bit"]
    print(json.dumps({"figures": result["figures"], "met": result["met"]}, indent=1))
    if told.out:
        told.out.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(0 if all(result["met"].values()) else 1)


if __name__ == "__main__":
    main()
