"""What torchrun starts on each of two processes: a sharded run, its end again from a checkpoint, and a replicated run."""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training_runs import config_of
from transformers import TrainerCallback

from insitu.train.prepare import prepare
from insitu.train.run import Run

NO_DROPOUT = {"dropout": 0.0}
KEPT = 8  # the step from which the sharded run is repeated


class State(TrainerCallback):  # type: ignore[misc]
    """This rank's weights and optimizer state, as of a step and as the run begins."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.at: dict[int, dict[str, Any]] = {}

    def _keep(self, step: int) -> None:
        optimizer, found = self.trainer.optimizer.optimizer, self.at.setdefault(step, {})
        for name, p in self.trainer.model.named_parameters():
            found[name] = p.detach().to_local().clone()
            for key, value in optimizer.state.get(p, {}).items():
                tensor = torch.as_tensor(value.to_local() if hasattr(value, "to_local") else value)
                found[f"{name} {key}"] = tensor.clone()
        found["rate"] = torch.tensor([group["lr"] for group in optimizer.param_groups])
        found["random"] = torch.get_rng_state()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._keep(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._keep(state.global_step)


def train(config: Any, *, resume: bool = False) -> State:
    run = prepare(config, resume=resume)
    assert isinstance(run, Run)
    state = State(run.trainer)
    run.trainer.add_callback(state)
    run.train()
    return state


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    common = {"per_device_train_batch_size": 1, "save_total_limit": None}
    model = config_of(directory).model.options | NO_DROPOUT
    sharded = {"options": model, "fsdp_size": 2}
    where = {name: {**common, "output_dir": str(directory / name)} for name in ("replicated", "sharded", "again")}
    prepare(config_of(directory, model={"options": model}, training=where["replicated"])).train()
    first = train(config_of(directory, model=sharded, training=where["sharded"]))

    again = directory / "again"
    if dist.get_rank() == 0:
        shutil.copytree(directory / "sharded" / f"checkpoint-{KEPT}", again / f"checkpoint-{KEPT}")
        shutil.copytree(directory / "sharded" / "data", again / "data")
        shutil.copy(directory / "sharded" / "losses.jsonl", again)
    dist.barrier()
    second = train(config_of(directory, model=sharded, training=where["again"]), resume=True)
    saved, restored = first.at[KEPT], second.at[KEPT]
    assert saved.keys() == restored.keys()
    assert any("exp_avg" in key for key in saved)
    for key, value in saved.items():
        if key != "random":  # Trainer takes it up after this
            assert torch.equal(value, restored[key]), key
    dist.barrier()
    dist.destroy_process_group()


main(Path(sys.argv[1]))
