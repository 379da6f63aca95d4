"""A run from its configuration: everything is checked that can be before the first step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from insitu.train import checkpoints, disk, models, optimizers, precision
from insitu.train.config import TrainConfig
from insitu.train.fields import ConfigError
from insitu.train.run import PreferenceRun, Run

log = logging.getLogger("insitu.train")

_CACHE = "data"  # under output_dir: tokens and a tokenizer trained on them


def prepare(config: TrainConfig, *, resume: bool = False) -> Run | PreferenceRun:
    """Make the run of ``config``; nothing is trained. Under torchrun every process calls it.

    Args:
        config: :func:`insitu.train.config.load`.
        resume: go on from the newest complete checkpoint in the output directory; from the start where there is none, which is
            said. ``training.resume_from_checkpoint`` names one instead.

    Raises:
        ConfigError, ValueError: what is wrong with configuration, data, model, checkpoint or disk, before the first step.
    """
    optimizers.fill_from_preset(config.optimizer, config.training)
    args = _arguments(config, {})
    _check(config, args)
    if config.sft is not None and config.sft.method == "dpo":
        return _preferences(config, args, resume)
    output_dir = Path(args.output_dir)
    found, step = _checkpoint(args, output_dir, resume)
    record = checkpoints.read(found) if found is not None else None
    sequences = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    described = config.as_dict()
    if found is not None and record is not None:
        checkpoints.check_same(found, record, described, sequences)

    tokenizer, model = _model(config, args, output_dir, found)
    overrides = precision.apply(config.precision, model, device=args.device.type)
    optimizers.prepare_weights(config.optimizer, model)
    if any(overrides.values()):
        args = _arguments(config, overrides)
    if found is not None:
        args.resume_from_checkpoint = str(found)
        checkpoints.check_kind(found, config.model.fsdp_size > 1)
        if config.model.fsdp_size == 1:
            checkpoints.check_weights(found, model)

    data = _data(config, args, tokenizer, model, output_dir, sequences)
    if record is not None and record["data"] is not None:
        data["train_dataset"].load_state_dict(record["data"])
        args.ignore_data_skip = True  # the stream goes on from its state
    trainer = _trainer(config, args, model, tokenizer, data, {"config": described, "sequences_per_step": sequences})
    _check_disk(config, trainer, output_dir, step)
    return Run(config, trainer, tokenizer, found, step)


def _check(config: TrainConfig, args: Any) -> None:
    """What the sections say to each other."""
    if config.kind == "pretrain" and args.max_steps < 1:
        raise ConfigError(
            "training.max_steps is missing: the text has no end, so expected the number of steps to train"
        )
    if args.dataloader_num_workers and config.kind == "pretrain":
        raise ConfigError(
            f"training.dataloader_num_workers={args.dataloader_num_workers}: expected 0; the text is tokens on disk by then, "
            "and losses would not reach other processes"
        )
    if args.auto_find_batch_size and config.kind == "pretrain":
        raise ConfigError(
            "training.auto_find_batch_size: the stream is cut into steps of a known size; give one that fits"
        )
    if args.push_to_hub and "checkpoint" in str(getattr(args.hub_strategy, "value", args.hub_strategy)):
        raise ConfigError(
            f"training.hub_strategy={args.hub_strategy}: a checkpoint is renamed once it is whole, and cannot be uploaded "
            "before; use end or every_save"
        )
    if config.model.fsdp_size not in (1, args.world_size):
        raise ConfigError(
            f"model.fsdp_size={config.model.fsdp_size} with {args.world_size} processes: expected 1 or all of them; start with "
            f"torchrun --nproc-per-node {config.model.fsdp_size}"
        )
    if config.optimizer.release and args.max_grad_norm > 0:
        raise ConfigError(
            f"optimizer.release frees each gradient before their norm is known: set training.max_grad_norm=0 (it is "
            f"{args.max_grad_norm:g}); APOLLO's limiter bounds the updates"
        )
    if config.optimizer.schedule != "trainer":
        total = args.max_steps
        if total < 1 or not 1 <= args.get_warmup_steps(total) < total:
            raise ConfigError(
                f"optimizer.schedule={config.optimizer.schedule} needs training.max_steps, and training.warmup_steps of at "
                f"least 1 and below it; they are {total} and {args.warmup_steps:g}"
            )
        if "lr_scheduler_type" in config.training:
            raise ConfigError("training.lr_scheduler_type beside optimizer.schedule: one of them makes the schedule")
    if config.sft is not None and config.sft.evaluate:
        from insitu.train.evaluation import require

        require(config.sft.evaluate)


def _arguments(config: TrainConfig, overrides: dict[str, Any]) -> Any:
    import torch
    from transformers import TrainingArguments

    given = dict(config.training)
    # Without an accelerator Trainer refuses bf16, and warns of pinned memory, unless it is told that this is meant.
    given.setdefault("use_cpu", not torch.accelerator.is_available())
    if config.model.fsdp_size > 1:
        # Trainer refuses to save the rest for a model sharded while loading; the engine saves it.
        given["save_only_model"] = True
    try:
        return TrainingArguments(**{**given, **overrides})
    except (ValueError, ImportError) as error:
        raise ConfigError(f"training: {error}") from error


def _checkpoint(args: Any, output_dir: Path, resume: bool) -> tuple[Path | None, int]:
    """The checkpoint to go on from, and its step; the output directory is made ready for it, by one process."""
    found: Path | None = None
    if args.resume_from_checkpoint is not None:
        found = Path(args.resume_from_checkpoint)
    elif resume:
        found = checkpoints.newest(output_dir)
        if found is None:
            log.warning("%s has no checkpoint to go on from: starting at step 1", output_dir)
    step = int(checkpoints.read(found)["step"]) if found is not None else 0
    checkpoints.check_directory(output_dir, resume or found is not None, step)
    with args.main_process_first(local=args.save_on_each_node):
        if args.should_save:
            try:
                output_dir.mkdir(parents=True, exist_ok=True)
                checkpoints.clean(output_dir)
            except OSError as error:
                raise ConfigError(f"training.output_dir={output_dir} cannot be written: {error}") from error
    return found, step


def _model(config: TrainConfig, args: Any, output_dir: Path, found: Path | None) -> tuple[Any, Any]:
    """Tokenizer and model, which fit together; a sharded model is loaded from the checkpoint, because it cannot be later."""
    tokenizer = _tokenizer(config, output_dir)
    shape = models.shape_of(config.model, len(tokenizer))
    models.check_fits(shape, len(tokenizer), config.data.sequence_length if config.data is not None else 0)
    start = found if config.model.fsdp_size > 1 else None
    beside = output_dir / checkpoints.PARTIAL / "initial"
    return tokenizer, models.build(config.model, shape, args.seed, start, beside)


def _tokenizer(config: TrainConfig, output_dir: Path) -> Any:
    """The data's tokenizer where it names one, else the model's own."""
    from transformers import AutoTokenizer

    if config.data is not None and config.data.tokenizer is not None:
        from insitu.data.tokenizer import make_tokenizer

        return make_tokenizer(config.data, output_dir / _CACHE)
    if config.model.is_preset:
        way_out = (
            "give data.tokenizer.vocab_size to train one on the text, or data.tokenizer.path"
            if config.kind == "pretrain"
            else "fine-tune a directory that pretraining wrote, or a Hub id"
        )
        raise ConfigError(f"model.name={config.model.name} is a shape and has no tokenizer: {way_out}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(Path(config.model.name).expanduser())
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name={config.model.name}: its tokenizer cannot be loaded ({error})") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # Of a directory without one Transformers makes an empty one of the model's family.
        raise ConfigError(
            f"model.name={config.model.name} has no tokenizer: give data.tokenizer.path, or put its files there"
        )
    return tokenizer


def _data(
    config: TrainConfig, args: Any, tokenizer: Any, model: Any, output_dir: Path, sequences: int
) -> dict[str, Any]:
    """Trainer's data arguments."""
    if config.sft is not None:
        from insitu.train.sft import make_sft

        train, evaluation, collator = make_sft(config.sft, tokenizer, model)
        return {"train_dataset": train, "eval_dataset": evaluation, "data_collator": collator}
    from insitu.data.mixture import make_mixture

    mixture, validation = make_mixture(
        config.data,
        tokenizer,
        config.data.sequence_length,
        args.seed if args.data_seed is None else args.data_seed,
        cache=output_dir / _CACHE,
        sequences_per_step=sequences,
        rank=args.process_index,
        world_size=args.world_size,
    )
    if mixture.steps is not None and mixture.steps < args.max_steps:
        raise ConfigError(
            f"training.max_steps={args.max_steps}: the sources' max_epochs allow {mixture.steps} steps of {sequences} "
            "sequences; train fewer steps, raise max_epochs, or add text"
        )
    strategy = getattr(args.eval_strategy, "value", args.eval_strategy)
    if strategy != "no" and not validation:
        raise ConfigError(
            f"training.eval_strategy={strategy}: no source has a validation document; raise data.validation (it is "
            f"{config.data.validation:g}) or set eval_strategy to no"
        )
    return {"train_dataset": mixture, "eval_dataset": validation or None}


