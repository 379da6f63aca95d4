"""The model of a run: pretrained weights of a directory or Hub id, or a preset's shape with weights drawn anew."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from insitu.diagnostics.skeleton import GPTS, LLAMAS, ModelError, config_of
from insitu.train.fields import ConfigError, nearest

PRESETS = (*LLAMAS, *GPTS)


@dataclass(kw_only=True)
class ModelConfig:
    """The ``model`` section."""

    name: str = field(
        metadata={
            "help": "A preset (llama-9m to llama-13b, andrea-tiny to andrea-480m), a directory, or a Hub id. What exists as a "
            "directory is one."
        }
    )
    weights: Literal["pretrained", "scratch"] | None = field(
        default=None,
        metadata={
            "help": "pretrained: those of the directory or Hub id, which is the default for them. scratch: drawn from "
            "training.seed, always so for presets."
        },
    )
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Laid over the model's config, such as num_hidden_layers; for weights from scratch."},
    )
    fsdp_size: int = field(
        default=1,
        metadata={"help": "Processes that the weights are sharded over (FSDP2, by Transformers); 1 does not shard."},
    )

    def __post_init__(self) -> None:
        if self.weights is None:
            self.weights = "scratch" if self.is_preset else "pretrained"
        if self.is_preset and self.weights == "pretrained":
            raise ConfigError(
                f"model.weights=pretrained: the preset {self.name} is a shape without weights; use scratch"
            )
        if self.options and self.weights == "pretrained":
            raise ConfigError(
                "model.options change the shape, which pretrained weights have already; use weights: scratch"
            )
        if self.fsdp_size < 1:
            raise ConfigError(f"model.fsdp_size={self.fsdp_size}: expected the number of processes to shard over, or 1")

    @property
    def is_preset(self) -> bool:
        return self.name in PRESETS and not Path(self.name).expanduser().is_dir()


def shape_of(config: ModelConfig, vocabulary: int | None = None) -> Any:
    """The Transformers config of the model, ``options`` laid over it. A model from scratch has the tokenizer's ``vocabulary``.

    Raises:
        ConfigError: no such model, an option that its config does not have, shapes that Transformers refuses.
    """
    try:
        shape = config_of(str(Path(config.name).expanduser()) if not config.is_preset else config.name)
    except ModelError as error:
        raise ConfigError(str(error)) from error
    if config.weights == "scratch":
        known = [key for key in shape.to_dict() if not key.startswith("_")]
        for key in config.options:
            if key not in known:
                raise ConfigError(f"model.options.{key} is unknown{nearest(key, known)}")
        overlay = dict(config.options)
        if vocabulary is not None and overlay.setdefault("vocab_size", vocabulary) < vocabulary:
            raise ConfigError(
                f"model.options.vocab_size={overlay['vocab_size']}: the tokenizer has {vocabulary} tokens; leave it out"
            )
        if "hidden_size" in overlay and hasattr(shape, "word_embed_proj_dim"):
            overlay.setdefault("word_embed_proj_dim", overlay["hidden_size"])
        try:
            shape = type(shape).from_dict({**shape.to_dict(), **overlay})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model.options: {error}") from error
    return shape


def check_fits(shape: Any, vocabulary: int, sequence_length: int) -> None:
    """Refuse a sequence that is longer than the model, and a tokenizer with tokens that the model does not know.

    Args:
        shape: the model's config.
        vocabulary: tokens of the tokenizer.
        sequence_length: tokens in one training sequence; 0 where examples have each their own.
    """
    text = shape.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and sequence_length > positions:
        raise ConfigError(
            f"data.sequence_length={sequence_length}: the model has {positions} positions; shorten the sequences, or train one "
            "from scratch with model.options.max_position_embeddings"
        )
    if vocabulary > text.vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocabulary} tokens and the model knows {text.vocab_size}: they do not belong together; take "
            "the model's own tokenizer (data.tokenizer.path), or train the model from scratch (model.weights: scratch)"
        )


def build(config: ModelConfig, shape: Any, seed: int, start: Path | None, scratch_directory: Path) -> Any:
    """The model in training mode, in float32, sharded if ``fsdp_size`` says so (then the process group exists already).

    Args:
        config: the section.
        shape: :func:`shape_of` it.
        seed: of weights from scratch: the same weights whatever was drawn before.
        start: a checkpoint to take the weights from in the place of both; a sharded model can be loaded, not resumed.
        scratch_directory: where weights from scratch lie for a moment, before they are sharded.
    """
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    if start is not None or config.weights == "pretrained":
        return _load(str(start or Path(config.name).expanduser()), config.fsdp_size)
    if type(shape) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(f"model.name={config.name!r} is a {type(shape).__name__}: expected a causal language model")
    if config.fsdp_size == 1 or torch.distributed.get_rank() == 0:
        set_seed(seed)
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
        if config.fsdp_size == 1:
            return model
        model.save_pretrained(scratch_directory)
        del model
    torch.distributed.barrier()
    model = _load(str(scratch_directory), config.fsdp_size)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(scratch_directory)
    return model


def _load(name: str, fsdp_size: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if fsdp_size > 1:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(fsdp_size=fsdp_size)
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {name!r} cannot be loaded: {' '.join(str(error).split())}") from error
