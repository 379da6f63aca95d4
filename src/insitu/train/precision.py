"""The precision of a run: of its products (``compute``), its weights, and its optimizer's moments.

| compute | with a GPU                                                    | on a CPU                                  |
|---------|---------------------------------------------------------------|-------------------------------------------|
| fp32    | float32                                                       | float32                                   |
| bf16    | autocast to bfloat16                                          | autocast to bfloat16                      |
| fp16    | autocast to float16, with accelerate's gradient scaler        | emulated (:mod:`insitu.train.emulated`)   |
| fp8     | torchao's float8 linear layers, the rest autocast to bfloat16 | emulated (:mod:`insitu.train.emulated`)   |

float16 runs on a CPU at a hundredth of float32's speed, and float8 does not run at all: hence the emulation, which the log
names. ``moments`` is how the optimizer's state is stored (:mod:`insitu.train.moments`).
"""

import logging
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from insitu.data.products import widen

log = logging.getLogger("insitu.train")

_ALIGNED = 16  # float8 products want both sides of a matrix in multiples of this


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """In which types a run computes and keeps its numbers."""

    compute: Literal["fp32", "bf16", "fp16", "fp8"] = field(
        default="fp32", metadata={"help": "Of the products in forward and backward."}
    )
    weights: Literal["fp32", "bf16"] = field(
        default="fp32",
        metadata={
            "help": "How the weights are kept. bf16 halves them and needs compute bf16 or fp8; of the optimizers only this "
            "package's round stochastically, others lose updates under 1/256 of a weight."
        },
    )
    moments: Literal["fp32", "bf16", "fp16", "fp8"] = field(
        default="fp32", metadata={"help": "How the optimizer keeps its moments between steps."}
    )

    def __post_init__(self) -> None:
        kinds = ("fp32", "bf16", "fp16", "fp8")
        for name, expected in (("compute", kinds), ("weights", kinds[:2]), ("moments", kinds)):
            if getattr(self, name) not in expected:
                raise ValueError(
                    f"precision.{name}={getattr(self, name)!r}; expected one of {', '.join(map(repr, expected))}"
                )
        if self.weights == "bf16" and self.compute not in ("bf16", "fp8"):
            raise ValueError(
                f"precision.weights='bf16' with precision.compute={self.compute!r}: weights kept in bf16 are multiplied in "
                "bf16; give compute='bf16' or 'fp8', or weights='fp32'"
            )
        if self.weights == "bf16" and self.moments in ("fp16", "fp8"):
            raise ValueError(
                f"precision.moments={self.moments!r} with precision.weights='bf16': when torch loads an optimizer's state it "
                "casts the scales of such moments to the weights' type, so a resumed run would be another; give "
                "moments='bf16', or weights='fp32'"
            )


def apply(config: PrecisionConfig, model: Any, *, device: str | None = None) -> dict[str, Any]:
    """Prepare ``model`` in place and return what TrainingArguments must say: ``bf16`` and ``fp16``.

    Call it before the optimizer is made: bf16 weights are other tensors. For fp16 on a CPU the trainer also needs
    :func:`callbacks`.

    Args:
        config: the ``precision`` section.
        model: a transformers model in float32.
        device: "cuda" or "cpu", where it will train; the GPU if there is one.

    Raises:
        ValueError: a GPU without float8, torchao missing there, or a model without a layer that float8 can compute.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    overrides = {"bf16": False, "fp16": False}
    if config.weights == "bf16":
        model.to(torch.bfloat16)
    if config.compute == "bf16":
        overrides["bf16"] = config.weights == "fp32"  # autocast: bf16 weights need none
        if config.weights == "bf16":
            widen(model)  # as the live learner has it
    elif config.compute == "fp16":
        if device == "cuda":
            overrides["fp16"] = True
        else:
            _emulate_fp16(model)
    elif config.compute == "fp8":
        layers = _float8_layers(model)
        if device == "cuda":
            _torchao(model, layers)
            overrides["bf16"] = config.weights == "fp32"
        else:
            _emulate_fp8(layers)
    return overrides


def callbacks(config: PrecisionConfig, model: Any) -> list[Any]:
    """What the trainer must call for this precision, after :func:`apply`: the loss scale of emulated fp16."""
    scale = getattr(model, "_insitu_loss_scale", None)
    if config.compute != "fp16" or scale is None:
        return []
    from insitu.train.emulated import DynamicLossScale

    return [DynamicLossScale(scale)]


def _emulate_fp16(model: Any) -> None:
    from insitu.train.emulated import LossScale, emulate

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    model._insitu_loss_scale = LossScale()
    emulate(layers, model._insitu_loss_scale)
    log.warning(
        "precision.compute='fp16' is emulated on a CPU: the numbers of %d linear layers are rounded to float16 and multiplied "
        "in float32; loss as in float16, neither its speed nor its memory",
        len(layers),
    )


def _emulate_fp8(layers: list[nn.Linear]) -> None:
    from insitu.train.emulated import emulate

    emulate(layers, None)
    log.warning(
        "precision.compute='fp8' is emulated on a CPU: the numbers of %d linear layers are rounded to float8 and multiplied in "
        "float32; loss as in float8, neither its speed nor its memory",
        len(layers),
    )


def _float8_layers(model: Any) -> list[nn.Linear]:
    """Those that float8 can compute and should: not the output head, whose errors go into the loss directly."""
    head = model.get_output_embeddings()
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and module.in_features % _ALIGNED == 0
        and module.out_features % _ALIGNED == 0
    ]
    if not found:
        raise ValueError(
            f"precision.compute='fp8': {type(model).__name__} has no linear layer, besides its output head, with both sides in "
            f"multiples of {_ALIGNED}; compute in bf16"
        )
    return found


def _torchao(model: Any, layers: list[nn.Linear]) -> None:
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        raise ValueError(
            f"precision.compute='fp8': this GPU ({torch.cuda.get_device_name()}, capability {capability[0]}.{capability[1]}) "
            "has no float8 arithmetic, which begins with 8.9; compute in bf16"
        )
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError as error:
        raise ValueError("precision.compute='fp8' on a GPU needs torchao: pip install torchao") from error
    wanted = set(map(id, layers))
    convert_to_float8_training(model, module_filter_fn=lambda module, _: id(module) in wanted)
    log.info("float8: %d linear layers by torchao, the rest in bfloat16", len(layers))
