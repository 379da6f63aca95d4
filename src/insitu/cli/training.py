"""``insitu train``: language models from text (pretrain) or from chats (sft), on Hugging Face's Trainer."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from insitu.cli.data import get_data

train = App(name="train", help="Train a language model on text or chats.")

_Config = Annotated[Path, Parameter(name=["--config", "-c"])]
_Flags = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]


@train.command
def pretrain(*flags: _Flags, config: _Config, resume: bool = False, dry_run: bool = False) -> None:
    """Train on text, from scratch or on from a model. Any key of the file can be given as a flag: --training.max_steps 10.

    Args:
        config: A YAML file; its keys: `insitu train config-schema`.
        resume: Go on from the newest complete checkpoint in training.output_dir.
        dry_run: Print the configuration with all its defaults, and do nothing.
    """
    _run("pretrain", config, flags, resume, dry_run)


@train.command
def sft(*flags: _Flags, config: _Config, resume: bool = False, dry_run: bool = False) -> None:
    """Train on chats or preferences (JSON lines). Any key of the file can be given as a flag: --sft.path chats.jsonl.

    Args:
        config: A YAML file; its keys: `insitu train config-schema`.
        resume: Go on from the newest complete checkpoint in training.output_dir.
        dry_run: Print the configuration with all its defaults, and do nothing.
    """
    _run("sft", config, flags, resume, dry_run)


@train.command
def config_schema() -> None:
    """Print the JSON schema of a configuration file."""
    import json

    from insitu.train.config import json_schema

    print(json.dumps(json_schema(), indent=2))


train.command(get_data)


def _run(kind: Any, path: Path, flags: tuple[str, ...], resume: bool, dry_run: bool) -> None:
    from insitu.train.config import load

    with _told():
        try:
            config = load(path, flags, kind)
            if dry_run:
                from insitu.train.optimizers import fill_from_preset

                fill_from_preset(config.optimizer, config.training)
                print(config.as_yaml(), end="")
                return
            from insitu.train.prepare import prepare

            run = prepare(config, resume=resume)
        except ValueError as error:  # what is wrong with the configuration, data, model or checkpoint
            sys.exit(f"insitu: {error}")
        from insitu.train.engine import TrainingError

        try:
            output_dir = run.train()
        except TrainingError as error:
            sys.exit(f"insitu: {error}")
    if run.trainer.is_world_process_zero():
        print(f"trained: {output_dir}; serve it with `insitu serve {output_dir}`")


@contextmanager
def _told() -> Iterator[None]:
    """What the package logs, on stderr, once for all processes."""
    ours, handler = logging.getLogger("insitu"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("insitu: %(message)s"))
    level, propagate = ours.level, ours.propagate
    ours.addHandler(handler)
    ours.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    ours.propagate = False
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)
        ours.propagate = propagate