def _preferences(config: TrainConfig, args: Any, resume: bool) -> PreferenceRun:
    """DPO, on TRL's trainer, which is not the engine."""
    from insitu.train.preferences import read_preferences

    for asked, what, way_out in (
        (resume, "--resume", "name a checkpoint in training.resume_from_checkpoint"),
        (config.optimizer.release, "optimizer.release", "leave it out"),
        (config.optimizer.schedule != "trainer", "optimizer.schedule", "use training.lr_scheduler_type"),
        (config.precision.moments != "fp32", "precision.moments", "leave it at fp32"),
        (config.model.fsdp_size > 1, "model.fsdp_size", "replicate the model over the processes"),
    ):
        if asked:
            raise ConfigError(f"sft.method=dpo runs on TRL's trainer, which has no {what}: {way_out}")
    for path in (config.sft.train, config.sft.eval):
        if path is not None:
            read_preferences(Path(path))
    output_dir = Path(args.output_dir)
    tokenizer, model = _model(config, args, output_dir, None)
    overrides = precision.apply(config.precision, model, device=args.device.type)
    optimizers.prepare_weights(config.optimizer, model)
    optimizers.class_and_kwargs(config.optimizer, args)
    overrides["use_cpu"] = args.use_cpu
    return PreferenceRun(config, model, tokenizer, overrides, _callbacks(config, model, tokenizer))


