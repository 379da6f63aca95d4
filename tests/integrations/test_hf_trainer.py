"""Hugging Face Trainer with our optimizers: what its arguments say reaches every tensor, and a resume is exact."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import insitu
from insitu.integrations.trainer import trainer_optimizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "apollo": (insitu.APOLLO, {"rank": 4, "refresh": 2}),
    "mini": (insitu.APOLLOMini, {"dense": "apollo"}),
    "quasi-newton": (insitu.ApolloQN, {"warmup": 100, "decay": "decoupled"}),
}
KINDS = pytest.mark.parametrize("kind", OPTIMIZERS)


def tiny_llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, attention_bias=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def examples() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 61, (64, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(path: Path, **changes: Any) -> Any:
    given = {
        "output_dir": str(path), "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "weight_decay": 0.1, "lr_scheduler_type": "linear", "warmup_steps": 2, "save_strategy": "no",
        "logging_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 5, **changes,
    }  # fmt: skip
    return transformers.TrainingArguments(**given)


def trainer_of(args: Any, kind: str, model: nn.Module | None = None, **options: Any) -> Any:
    optimizer, usual = OPTIMIZERS[kind]
    return transformers.Trainer(
        model=model or tiny_llama(), args=args, train_dataset=examples(),
        optimizer_cls_and_kwargs=trainer_optimizer(args, optimizer, **{**usual, **options}),
    )  # fmt: skip


def train(trainer: Any, resume: str | None = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of others
        trainer.train(resume_from_checkpoint=resume)
    return trainer.model


def by_name(optimizer: Any) -> dict[str, dict[str, Any]]:
    return {name: group for group in optimizer.param_groups for name in group["param_names"]}


@KINDS
def test_weight_decay_follows_trainers_rule_and_every_tensor_keeps_its_role(kind: str, tmp_path: Path) -> None:
    trainer = trainer_of(arguments(tmp_path), kind)
    groups = by_name(trainer.create_optimizer())
    decays = trainer.get_decay_parameter_names(trainer.model)
    assert set(groups) == {name for name, _ in trainer.model.named_parameters()}
    for name, group in groups.items():
        assert group["weight_decay"] == (0.1 if name in decays else 0.0), name
        embedding = name in ("model.embed_tokens.weight", "lm_head.weight")
        vector = name.endswith(("bias", "norm.weight", "layernorm.weight"))
        assert group["role"] == ("dense" if embedding else "adamw" if vector else "matrix"), name
        assert vector != (name in decays), name


def test_what_trainer_names_by_name_alone_does_not_decay_though_it_is_projected(tmp_path: Path) -> None:
    model = tiny_llama()
    model.adapter_norm = nn.Linear(8, 8)  # a matrix, called a norm
    model.scale = nn.Parameter(torch.ones(3))  # a vector that is neither bias nor norm: Trainer lets it decay
    groups = by_name(trainer_of(arguments(tmp_path), "apollo", model).create_optimizer())
    assert (groups["adapter_norm.weight"]["role"], groups["adapter_norm.weight"]["weight_decay"]) == ("matrix", 0.0)
    assert (groups["scale"]["role"], groups["scale"]["weight_decay"]) == ("adamw", 0.1)


def test_betas_eps_and_the_learning_rate_reach_every_group_and_options_win(tmp_path: Path) -> None:
    args = arguments(tmp_path, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    for group in trainer_of(args, "apollo").create_optimizer().param_groups:
        assert (group["betas"], group["eps"], group["lr"], group["rank"]) == ((0.8, 0.95), 1e-6, 1e-2, 4)
    for group in trainer_of(args, "apollo", betas=(0.7, 0.9), lr=3e-3).create_optimizer().param_groups:
        assert (group["betas"], group["lr"]) == ((0.7, 0.9), 3e-3)


@KINDS
def test_the_trainer_is_the_loop_that_one_would_write(kind: str, tmp_path: Path) -> None:
    optimizer_class, options = OPTIMIZERS[kind]
    args = arguments(tmp_path, max_grad_norm=0.1)
    trainer = trainer_of(args, kind)
    batches: list[dict[str, torch.Tensor]] = []
    original = trainer.get_train_dataloader

    def noted() -> Any:
        loader = original()
        batches.extend({name: value.clone() for name, value in batch.items()} for batch in loader)
        return original()

    trainer.get_train_dataloader = noted
    trained = train(trainer)

    model, start = tiny_llama(), tiny_llama()
    decays = trainer.get_decay_parameter_names(model)
    groups = insitu.param_groups(model, weight_decay=0.1, decays=decays)
    optimizer = optimizer_class(groups, **options)
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(step / 2, (6 - step) / 4)
        optimizer.zero_grad()
        for batch in batches[2 * step : 2 * step + 2]:
            (model(**batch).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    for (name, p), mine, before in zip(trained.named_parameters(), model.parameters(), start.parameters(), strict=True):
        assert (p - mine).norm() <= 1e-3 * (mine - before).norm() > 0, name


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resume_from_a_checkpoint_is_the_run_without_a_break(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    whole = trainer_of(arguments(tmp_path / "a", save_strategy="steps", save_steps=3), kind, tiny_llama(dtype))
    train(whole)
    resumed = trainer_of(arguments(tmp_path / "b"), kind, tiny_llama(dtype), seed=77)  # seeds come from the checkpoint
    train(resumed, str(tmp_path / "a" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    rates = [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-2 * min(step / 2, (6 - step) / 4) for step in range(6)])
    states = [trainer.optimizer.state_dict()["state"] for trainer in (whole, resumed)]
    assert states[0].keys() == states[1].keys() != set()
    for index, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][index][key])), (index, key)


def test_the_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path / "a", save_strategy="steps", save_steps=3)
    train(transformers.Trainer(model=tiny_llama(), args=args, train_dataset=examples()))
    with pytest.raises(ValueError, match=r"expected a state_dict of APOLLO|different number of parameter groups"):
        train(trainer_of(arguments(tmp_path / "b"), "apollo"), str(tmp_path / "a" / "checkpoint-3"))


def test_adams_numbers_are_refused_where_there_is_no_adam_and_strangers_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adam_beta2=0.95: ApolloQN has no such number"):
        trainer_optimizer(arguments(tmp_path, adam_beta2=0.95), insitu.ApolloQN)
    with pytest.raises(TypeError, match=r"expected a class of this package, such as insitu.APOLLO"):
        trainer_optimizer(arguments(tmp_path), torch.optim.AdamW)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected option update_proj_gap=200: use refresh="):
        trainer_of(arguments(tmp_path), "apollo", update_proj_gap=200).create_optimizer()


def test_frozen_tensors_stay_out(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    assert "model.embed_tokens.weight" not in by_name(
        trainer_of(arguments(tmp_path), "apollo", model).create_optimizer()
    )
