"""A run small enough for a test: texts made on the spot, a model of two layers, some steps of a fraction of a second."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

from insitu.train.config import TrainConfig, resolve
from insitu.train.prepare import prepare
from insitu.train.run import Run

WORDS = [
    "the",
    "a",
    "of",
    "and",
    "to",
    "in",
    "is",
    "was",
    "he",
    "she",
    "it",
    "for",
    "on",
    "with",
    "as",
    "at",
    "by",
    "from",
    "river",
    "stone",
    "light",
    "door",
    "house",
    "word",
    "under",
    "over",
]


def write_texts(directory: Path) -> None:
    """Two sources of 60 documents, whose words come in different orders."""
    for name, seed in (("prose", 1), ("lists", 2)):
        dice = random.Random(seed)
        words = WORDS if name == "prose" else sorted(WORDS)
        documents = [" ".join(dice.choices(words[: 9 + seed * 8], k=dice.randint(20, 60))) for _ in range(60)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def content(directory: Path, **changes: Any) -> dict[str, Any]:
    """Sections of a run whose texts are in ``directory``; ``changes`` is laid over each: training={"max_steps": 3}."""
    if not (directory / "prose.jsonl").exists():
        write_texts(directory)
    sections: dict[str, Any] = {
        "model": {
            "name": "andrea-tiny",
            "options": {
                "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                "max_position_embeddings": 64, "dropout": 0.1,
            },
        },
        "data": {
            "sources": [{"name": name, "path": str(directory / f"{name}.jsonl")} for name in ("prose", "lists")],
            "tokenizer": {"vocab_size": 280}, "sequence_length": 16, "validation": 0.1, "hold": [1, 3],
        },
        "optimizer": {"name": "apollo", "options": {"rank": 4, "refresh": 3}},
        "monitor": {"every": 0},
        "training": {
            "output_dir": str(directory / "out"), "max_steps": 12, "save_steps": 4, "save_total_limit": 2, "logging_steps": 3,
            "learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True,
            "disable_tqdm": True, "seed": 3,
        },
    }  # fmt: skip
    for name, values in changes.items():
        sections[name] = {**sections.get(name, {}), **values}
    return sections


def config_of(directory: Path, **changes: Any) -> TrainConfig:
    return resolve(content(directory, **changes))


def write_config(directory: Path, **changes: Any) -> Path:
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(content(directory, **changes)))
    return path


def trained(directory: Path, *, resume: bool = False, **changes: Any) -> Run:
    run = prepare(config_of(directory, **changes), resume=resume)
    assert isinstance(run, Run)
    run.train()
    return run


def losses(output_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output_dir / "losses.jsonl").read_text().splitlines()]
