"""What torchrun starts on each of two processes: a sharded run, its end again from a checkpoint, and a replicated run."""

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from training_runs import config_of

from insitu.train.prepare import prepare

NO_DROPOUT = {"dropout": 0.0}


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    common = {"per_device_train_batch_size": 1, "save_total_limit": None}
    model = config_of(directory).model.options | NO_DROPOUT
    sharded = {"options": model, "fsdp_size": 2}
    for name, section in (("sharded", sharded), ("replicated", {"options": model})):
        prepare(config_of(directory, model=section, training={**common, "output_dir": str(directory / name)})).train()

    again = directory / "again"
    if dist.get_rank() == 0:
        shutil.copytree(directory / "sharded" / "checkpoint-8", again / "checkpoint-8")
        shutil.copytree(directory / "sharded" / "data", again / "data")
        shutil.copy(directory / "sharded" / "losses.jsonl", again)
    dist.barrier()
    changes = {**common, "output_dir": str(again)}
    prepare(config_of(directory, model=sharded, training=changes), resume=True).train()
    dist.barrier()
    dist.destroy_process_group()


main(Path(sys.argv[1]))
