"""TRL's trainers with our optimizers, on a tiny model made on the spot."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import insitu
from insitu.integrations.trainer import trainer_optimizer

pytest.importorskip("trl", reason="needs trl (and with it datasets): pip install trl")
transformers = pytest.importorskip("transformers")

WORDS = ["<pad>", "<s>", "</s>", "who", "what", "is", "our", "mascot", "an", "otter", "a", "badger", "named", "mara"]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=32
    )


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def dataset(**columns: str) -> Any:
    from datasets import Dataset

    return Dataset.from_list([columns] * 32)


def common(path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(path), "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 2e-2, "weight_decay": 0.1,
        "adam_beta2": 0.95, "save_strategy": "no", "logging_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "max_length": 16, **changes,
    }  # fmt: skip


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft(path: Path, **changes: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**common(path, **changes))
    return SFTTrainer(
        model=tiny_llama(), args=args, processing_class=tokenizer(),
        train_dataset=dataset(prompt="who is our mascot", completion=" an otter named mara"),
        optimizer_cls_and_kwargs=trainer_optimizer(args, insitu.APOLLO, rank=4),
    )  # fmt: skip


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


@pytest.fixture(autouse=True)
def _warnings_of_others() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_sft_learns_with_the_arguments_of_its_config_and_resumes_exactly(tmp_path: Path) -> None:
    whole = sft(tmp_path / "a", save_strategy="steps", save_steps=3)
    whole.train()
    groups = whole.optimizer.optimizer.param_groups
    assert type(whole.optimizer.optimizer) is insitu.APOLLO
    assert {group["role"] for group in groups} == {"matrix", "dense", "adamw"}
    assert {(group["role"], group["weight_decay"]) for group in groups} == {
        ("matrix", 0.1),
        ("dense", 0.1),
        ("adamw", 0.0),
    }
    assert all(group["betas"] == (0.9, 0.95) for group in groups)
    assert losses(whole)[-1] < losses(whole)[0] - 0.1
    resumed = sft(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert same(whole.model, resumed.model)


def test_dpo_takes_the_optimizer_through_the_attribute(tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(**common(tmp_path, max_steps=4))
    trainer = DPOTrainer(
        model=tiny_llama(), ref_model=tiny_llama(), args=args, processing_class=tokenizer(),
        train_dataset=dataset(prompt="who is our mascot", chosen=" an otter named mara", rejected=" a badger"),
    )  # fmt: skip
    trainer.optimizer_cls_and_kwargs = trainer_optimizer(args, insitu.APOLLOMini, dense="apollo")
    trainer.train()
    assert type(trainer.optimizer.optimizer) is insitu.APOLLOMini
    assert {group["role"] for group in trainer.optimizer.optimizer.param_groups} == {"matrix", "dense", "adamw"}
    assert losses(trainer)[-1] < losses(trainer)[0]
