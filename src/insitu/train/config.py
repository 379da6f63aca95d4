"""The configuration of a run: a YAML file of sections, with dotted flags laid over it.

    model: {name: llama-9m}
    data: {sources: [{name: books, path: books/}], sequence_length: 256}
    optimizer: {name: apollo}
    training: {output_dir: out, max_steps: 1000, learning_rate: 0.01}

``training`` holds the fields of ``transformers.TrainingArguments`` under their own names and with their own defaults; a file
says only what it changes. Every other section is the dataclass of the part of the program that it configures.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from insitu.train.fields import ConfigError, check, nearest, schema

Kind = Literal["pretrain", "sft"]

# What of TrainingArguments has another place here; the reason is told to whoever sets it.
_ELSEWHERE = {
    "optim": "the optimizer is optimizer.name",
    "optim_args": "the optimizer's options are optimizer.options",
    "optim_target_modules": "which tensors are projected follows from the model",
    "bf16": "precision is precision.compute",
    "fp16": "precision is precision.compute",
    "do_train": "the verb says what is done",
    "do_eval": "evaluation is turned on by eval_strategy",
    "do_predict": "the verb says what is done",
    "ignore_data_skip": "where the data goes on is part of the checkpoint",
    "local_rank": "torchrun sets it",
    "fsdp": "weights are sharded by model.fsdp_size",
    "fsdp_config": "weights are sharded by model.fsdp_size",
    "deepspeed": "weights are sharded by model.fsdp_size",
}


@dataclass(kw_only=True)
class TrainConfig:
    """All sections of a run, checked each by itself. ``data`` is of pretraining, ``sft`` of fine-tuning; the other is None."""

    kind: Kind
    model: Any
    data: Any
    sft: Any
    optimizer: Any
    precision: Any
    monitor: Any
    training: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The sections as a configuration file has them, every default of ours filled in."""
        found = {name: getattr(self, name) for name in section_kinds(self.kind)}
        return {name: value if name == "training" else dataclasses.asdict(value) for name, value in found.items()}

    def as_yaml(self) -> str:
        import yaml

        text: str = yaml.safe_dump(_plain(self.as_dict()), sort_keys=False, allow_unicode=True)
        return text


def section_kinds(kind: Kind) -> dict[str, type[Any]]:
    """The dataclass behind each section of a file for ``kind``."""
    from transformers import TrainingArguments

    from insitu.train.models import ModelConfig
    from insitu.train.monitor import MonitorConfig
    from insitu.train.optimizers import OptimizerConfig
    from insitu.train.precision import PrecisionConfig

    text: dict[str, type[Any]]
    if kind == "pretrain":
        from insitu.data.config import DataConfig

        text = {"data": DataConfig}
    else:
        from insitu.train.sft import SftConfig

        text = {"sft": SftConfig}
    return {
        "model": ModelConfig,
        **text,
        "optimizer": OptimizerConfig,
        "precision": PrecisionConfig,
        "monitor": MonitorConfig,
        "training": TrainingArguments,
    }


def load(path: Path, flags: Sequence[str] = (), kind: Kind = "pretrain") -> TrainConfig:
    """Read a configuration file and lay dotted flags (``--training.max_steps 10``) over it.

    Raises:
        ConfigError: no such file; not YAML; an unknown section or key (the nearest is named); a value of another type.
        ValueError: what a section itself refuses.
    """
    return resolve(_overlay(_read(path), flags), kind, str(path))


def resolve(content: Mapping[str, Any], kind: Kind = "pretrain", where: str = "the configuration") -> TrainConfig:
    """The configuration that ``content``, sections by name, describes. Raises as :func:`load` does."""
    kinds = section_kinds(kind)
    for name in content:
        if name not in kinds:
            other = {"data": "sft", "sft": "data"}.get(name)
            if other is not None:
                raise ConfigError(f"{where}: {name} is no section of `insitu train {kind}`: its text is in {other}")
            raise ConfigError(f"{where}: {name} is unknown{nearest(str(name), list(kinds))}")
    made: dict[str, Any] = {}
    for name, section in kinds.items():
        values = content.get(name)
        if not isinstance(values := {} if values is None else values, Mapping):
            raise ConfigError(f"{where}: {name}={values!r}: expected a mapping of keys to values")
        checked = check(section, values, name)
        made[name] = dict(checked) if name == "training" else section(**checked)
    _check_training(made["training"])
    return TrainConfig(kind=kind, **{"data": None, "sft": None, **made})


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, with the sections of both verbs."""
    kinds = {**section_kinds("pretrain"), **section_kinds("sft")}
    properties = {
        name: schema(section, frozenset(_ELSEWHERE) if name == "training" else frozenset())
        for name, section in kinds.items()
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "insitu train",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _check_training(training: dict[str, Any]) -> None:
    for key, reason in _ELSEWHERE.items():
        if key in training:
            raise ConfigError(f"training.{key}={training[key]!r}: {reason}")
    if not training.get("output_dir"):
        raise ConfigError("training.output_dir is missing: expected the directory that checkpoints are written to")


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"configuration {path} does not exist: expected a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path} cannot be read: {error}") from error
    try:
        content = yaml.load(text, _loader())  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"configuration {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"configuration {path}: expected sections (model, data, training, ...), found {content!r}")
    return content


def _overlay(content: dict[str, Any], flags: Sequence[str]) -> dict[str, Any]:
    """``content`` with each ``--section.key value`` (or ``--section.key=value``) put in its place; lists by their index."""
    import yaml

    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or "." not in flag.split("=")[0]:
            raise ConfigError(f"{flag!r} is no flag: expected --section.key value, such as --training.max_steps 10")
        name, equals, text = flag.removeprefix("--").partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{name} has no value: expected --{name} value")
            text = rest.pop(0)
        try:
            value = yaml.load(text, _loader())  # noqa: S506 (a SafeLoader)
        except yaml.YAMLError as error:
            raise ConfigError(f"--{name} {text}: not a value of YAML ({' '.join(str(error).split())})") from error
        _put(content, name.split("."), value, f"--{name}")
    return content


def _put(content: Any, keys: list[str], value: Any, flag: str) -> None:
    for i, key in enumerate(keys):
        place: Any = key
        if isinstance(content, list):
            if not key.isdigit() or int(key) >= len(content):
                raise ConfigError(f"{flag}: {key!r} is no index of the {len(content)} items of {'.'.join(keys[:i])}")
            place = int(key)
        elif not isinstance(content, dict):
            raise ConfigError(f"{flag}: {'.'.join(keys[:i])} is {content!r} and has no keys")
        if i == len(keys) - 1:
            content[place] = value
        else:
            if isinstance(content, dict) and content.get(place) is None:
                content[place] = {}
            content = content[place]


def _loader() -> Any:
    """A SafeLoader that reads 1e-3 as a number and ``no`` as a word, as YAML 1.2 does; 1.1 has them the other way round."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        yaml_implicit_resolvers = {  # noqa: RUF012 (a declaration of yaml's)
            first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:bool"]
            for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
    )
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    return Loader


def _plain(value: Any) -> Any:
    """Tuples and paths as YAML writes them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)
