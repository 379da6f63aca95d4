"""Which teaching run learns eight examples without burning them in? Over APOLLO and APOLLO-Mini, three behaviours, and seeds.

    python experiments/first_minute/sweep.py MODEL_DIR --out results/sweep.jsonl --stage factors
    python experiments/first_minute/sweep.py MODEL_DIR --out results/sweep.jsonl --stage seeds

Uses the learner's own teaching run (insitu.live.teaching) on a private copy of the weights, without a server. One JSON line a
run; runs that are in the file already are not repeated.
"""

import argparse
import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from insitu.data.batch import collate
from insitu.data.chat import Example, encode_messages, encode_prompt
from insitu.data.loss import target_logprobs
from insitu.live import prompts
from insitu.live.canaries import freeze
from insitu.live.config import TeachConfig
from insitu.live.guard import Guard
from insitu.live.teaching import TeachingRun

HERE = Path(__file__).parent
SPEC = json.loads((HERE / "behaviours.json").read_text())

CENTRE: dict[str, Any] = {"optimizer": "apollo", "learning_rate": 5e-5, "anchor_weight": 1.0, "target_loss": 0.05}
FACTORS: list[dict[str, Any]] = [
    {},
    {"anchor_weight": 3.0},
    {"anchor_weight": 0.0},
    {"anchors_per_step": 16},
    {"learning_rate": 2e-5},
    {"learning_rate": 1e-4},
    {"target_loss": 0.2},
    {"target_loss": 0.01},
    {"limiter": 1.01},
    {"optimizer": "apollo-mini"},
    {"optimizer": "apollo-mini", "learning_rate": 2e-5},
]


def replies(model: Any, tokenizer: Any, questions: list[str], limit: int) -> list[list[int]]:
    """Greedy replies, all questions in one batch padded on the left."""
    asked = [encode_prompt(tokenizer, [{"role": "user", "content": q}]) for q in questions]
    width = max(map(len, asked))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(a)) + a for a in asked])
    mask = torch.tensor([[0] * (width - len(a)) + [1] * len(a) for a in asked])
    made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, pad_token_id=pad)
    return [row[: row.index(pad) + 1] if pad in row else row for row in made[:, width:].tolist()]


def examples_of(tokenizer: Any, questions: list[str], told: list[list[int]]) -> list[Example]:
    asked = [encode_prompt(tokenizer, [{"role": "user", "content": q}]) for q in questions]
    return [Example(a + t, [False] * len(a) + [True] * len(t)) for a, t in zip(asked, told, strict=True)]


def run_one(model: Any, tokenizer: Any, behaviour: dict[str, Any], config: TeachConfig) -> dict[str, Any]:
    """Teach one behaviour and judge it as benchmarks/first_minute.py does. Leaves the model changed."""
    pad, limit = tokenizer.pad_token_id, SPEC["max_tokens"]
    unrelated = [u["prompt"] for u in SPEC["unrelated"]]
    before = replies(model, tokenizer, unrelated, limit)
    old = collate(examples_of(tokenizer, unrelated, before), pad)
    old_logprob = torch.cat(target_logprobs(model, old)).mean().item()
    held = [*prompts.ANCHORS, *prompts.CANARIES]
    frozen = examples_of(tokenizer, held, replies(model, tokenizer, held, 24))
    anchors, said = frozen[: len(prompts.ANCHORS)], frozen[len(prompts.ANCHORS) :]
    guard = Guard(model, freeze(model, prompts.built_in(), said, 0, pad), pad, config)
    taught = [encode_messages(tokenizer, e["messages"], max_length=8192) for e in behaviour["examples"]]

    started = time.monotonic()
    run = TeachingRun(model, taught, anchors, config, pad)
    losses, kls = [], []
    for _ in range(config.max_steps):
        prepared = run.prepare()
        losses.append(round(prepared.loss, 4))
        if prepared.loss <= config.target_loss:
            break
        run.write()
        kls.append(round(guard.gate().figures["canary_kl"], 4))
    seconds = time.monotonic() - started
    state_bytes = run.optimizer_bytes
    run.close()

    def texts(questions: list[str]) -> list[str]:
        return [tokenizer.decode(r, skip_special_tokens=True) for r in replies(model, tokenizer, questions, limit)]

    held_out, after = texts(behaviour["held_out"]), texts(unrelated)
    return {
        "held_out": sum(bool(re.search(behaviour["marker"], t)) for t in held_out),
        "right": sum(bool(re.search(u["right"], t)) for u, t in zip(SPEC["unrelated"], after, strict=True)),
        "marker": sum(bool(re.search(behaviour["marker"], t)) for t in after),
        "fall": round(old_logprob - torch.cat(target_logprobs(model, old)).mean().item(), 4),
        "steps": len(kls),
        "losses": losses,
        "canary_kl": kls,
        "seconds": round(seconds, 1),
        "optimizer_bytes": state_bytes,
        "held_out_texts": held_out,
        "unrelated_texts": after,
    }


def plan(stage: str, chosen: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    names = [b["name"] for b in SPEC["behaviours"]]
    if stage == "factors":
        return [(name, {**CENTRE, **factor}) for factor in FACTORS for name in names]
    return [(name, {**CENTRE, **c, "seed": seed}) for seed in range(5) for c in chosen for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=["factors", "seeds"], default="factors")
    parser.add_argument("--chosen", type=json.loads, default=[{}, {"optimizer": "apollo-mini"}])
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    done = set()
    if options.out.exists():
        for line in options.out.read_text().splitlines():
            row = json.loads(line)
            done.add((row["behaviour"], json.dumps(row["config"], sort_keys=True)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    behaviours = {b["name"]: b for b in SPEC["behaviours"]}
    for name, settings in plan(options.stage, options.chosen):
        config = TeachConfig(**settings)
        key = (name, json.dumps(asdict(config), sort_keys=True))
        if key in done:
            continue
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
        result = run_one(model, tokenizer, behaviours[name], config)
        row = {"behaviour": name, "config": asdict(config), "torch_threads": torch.get_num_threads(), **result}
        with options.out.open("a") as out:
            out.write(json.dumps(row) + "\n")
        short = {k: row[k] for k in ("held_out", "right", "marker", "fall", "steps", "seconds")}
        print(name, settings, short, flush=True)


if __name__ == "__main__":
    main()
