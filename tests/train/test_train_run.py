"""Runs from end to end: what they write can be served, what cannot work is refused before the first step."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import config_of, content, losses, trained, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from insitu.cli.training import pretrain
from insitu.live.engines.base import SamplingParams
from insitu.live.engines.embedded import EmbeddedEngine
from insitu.train import checkpoints, disk
from insitu.train.engine import TrainingError
from insitu.train.fields import ConfigError
from insitu.train.prepare import prepare

LLAMA = {
    "name": "llama-9m",
    "options": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("model", ["andrea-tiny", "llama-9m"])
def test_the_output_of_the_command_is_served_at_once(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(config=write_config(tmp_path, **({"model": LLAMA} if model == "llama-9m" else {})))
    out = tmp_path / "out"
    assert f"serve it with `insitu serve {out}`" in capsys.readouterr().out
    found = losses(out)
    assert len(found) == 12
    assert found[-1] < found[0] - 0.3
    assert sorted(checkpoints.steps_in(out)) == [8, 12]  # save_total_limit: 2
    assert not list(out.rglob("training_args.bin"))

    tokenizer = AutoTokenizer.from_pretrained(out)
    for directory in (out, out / "checkpoint-12"):
        loaded = AutoModelForCausalLM.from_pretrained(directory).eval().requires_grad_(False)
        assert sum(p.numel() for p in loaded.parameters()) > 10_000
    engine = EmbeddedEngine(
        loaded, model_name="tiny", context_length=48, eos_token_ids=[tokenizer.eos_token_id], max_requests=2
    )
    engine.start()
    try:
        prompt = tokenizer("the river of stone")["input_ids"]

        async def ask() -> list[int]:
            return [token.id async for token in engine.generate(prompt, SamplingParams(max_tokens=8, temperature=0.0))]

        answer = asyncio.run(ask())
    finally:
        engine.close()
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    greedy = again.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
    assert answer == greedy


def test_the_log_has_rates_and_the_validation_losses_of_each_source(tmp_path: Path) -> None:
    run = trained(tmp_path, training={"eval_strategy": "steps", "eval_steps": 6})
    history = run.trainer.state.log_history
    told = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in told] == [3, 6, 9, 12]
    assert all(entry["tokens_per_second"] > 0 and entry["eta_seconds"] >= 0 for entry in told)
    for name in ("prose", "lists"):
        evaluated = [entry[f"eval_{name}_loss"] for entry in history if f"eval_{name}_loss" in entry]
        assert len(evaluated) == 2
        assert evaluated[1] < evaluated[0]
    # A step's loss is of its own, and Trainer's line is their mean.
    each = losses(tmp_path / "out")
    for entry in told:
        assert entry["loss"] == pytest.approx(sum(each[entry["step"] - 3 : entry["step"]]) / 3, rel=1e-6)


def test_the_bandit_learns_from_the_losses_of_the_run(tmp_path: Path) -> None:
    run = trained(tmp_path)
    mixture = run.trainer.train_dataset
    assert sum(length for _, _, length in mixture.choices) >= 12
    assert {source for _, source, _ in mixture.choices} == {0, 1}
    assert mixture.rewards


def test_accumulation_is_the_larger_batch(tmp_path: Path) -> None:
    no_dropout = content(tmp_path)["model"]
    no_dropout["options"]["dropout"] = 0.0
    common: dict[str, Any] = {"max_steps": 6, "save_strategy": "no"}
    found = []
    for name, size, steps in (("a", 4, 1), ("b", 1, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trained(tmp_path, model=no_dropout, training={**common, **sizes, "output_dir": str(tmp_path / name)})
        found.append(losses(tmp_path / name))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_best_checkpoint_is_kept_and_known_by_its_final_name(tmp_path: Path) -> None:
    changes = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_total_limit": 1,
        "metric_for_best_model": "eval_prose_loss",
    }
    run = trained(tmp_path, training={**changes, "learning_rate": 3e-2, "load_best_model_at_end": True})
    best = run.trainer.state.best_model_checkpoint
    assert best == str(tmp_path / "out" / f"checkpoint-{run.trainer.state.best_global_step}")
    state = json.loads((Path(best) / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best


def test_a_loss_that_is_not_finite_ends_the_run_by_name(tmp_path: Path) -> None:
    run = prepare(config_of(tmp_path))
    with torch.no_grad():
        next(run.trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises((TrainingError, ValueError), match=r"loss is nan|not finite"):
        run.train()


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path: Path) -> None:
    for changes, message in (
        ({"training": {"max_steps": -1}}, "training.max_steps is missing"),
        ({"training": {"dataloader_num_workers": 2}}, "training.dataloader_num_workers=2: expected 0"),
        ({"data": {"sequence_length": 65}}, "data.sequence_length=65: the model has 64 positions"),
        ({"model": {"fsdp_size": 2}}, "model.fsdp_size=2 with 1 processes: .* torchrun --nproc-per-node 2"),
        ({"training": {"lr_scheduler_type": "cosin"}}, "cosin"),
        ({"data": {"validation": 0.0}, "training": {"eval_strategy": "steps"}}, "no source has a validation document"),
        ({"data": {"sources": [{"name": "none", "path": str(tmp_path / "none.txt")}]}}, "none.txt"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(config_of(tmp_path, **changes))
    capped = [{"name": "prose", "path": str(tmp_path / "prose.jsonl"), "max_epochs": 1}]
    with pytest.raises(ConfigError, match=r"training.max_steps=9999: the sources' max_epochs allow \d+ steps"):
        prepare(config_of(tmp_path, data={"sources": capped}, training={"max_steps": 9999}))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_disk_too_small_for_the_checkpoints_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(config_of(tmp_path))
    weights, state = disk.checkpoint_bytes(run.trainer.model, run.trainer.optimizer)
    run.train()
    saved = tmp_path / "out" / "checkpoint-12"
    # The estimate is of the tensors; a file has a header beside them.
    for name, estimated in (("model.safetensors", weights), ("optimizer.pt", state)):
        actual = (saved / name).stat().st_size
        assert 0.4 * actual < estimated < actual * 1.02, name
    # Two checkpoints are kept and a third is written before one goes; then the final weights.
    shutil.rmtree(tmp_path / "out")
    needed = 3 * (weights + state) + weights

    class Usage:
        free = needed - 1

    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(
        ConfigError, match=r"free and the run needs .*: 3 checkpoints of .* set training.save_total_limit"
    ):
        prepare(config_of(tmp_path))
    Usage.free = needed
    prepare(config_of(tmp_path))


def test_precision_and_monitor_are_part_of_the_run(tmp_path: Path) -> None:
    run = trained(
        tmp_path,
        precision={"compute": "bf16", "weights": "bf16", "moments": "bf16"},
        monitor={"every": 4, "tokens": 8, "prompts": ["the"], "action": "warn"},
        training={"max_steps": 8},
    )
    assert {p.dtype for p in run.trainer.model.parameters()} == {torch.bfloat16}
    moments = {
        value.dtype
        for state in run.trainer.optimizer.optimizer.state.values()
        for name, value in state.items()
        if name in ("exp_avg", "exp_avg_sq") and value.ndim > 1
    }
    assert moments == {torch.bfloat16}
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8]
