"""Optimizers by name: each is the class and has the numbers that the file says, and trains."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_runs import config_of, losses, trained
from transformers import AutoModelForCausalLM

import insitu
from insitu.optim.quantized import Int8Weight
from insitu.train.fields import ConfigError
from insitu.train.optimizers import OptimizerConfig, class_and_kwargs, fill_from_preset
from insitu.train.prepare import prepare

NAMES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"options": {}}),
    "apollo": (insitu.APOLLO, {}),
    "apollo-mini": (insitu.APOLLOMini, {"options": {"refresh": 3}}),
    "q-apollo": (insitu.APOLLO, {"group_size": 16}),
    "q-apollo-mini": (insitu.APOLLOMini, {"options": {}, "group_size": None}),
    "apollo-qn": (insitu.ApolloQN, {"options": {"warmup": 0}}),
    "apollo-qnw": (insitu.ApolloQNW, {"options": {"warmup": 0}}),
    "torch.optim.SGD": (torch.optim.SGD, {"options": {"momentum": 0.9}}),
}
_ARGUMENTS = {"learning_rate": 1e-3, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}


@pytest.mark.filterwarnings("ignore:warmup=0")  # of Ma's Apollo: these runs are shorter than any
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_trains_by_its_name(name: str, tmp_path: Path) -> None:
    kind, section = NAMES[name]
    rate = {"torch.optim.SGD": 0.3, "apollo-qn": 0.03, "apollo-qnw": 0.03}.get(name, 1e-2)
    short = {"max_steps": 8, "save_strategy": "no", "weight_decay": 0.1, "learning_rate": rate}
    run = trained(tmp_path, optimizer={"name": name, **section}, training=short)
    optimizer = run.trainer.optimizer.optimizer
    assert type(optimizer) is kind
    assert {group["weight_decay"] for group in optimizer.param_groups if group["params"]} == {
        0.1
    }  # it has matrices alone
    found = losses(tmp_path / "out")
    assert len(found) == 8
    assert found[-1] < found[0] - 0.1
    quantized = [p for p in run.trainer.model.parameters() if isinstance(p, Int8Weight)]
    assert bool(quantized) == name.startswith("q-")
    if quantized:
        # What is written is float, the int8 weights as they stand.
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        ours = dict(run.trainer.model.named_parameters())
        for key, p in model.named_parameters():
            assert torch.equal(p, ours[key].dequantize() if isinstance(ours[key], Int8Weight) else ours[key]), key


def test_release_is_the_plain_run_bit_for_bit_and_refuses_clipping(tmp_path: Path) -> None:
    free = {"max_steps": 6, "save_strategy": "no", "max_grad_norm": 0.0}
    plain = trained(tmp_path, training=free)
    released = trained(
        tmp_path, optimizer={"release": True}, training={**free, "output_dir": str(tmp_path / "released")}
    )
    for p, q in zip(plain.trainer.model.parameters(), released.trainer.model.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ConfigError, match=r"optimizer.release .* set training.max_grad_norm=0 \(it is 1\)"):
        prepare(config_of(tmp_path, optimizer={"release": True}))


def test_the_numbers_of_the_arguments_reach_the_optimizer() -> None:
    args = SimpleNamespace(**{**_ARGUMENTS, "adam_beta2": 0.95, "adam_epsilon": 1e-6})
    kind, options = class_and_kwargs(OptimizerConfig(name="adamw"), args)
    assert (kind, options) == (torch.optim.AdamW, {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6, "fused": True})
    assert class_and_kwargs(OptimizerConfig(name="torch.optim.Adam"), args)[1]["betas"] == (0.9, 0.95)
    with pytest.raises(ConfigError, match=r"training.adam_beta2=0.95: torch.optim.SGD has no such number"):
        class_and_kwargs(OptimizerConfig(name="torch.optim.SGD"), args)
    with pytest.raises(ConfigError, match=r"adam_beta2=0.95: ApolloQN has no such number"):
        class_and_kwargs(OptimizerConfig(name="apollo-qn"), args)


def test_a_preset_fills_what_the_file_leaves_open() -> None:
    training: dict[str, Any] = {"adam_epsilon": 1e-7}
    config = OptimizerConfig(name="apollo-mini", preset="apollo-mini-350m", options={"refresh": 10})
    fill_from_preset(config, training)
    assert training == {
        "learning_rate": 0.01, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-7
    }  # fmt: skip
    assert config.options["refresh"] == 10
    kind, options = class_and_kwargs(config, SimpleNamespace(**{**_ARGUMENTS, **training}))
    made = kind()(torch.nn.Linear(8, 8), **options)
    group = made.param_groups[0]
    assert (group["rank"], group["granularity"], group["eps"], group["refresh"]) == (1, "tensor", 1e-7, 10)
    with pytest.raises(ConfigError, match="is not of rank 1, as apollo-mini is"):
        fill_from_preset(OptimizerConfig(name="apollo-mini", preset="apollo-350m"), {})


def test_what_is_no_optimizer_is_refused(tmp_path: Path) -> None:
    args = SimpleNamespace(**_ARGUMENTS)
    for name, message in (
        ("torch.optim.Nothing", "cannot be imported"),
        ("no_such_package.Adam", "cannot be imported"),
        ("torch.nn.Linear", "expected a class of torch.optim.Optimizer"),
    ):
        with pytest.raises(ConfigError, match=message):
            class_and_kwargs(OptimizerConfig(name=name), args)
    with pytest.raises(ConfigError, match="optimizer: unexpected option rnk=3"):
        prepare(config_of(tmp_path, optimizer={"options": {"rnk": 3}}))
    with pytest.raises(ConfigError, match=r"optimizer.int8: apollo-qn does not train int8 weights"):
        OptimizerConfig(name="apollo-qn", int8=True)
