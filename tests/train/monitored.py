"""A run of Trainer that a test can watch: a tiny model, a word tokenizer, and data made on the spot."""

import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

CONTEXT = 128
# Words that are spelt differently, so that distinct words are distinct characters too.
WORDS = [f"{a}{b}{c}" for a in "bcdfghjk" for b in "aeiou" for c in "lmnpr"]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "The", "I", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def tiny_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4 + len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=CONTEXT, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def as_example(text: str) -> dict[str, list[int]]:
    ids: list[int] = tokenizer()(text)["input_ids"]
    return {"input_ids": ids, "labels": ids}


def varied(count: int, length: int = 24) -> list[dict[str, list[int]]]:
    """Texts of words in no order, each beginning like the monitor's prompts."""
    chance = random.Random(0)
    return [
        as_example(" ".join([chance.choice(["The", "I"]), *chance.choices(WORDS, k=length - 1)])) for _ in range(count)
    ]


def repeated(count: int, length: int = 24) -> list[dict[str, list[int]]]:
    """One document of one word."""
    return [as_example(" ".join(["The", *["bal"] * (length - 1)]))] * count


def trainer(
    path: Path, data: Sequence[Any], callbacks: Sequence[Any] = (), model: Any = None, **changes: Any
) -> Trainer:
    """A Trainer of AdamW that logs the loss of every step."""
    arguments: dict[str, Any] = {
        "output_dir": str(path), "max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 3e-3,
        "save_strategy": "no", "logging_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 0, **changes,
    }  # fmt: skip
    return Trainer(
        model=tiny_model() if model is None else model,
        args=TrainingArguments(**arguments),
        train_dataset=list(data),
        callbacks=list(callbacks),
    )


def run(trainer: Trainer, **options: Any) -> list[float]:
    """Train, and return the loss of each step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of others
        trainer.train(**options)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