def _trainer(
    config: TrainConfig, args: Any, model: Any, tokenizer: Any, data: dict[str, Any], record: dict[str, Any]
) -> Any:
    from insitu.optim.schedule import ramped_cosine
    from insitu.train.engine import Engine

    trainer = Engine(
        record=record,
        moments=_moments(config),
        schedule=ramped_cosine if config.optimizer.schedule == "ramped-cosine" else None,
        model=model,
        args=args,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizers.class_and_kwargs(config.optimizer, args),
        callbacks=_callbacks(config, model, tokenizer),
        **data,
    )
    if config.optimizer.release:
        from insitu.train.release import Release

        trainer.add_callback(Release(trainer))
    return trainer


def _callbacks(config: TrainConfig, model: Any, tokenizer: Any) -> list[Any]:
    found: list[Any] = precision.callbacks(config.precision, model)
    if config.monitor.every > 0:
        from insitu.train.monitor import SampleMonitor

        found.append(SampleMonitor(config.monitor, tokenizer))
    return found


def _moments(config: TrainConfig) -> Callable[[Any], None]:
    from insitu.train.moments import store_moments

    return lambda optimizer: store_moments(optimizer, config.precision.moments)


def _check_disk(config: TrainConfig, trainer: Any, output_dir: Path, step: int) -> None:
    """Make the optimizer, so that its options are checked before the first step, and see whether its checkpoints fit."""
    try:
        optimizer = trainer.create_optimizer()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: {error}") from error
    weights, state = disk.checkpoint_bytes(trainer.model, optimizer)
    if config.training.get("save_only_model"):
        state = 0
    kept = len(checkpoints.steps_in(output_dir))
    disk.check_room(output_dir, weights, state, trainer.args, trainer.args.max_steps, step, kept)
