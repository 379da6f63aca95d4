"""A run that is killed and resumed is the run that was not, to the last bit; and it goes on into nothing but itself."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import config_of, content, losses, trained

from insitu.data.messages import DataError
from insitu.train import checkpoints
from insitu.train.fields import ConfigError
from insitu.train.prepare import prepare

_DRIVER = Path(__file__).parent / "training_kills.py"


class Driver:
    """The process that forks the runs."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, str(_DRIVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, config: dict[str, Any], *, resume: bool = False, kill: int | None = None) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"config": config, "resume": resume, "kill": kill}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    made = Driver()
    yield made
    assert made.process.stdin is not None
    assert made.process.stdout is not None
    made.process.stdin.close()
    made.process.wait(60)
    made.process.stdout.close()


def what_it_wrote(output_dir: Path) -> dict[str, Any]:
    """All that must not depend on a kill: losses of each step, log, final weights, optimizer, data."""
    last = output_dir / "checkpoint-12"
    state = json.loads((last / "trainer_state.json").read_text())
    record = json.loads((last / checkpoints.RECORD).read_text())
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    return {
        "losses": (output_dir / "losses.jsonl").read_bytes(),
        "log": [(entry["step"], entry.get("loss"), entry.get("eval_prose_loss")) for entry in state["log_history"]],
        "weights": (output_dir / "model.safetensors").read_bytes(),
        "optimizer": {
            f"{i} {key}": torch.as_tensor(value).tolist() for i, one in optimizer.items() for key, value in one.items()
        },
        "data": record["data"],
        "checkpoints": sorted(checkpoints.steps_in(output_dir)),
        "left over": sorted(path.name for path in output_dir.glob(".*")),
    }


@pytest.mark.parametrize("kind", ["apollo", "adamw"])
def test_a_run_killed_at_any_write_and_resumed_is_the_run_without_a_break(
    kind: str, driver: Driver, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "optimizer": {"name": kind, "options": {"rank": 4, "refresh": 3} if kind == "apollo" else {}},
        "training": {"eval_strategy": "steps", "eval_steps": 6},
    }
    config = content(tmp_path, **{**changes, "training": {**changes["training"], "save_steps": 5}})
    out = Path(config["training"]["output_dir"])
    warm = driver(config)  # makes tokens and tokenizer, which the others find
    assert warm["status"] == 0
    shutil.copytree(out / "data", tmp_path / "data")

    def fresh() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "data", out / "data")

    fresh()
    told = driver(config)
    assert told["status"] == 0
    expected = what_it_wrote(out)
    assert expected["checkpoints"] == [10, 12]
    assert expected["left over"] == []
    assert len(losses(out)) == 12

    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}: killed at", end=" ")  # noqa: T201
    dice = random.Random(seed)
    resumed_from = set()
    for first in (1, told["writes"] // 2):  # the second has a checkpoint behind it
        fresh()
        at = dice.randrange(first, told["writes"] + 1)
        print(at, end=" ")  # noqa: T201
        assert driver(config, kill=at)["status"] == -signal.SIGKILL
        # A second kill while it goes on.
        again = dice.randrange(1, told["writes"] // 2)
        driver(config, resume=True, kill=again)
        found = checkpoints.newest(out)
        resumed_from.add(found.name if found else None)
        assert driver(config, resume=True)["status"] == 0
        assert what_it_wrote(out) == expected
    assert resumed_from != {None}, "no trial had a checkpoint to go on from"


def test_a_checkpoint_that_lost_a_file_is_passed_over_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path)
    out = tmp_path / "out"
    whole = losses(out)
    (out / "checkpoint-12" / "optimizer.pt").unlink()
    assert checkpoints.newest(out) == out / "checkpoint-8"
    assert "optimizer.pt is missing" in caplog.text
    shutil.rmtree(out / "checkpoint-12")
    with (out / "checkpoint-8" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert checkpoints.newest(out) is None
    with pytest.raises(
        ConfigError, match=r"checkpoint-8 cannot be resumed: model.safetensors is missing or has another size"
    ):
        prepare(config_of(tmp_path, training={"resume_from_checkpoint": str(out / "checkpoint-8")}))
    shutil.rmtree(out / "checkpoint-8")
    trained(tmp_path, resume=True)
    assert losses(out) == whole


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path) -> None:
    trained(tmp_path, training={"max_steps": 4})
    for changes, message in (
        ({"model": {"options": {"hidden_size": 32, "ffn_dim": 32}}}, r"model.options.ffn_dim was 64 and is 32"),
        ({"data": {"hold": [2, 3]}}, r"data.hold was \[1, 3\] and is \[2, 3\]"),
        ({"optimizer": {"name": "adamw", "options": {}}}, "optimizer.name was 'apollo' and is 'adamw'"),
        ({"training": {"seed": 4}}, "training.seed was 3 and is 4"),
        ({"training": {"per_device_train_batch_size": 3}}, "was trained with 4 sequences in a step and this run has 6"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare(config_of(tmp_path, **changes), resume=True)
    text = tmp_path / "prose.jsonl"
    text.write_text(text.read_text() + json.dumps({"text": "a stone in the river"}) + "\n")
    with pytest.raises(DataError, match=r"trained on other text or with another tokenizer: .*prose"):
        prepare(config_of(tmp_path), resume=True)


def test_the_tensors_of_a_checkpoint_must_be_the_models(tmp_path: Path) -> None:
    run = trained(tmp_path, training={"max_steps": 4})
    found = tmp_path / "out" / "checkpoint-4"
    checkpoints.check_weights(found, run.trainer.model)
    model = run.trainer.model
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"is of another model: it has no extra.weight"):
        checkpoints.check_weights(found, model)
    del model.extra
    model.lm_head = torch.nn.Linear(32, 281, bias=False)
    with pytest.raises(ConfigError, match=r"lm_head.weight has the shape \(280, 32\) there and \(281, 32\) here"):
        checkpoints.check_weights(found, model)


def test_an_output_directory_in_use_is_not_written_over(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ConfigError, match="holds checkpoint-8 of an earlier run: go on from it with --resume"):
        prepare(config_of(tmp_path))
    early = str(tmp_path / "out" / "checkpoint-8")
    with pytest.raises(ConfigError, match="checkpoint-12 is after step 8"):
        prepare(config_of(tmp_path, training={"resume_from_checkpoint": early}))


def test_a_longer_run_goes_on_from_the_end_of_a_shorter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    constant = {"lr_scheduler_type": "constant"}
    trained(tmp_path, training={**constant, "max_steps": 4})
    trained(tmp_path, resume=True, training=constant)
    assert "training.max_steps was 4 and is 12: from here on it is another run" in caplog.text
    (tmp_path / "whole").mkdir()
    trained(tmp_path / "whole", training=constant)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole" / "out")


def test_a_kill_before_the_last_rotation_leaves_no_checkpoint_too_many(tmp_path: Path) -> None:
    trained(tmp_path)
    out = tmp_path / "out"
    kept = set(checkpoints.steps_in(out))
    last = max(kept)
    shutil.copytree(out / f"checkpoint-{last}", out / "checkpoint-1")
    (out / "config.json").unlink()
    prepare(config_of(tmp_path), resume=True).train()
    assert set(checkpoints.steps_in(out)) == kept
    assert (out / "config.json").exists()
