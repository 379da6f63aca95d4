"""Our side of tools that are not installed here, against a stand-in for the little of them that it touches.

That the tools themselves agree is not shown by this: docs/guide/integrations.md lists them as unverified.
"""

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import insitu

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    for key, value in content.items():
        setattr(sys.modules[name], key, value)


def named_settings(**settings: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"insitu_optimizer": None, "insitu_options": None, **settings})


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("transformers")
    pytest.importorskip("pydantic")
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    monkeypatch.delitem(sys.modules, "insitu.integrations.axolotl", raising=False)
    from insitu.integrations.axolotl import InsituPlugin

    yield InsituPlugin()
    sys.modules.pop("insitu.integrations.axolotl")


def trainer() -> SimpleNamespace:
    args = SimpleNamespace(
        learning_rate=1e-3, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8
    )  # fmt: skip
    return SimpleNamespace(args=args)


def test_the_axolotl_plugin_hands_the_trainer_the_factory(plugin: Any) -> None:
    made = trainer()
    settings = named_settings(insitu_optimizer="apollo-mini", insitu_options={"dense": "apollo"})
    plugin.post_trainer_create(settings, made)
    factory, options = made.optimizer_cls_and_kwargs
    model = nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 24))
    optimizer = factory()(model, made.args, **options)  # as Axolotl calls it
    assert type(optimizer) is insitu.APOLLOMini
    assert [(g["role"], g["weight_decay"], g["dense"], g["betas"]) for g in optimizer.param_groups] == [
        ("matrix", 0.1, "apollo", (0.9, 0.95)), ("dense", 0.1, "apollo", (0.9, 0.95)), ("adamw", 0.0, "apollo", (0.9, 0.95))
    ]  # fmt: skip
    module, name = plugin.get_input_args().rsplit(".", 1)
    assert set(getattr(sys.modules[module], name).model_fields) == {"insitu_optimizer", "insitu_options"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"insitu_optimizer": "adamw"}, "insitu_optimizer='adamw': expected one of apollo, apollo-mini, apollo-qn"),
        ({"embedding_lr": 1e-5}, "embedding_lr is not followed"),
        ({"lr_groups": [{}]}, "lr_groups is not followed"),
    ],
    ids=str,
)
def test_what_the_axolotl_plugin_would_ignore_is_refused(plugin: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plugin.post_trainer_create(named_settings(**settings), trainer())


def test_the_torchtitan_example_builds_an_optimizer_with_a_role(monkeypatch: pytest.MonkeyPatch) -> None:
    class BaseOptimizer(torch.optim.Optimizer):
        @dataclass(kw_only=True, slots=True)
        class Config:
            pattern: str

    stand_in(monkeypatch, "torchtitan.components.optimizer", BaseOptimizer=BaseOptimizer)
    Apollo = runpy.run_path(str(EXAMPLES / "torchtitan_apollo.py"))["Apollo"]
    p = nn.Parameter(torch.ones(24, 16))
    config = Apollo.Config(pattern=".*", role="dense", dense="apollo", rank=4, lr=1e-2)
    optimizer = Apollo(config, params=[{"params": [p], "param_names": ["output.weight"]}])
    p.grad = torch.zeros_like(p)  # how torchtitan makes the state before it saves or loads
    optimizer.step(closure=None)
    assert torch.equal(p, torch.ones(24, 16))
    assert optimizer.state[p]["step"] == 0
    assert optimizer.state[p]["exp_avg"].shape == (24, 4)
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert not torch.equal(p, torch.ones(24, 16))
