"""The trained model as files that ``insitu serve``, vLLM and Transformers load."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from insitu.data.durable import fsync, sync
from insitu.train import checkpoints


def save(trainer: Any, output_dir: Path) -> None:
    """Write weights, config and tokenizer into ``output_dir``: beside it first, then file by file, config.json last.

    Without that file nobody loads the directory, so a kill leaves no mixture of old and new. Every process calls it.
    """
    beside = output_dir / checkpoints.PARTIAL / "final"
    writes = trainer.args.should_save
    if writes and beside.exists():
        shutil.rmtree(beside)
    trainer.accelerator.wait_for_everyone()
    if (state := _float_state(trainer.model)) is not None:
        trainer._save(str(beside), state_dict=state)
    else:
        trainer.save_model(str(beside))
    trainer.accelerator.wait_for_everyone()
    if not writes:
        return
    (beside / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
    sync(beside)
    (output_dir / "config.json").unlink(missing_ok=True)
    for path in sorted(beside.iterdir(), key=lambda path: path.name == "config.json"):
        target = output_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.rename(target)
    fsync(output_dir)
    shutil.rmtree(output_dir / checkpoints.PARTIAL)


def _float_state(model: Any) -> dict[str, Any] | None:
    """The state dict with int8 weights as the float ones that they stand for, which any reader knows; None without int8."""
    from insitu.optim.quantized import Int8Weight

    layers = {name: m for name, m in model.named_modules() if isinstance(getattr(m, "weight", None), Int8Weight)}
    if not layers:
        return None
    state: dict[str, Any] = model.state_dict()
    for name, module in layers.items():
        for key in ("weight_int8", "weight_scale", "weight_group"):
            del state[f"{name}.{key}"]
        state[f"{name}.weight"] = module.weight.detach().dequantize()
    return state
