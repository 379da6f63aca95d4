"""Two processes under torchrun: sharded (FSDP2) or replicated (DDP) they are the run on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import config_of, losses, write_texts
from transformers import AutoModelForCausalLM

from insitu.train.prepare import prepare


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes wrote their runs, beside ``alone``, the same run on this one."""
    found = tmp_path_factory.mktemp("processes")
    write_texts(found)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).parent / "training_ranks.py"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        str(found),
    ]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert told.returncode == 0, told.stderr[-4000:]
    model = {"options": {**config_of(found).model.options, "dropout": 0.0}}
    changes = {"output_dir": str(found / "alone"), "save_total_limit": None}
    prepare(config_of(found, model=model, training=changes)).train()
    return found


@pytest.mark.parametrize("how", ["sharded", "replicated"])
def test_two_processes_are_one_to_the_tolerance_of_float32(how: str, directory: Path) -> None:
    alone = losses(directory / "alone")
    assert alone[-1] < alone[0] - 0.3
    assert losses(directory / how) == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("where", ["", "checkpoint-12"])
def test_what_a_sharded_run_wrote_loads_on_one_process(where: str, directory: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(directory / "sharded" / where)
    alone = AutoModelForCausalLM.from_pretrained(directory / "alone" / where)
    for (name, p), q in zip(ours.named_parameters(), alone.parameters(), strict=True):
        assert type(p) is torch.nn.Parameter
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-4, msg=lambda told, name=name: f"{name}: {told}")


def test_a_sharded_run_goes_on(directory: Path) -> None:
    """From bits that are the same: weights, moments, counts and rate are compared where it ran, in training_ranks.py. Its
    gradients then are the other run's to float32 only."""
    again, whole = losses(directory / "again"), losses(directory / "sharded")
    assert again[:9] == whole[:9]
    assert again == pytest.approx(whole, rel=3e-5)


def test_the_sharded_weights_are_gone_from_where_they_began(directory: Path) -> None:
    assert not list(directory.rglob(".partial*"))
