"""Hugging Face Trainer on a model that Transformers shards with FSDP2 while it loads it."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pairs import apollo
from ranks import on_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from insitu import APOLLO

# Every example is the same, so that neither order nor the process that gets it matters.
EXAMPLE = {"input_ids": list(range(3, 19)), "labels": list(range(3, 19))}
RATE = 1e-2


@pytest.fixture(autouse=True)
def _needs_transformers() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")


def saved_model(path: Path) -> Path:
    """A tiny Llama with random weights, in a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if dist.get_rank() == 0:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=61, hidden_size=16, intermediate_size=36, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(path / "model")
    dist.barrier()
    return path / "model"


def loaded(path: Path, sharded: bool = True) -> nn.Module:
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    return LlamaForCausalLM.from_pretrained(
        path, distributed_config=DistributedConfig(fsdp_size=2) if sharded else None
    )


def train(model: nn.Module, path: Path, steps: int, **optimizer: Any) -> tuple[Any, list[float]]:
    """The trainer after some steps, and the loss of each."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(path / "out"), max_steps=steps, per_device_train_batch_size=2, learning_rate=RATE, max_grad_norm=0.0,
        lr_scheduler_type="constant", save_strategy="no", logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of others
        trainer = Trainer(model=model, args=arguments, train_dataset=[EXAMPLE] * 64, **optimizer)
        trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def alone(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The same on one process, in a loop of one's own."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**{name: torch.tensor([value]) for name, value in EXAMPLE.items()}).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@on_ranks(2)
def test_the_trainer_on_two_processes_follows_one(shared_path: Path) -> None:
    path = saved_model(shared_path)
    whole, parts = loaded(path, sharded=False), loaded(path)
    assert all(isinstance(p, DTensor) for p in parts.parameters())
    _, losses = train(parts, shared_path, 6, optimizers=(apollo(lr=RATE, dense="apollo")(parts), None))
    expected = alone(whole, apollo(lr=RATE, dense="apollo")(whole), 6)
    assert losses[-1] < losses[0] - 0.05
    assert losses == pytest.approx(expected, rel=1e-4)


@on_ranks(2)
def test_the_trainer_makes_the_optimizer_itself(shared_path: Path) -> None:
    model = loaded(saved_model(shared_path))
    trainer, losses = train(model, shared_path, 6, optimizer_cls_and_kwargs=(APOLLO, {"rank": 4, "lr": RATE}))
    assert type(trainer.optimizer.optimizer) is APOLLO
    assert losses[-1] < losses[0] - 0.05


@on_ranks(2)
def test_a_run_that_goes_on_from_its_state_is_the_run_without_a_break(shared_path: Path) -> None:
    # The Trainer itself saves no optimizer for such a model, and says so; torch's state dicts do.
    path = saved_model(shared_path)
    model = loaded(path)
    _, losses = train(model, shared_path, 6, optimizers=(apollo(lr=RATE)(model), None))

    first = loaded(path)
    optimizer = apollo(lr=RATE)(first)
    train(first, shared_path, 4, optimizers=(optimizer, None))
    weights, state = get_state_dict(first, optimizer)

    second = loaded(path)
    optimizer = apollo(lr=RATE, seed=3)(second)
    set_state_dict(second, optimizer, model_state_dict=weights, optim_state_dict=state)
    _, rest = train(second, shared_path, 2, optimizers=(optimizer, None))
    assert rest == losses[4:]
    for p, q in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())
