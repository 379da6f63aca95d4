"""Hugging Face's Trainer, and what is built on it (TRL): an optimizer of this package from the training arguments.

Trainer hands an optimizer class two groups that say what decays, but not what is an embedding or the head. It also takes a
factory, which is called with the model: that is what is made here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from insitu.optim import APOLLO, param_groups
from insitu.optim.base import TensorWise

# TrainingArguments' own, which nobody has asked for.
_ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}

Factory = Callable[[], Callable[..., TensorWise]]


def trainer_optimizer(
    args: Any, optimizer: type[TensorWise] = APOLLO, **options: Any
) -> tuple[Factory, dict[str, Any]]:
    """For ``Trainer(optimizer_cls_and_kwargs=...)``: ``optimizer`` over all trainable tensors of the model, each in its role.

    ``learning_rate``, ``weight_decay``, and for APOLLO ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` of ``args`` reach
    every group; what does not decay is Trainer's own rule (biases and norms, by type and by name). The learning rate
    schedule is Trainer's, and a resume from its checkpoints is exact.

    Args:
        args: the TrainingArguments, or what inherits them (TRL's SFTConfig, DPOConfig).
        optimizer: a class of this package.
        options: of the optimizer, such as ``rank``; they win over ``args``.

    Raises:
        ValueError: ``args`` set Adam's numbers for an optimizer that has none,.
        TypeError: not a class of this package; an option that it does not have (when the optimizer is made).

    >>> from types import SimpleNamespace
    >>> args = SimpleNamespace(
    ...     learning_rate=1e-3, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, optim="adamw_torch_fused"
    ... )
    >>> factory, options = trainer_optimizer(args, rank=64)
    >>> sorted(options)
    ['betas', 'eps', 'lr', 'rank', 'weight_decay']
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, TensorWise)):
        raise TypeError(f"optimizer={optimizer!r}: expected a class of this package, such as insitu.APOLLO")
    given = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if issubclass(optimizer, APOLLO):
        given |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    elif foreign := [name for name, usual in _ADAM.items() if getattr(args, name) != usual]:
        raise ValueError(
            f"{foreign[0]}={getattr(args, foreign[0])!r}: {optimizer.__name__} has no such number; leave it out of the "
            f"training arguments, and give options to trainer_optimizer(args, {optimizer.__name__}, ...)"
        )
    # Axolotl passes its training arguments beside the model.
    return lambda: lambda model, *_, **options: _build(optimizer, model, **options), {**given, **options}


def _build(
    optimizer: Callable[..., TensorWise], model: nn.Module, *, weight_decay: float, **options: Any
) -> TensorWise:
    from transformers import Trainer

    # The rule asks nothing of the trainer itself.
    decays = Trainer.get_decay_parameter_names(None, model)
    return optimizer(
        param_groups(model, weight_decay=weight_decay, decays=decays), weight_decay=weight_decay, **options
    )
