"""The optimizer of a run, by name: this package's, torch's AdamW, or any class of torch by its import path.

Learning rate, weight decay, betas and eps are the training arguments' (``training.learning_rate``, ``adam_beta1``, ...); what
is an optimizer's own (rank, refresh, ...) is in ``options``. A preset brings both, and what a file says itself wins over it.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, field
from typing import Any, Literal

from insitu.train.fields import ConfigError, nearest

OURS = ("apollo", "apollo-mini", "q-apollo", "q-apollo-mini", "apollo-qn", "apollo-qnw")
NAMES = ("adamw", *OURS)
_ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}  # TrainingArguments' own, which nobody asked for


@dataclass(kw_only=True)
class OptimizerConfig:
    """The ``optimizer`` section."""

    name: str = field(
        default="apollo",
        metadata={
            "help": "adamw (torch's, fused), apollo, apollo-mini, q-apollo, q-apollo-mini (int8 weights), apollo-qn, "
            "apollo-qnw, or the import path of a class, such as torch.optim.SGD."
        },
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "A published recipe, such as apollo-130m: options, and training arguments where the file has none."
        },
    )
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Of the optimizer, such as rank."})
    schedule: Literal["trainer", "ramped-cosine"] = field(
        default="trainer",
        metadata={
            "help": "trainer: training.lr_scheduler_type. ramped-cosine: the ANDREA lessons' "
            "(insitu.optim.schedule.ramped_cosine), with training.warmup_steps."
        },
    )
    release: bool = field(
        default=False,
        metadata={"help": "Update in the backward pass and free each gradient; needs training.max_grad_norm 0."},
    )
    int8: bool = field(default=False, metadata={"help": "Train int8 weights, as q-apollo does."})
    group_size: int | None = field(
        default=128,
        metadata={"help": "Elements of a row that share a scale in int8 weights; null for the whole row."},
    )

    def __post_init__(self) -> None:
        if self.name not in NAMES and "." not in self.name:
            raise ConfigError(
                f"optimizer.name={self.name!r} is unknown{nearest(self.name, NAMES)} (or an import path, torch.optim.SGD)"
            )
        if self.name.startswith("q-"):
            self.int8 = True
        for asked, name in ((self.release, "release"), (self.int8, "int8"), (self.preset, "preset")):
            if asked and self.name not in OURS:
                raise ConfigError(f"optimizer.{name}: {self.name} has no such thing; expected one of {', '.join(OURS)}")
        if self.int8 and self.name.startswith("apollo-qn"):
            raise ConfigError(f"optimizer.int8: {self.name} does not train int8 weights; expected q-apollo or apollo")
        if self.preset is not None:
            if not self.name.removeprefix("q-").startswith("apollo") or self.name.startswith("apollo-qn"):
                raise ConfigError(
                    f"optimizer.preset={self.preset!r}: {self.name} has none; expected apollo or q-apollo"
                )
            _preset(self.preset)
        for key in ("lr", "weight_decay"):
            if key in self.options:
                name = {"lr": "learning_rate"}.get(key, key)
                raise ConfigError(f"optimizer.options.{key}={self.options[key]!r}: set training.{name} instead")


def fill_from_preset(config: OptimizerConfig, training: dict[str, Any]) -> None:
    """Put a preset's numbers where the file has none: rate, decay and Adam's into ``training``, the rest into ``options``."""
    if config.preset is None:
        return
    found = _preset(config.preset)
    beta1, beta2 = found.pop("betas")
    arguments = {
        "learning_rate": found.pop("lr"),
        "weight_decay": found.pop("weight_decay"),
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        "adam_epsilon": found.pop("eps"),
    }
    for key, value in arguments.items():
        training.setdefault(key, value)
    if config.name.endswith("-mini") and found.pop("rank") != 1:
        raise ConfigError(
            f"optimizer.preset={config.preset!r} is not of rank 1, as {config.name} is: expected a preset with mini in its "
            f"name, or optimizer.name={config.name.removesuffix('-mini')}"
        )
    config.options = {**found, **config.options}


def prepare_weights(config: OptimizerConfig, model: Any) -> None:
    """Make the weights int8 where the section says so. Before the optimizer, and before the model is wrapped."""
    if config.int8:
        from insitu.optim import quantize

        quantize(model, group_size=config.group_size)


def class_and_kwargs(config: OptimizerConfig, args: Any) -> tuple[Any, dict[str, Any]]:
    """What Trainer takes as ``optimizer_cls_and_kwargs``.

    Args:
        config: the section.
        args: the TrainingArguments.

    Raises:
        ConfigError: a class that cannot be had; training arguments that the optimizer has no use for.
    """
    options = dict(config.options)
    if config.name in OURS:
        from insitu.integrations.trainer import trainer_optimizer
        from insitu.optim import APOLLO, APOLLOMini, ApolloQN, ApolloQNW

        kinds = {"apollo": APOLLO, "apollo-mini": APOLLOMini, "apollo-qn": ApolloQN, "apollo-qnw": ApolloQNW}
        kind = kinds[config.name.removeprefix("q-")]
        try:
            return trainer_optimizer(args, kind, **options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"optimizer: {error}") from error
    if config.name == "adamw":
        import torch

        kind_, given = torch.optim.AdamW, {"fused": True, **options}
    else:
        kind_, given = _imported(config.name), options
    return kind_, {"lr": args.learning_rate, **_adam(kind_, config, args), **given}


def _adam(kind: Any, config: OptimizerConfig, args: Any) -> dict[str, Any]:
    """Betas and eps of the arguments, where the class has them; what it does not have must not have been set."""
    known = inspect.signature(kind).parameters
    unused = [
        name
        for name, usual in _ADAM.items()
        if getattr(args, name) != usual and ("eps" if name == "adam_epsilon" else "betas") not in known
    ]
    if unused:
        raise ConfigError(f"training.{unused[0]}={getattr(args, unused[0])!r}: {config.name} has no such number")
    given = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return {name: value for name, value in given.items() if name in known}


def _imported(path: str) -> Any:
    from torch.optim import Optimizer

    module, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"optimizer.name={path!r} cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise ConfigError(f"optimizer.name={path!r} is {kind!r}: expected a class of torch.optim.Optimizer")
    return kind


def _preset(name: str) -> dict[str, Any]:
    from insitu.optim import preset
    from insitu.optim.presets import PRESETS

    if name not in PRESETS:
        raise ConfigError(f"optimizer.preset={name!r} is unknown{nearest(name, sorted(PRESETS))}")
    return preset(name)
