"""The sample monitor: it sees a collapse that the loss does not show, and a run with it is the run without it."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from monitored import CONTEXT, repeated, run, tiny_model, tokenizer, trainer, varied
from transformers import TrainerCallback

from insitu.train import kept, samples
from insitu.train.monitor import MonitorConfig, SampleMonitor
from insitu.train.sampling import sample

SMALL: dict[str, Any] = {"every": 2, "tokens": 60, "prompts": ["The", "I bal"], "patience": 3}


def monitor(**changes: Any) -> SampleMonitor:
    return SampleMonitor(MonitorConfig(**{**SMALL, **changes}), tokenizer())


def rows(path: Path) -> list[dict[str, Any]]:
    return samples.read(path / samples.NAME)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# -- a collapse --------------------------------------------------------------------------------------------------------
def test_one_repeated_document_is_stopped_while_the_loss_still_falls(tmp_path: Path, caplog: Any) -> None:
    """Varied text at first; then one document at a high rate: the loss goes down at every sample, and the text goes."""
    watch = monitor()
    healthy = varied(4 * 10)
    made = trainer(tmp_path, [*healthy, *repeated(4 * 90)], [watch], max_steps=100, save_strategy="steps", save_steps=4,
                   save_total_limit=1, learning_rate=1e-2, lr_scheduler_type="constant",
                   train_sampling_strategy="sequential")  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="insitu.train"):
        losses = run(made)
    found = rows(tmp_path)
    stopped = made.state.global_step
    assert stopped < 40
    assert watch.stopped is not None
    assert watch.stopped in caplog.text
    assert [row["low"] for row in found[-3:]] == [1, 2, 3]
    assert found[-1]["step"] == stopped
    assert all(row["score"] > 60 for row in found if row["step"] <= 10)
    falling = losses[found[-3]["step"] - 1 : stopped]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 0.5 * falling[0]
    # What is kept is from before, whole, and can be trained on from.
    good = kept.last_good(tmp_path)
    assert good is not None
    assert str(good) in watch.stopped
    step = int(good.name.removeprefix("good-"))
    assert step < found[-3]["step"]
    assert max(row["step"] for row in found if row["low"] == 0) - step < 4
    assert [path.name for path in tmp_path.glob("checkpoint-*")] != [f"checkpoint-{step}"]  # rotation took it
    again = trainer(tmp_path / "again", healthy, max_steps=step + 2)
    run(again, resume_from_checkpoint=str(good))
    assert again.state.global_step == step + 2


def test_with_warn_the_run_goes_on(tmp_path: Path, caplog: Any) -> None:
    watch = monitor(action="warn", threshold=99.9)
    made = trainer(tmp_path, repeated(8), [watch], max_steps=10)
    with caplog.at_level(logging.WARNING, logger="insitu.train"):
        run(made)
    assert made.state.global_step == 10
    assert watch.stopped is None
    assert [row["low"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert caplog.text.count("collapsed into repetition") == 3


def test_one_good_score_starts_the_count_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = ["bal " * 60] * 2, [" ".join(f"{a}{b}" for a in "bcdfghjk" for b in "aeioulmn")] * 2
    said = iter([bad, bad, good, bad, bad, bad, good])
    current: list[str] = []

    def written(*_: Any) -> list[list[int]]:
        current[:] = next(said)
        return [[0], [1]]

    watch = monitor(every=1)
    monkeypatch.setattr("insitu.train.monitor.sample", written)
    monkeypatch.setattr(watch._tokenizer, "decode", lambda ids, **_: current[ids[0]])
    made = trainer(tmp_path, varied(8), [watch], max_steps=7)
    run(made)
    assert [row["low"] for row in rows(tmp_path)] == [1, 2, 0, 1, 2, 3]
    assert made.state.global_step == 6


# -- nothing else changes ----------------------------------------------------------------------------------------------
class Drawn(TrainerCallback):  # type: ignore[misc]
    """What torch's generator would give next, after each step, and whether the model is in training."""

    def __init__(self) -> None:
        self.seen: list[tuple[bytes, bool]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self.seen.append((torch.get_rng_state().numpy().tobytes(), model.training))


def test_a_run_with_the_monitor_is_the_run_without_it_to_the_last_digit(tmp_path: Path) -> None:
    """With dropout, so that the random state matters; the shuffling of the next epoch draws from it too."""
    told = []
    for name, watch in (("without", []), ("with", [monitor(every=1)])):
        drawn, model = Drawn(), tiny_model(attention_dropout=0.2)
        own = model.generation_config
        made = trainer(tmp_path / name, varied(16), [*watch, drawn], model, max_steps=12)
        losses = run(made)
        assert model.generation_config is own
        told.append((losses, drawn.seen, weights(model)))
    (losses, seen, reached), (losses_with, seen_with, reached_with) = told
    assert len(rows(tmp_path / "with")) == 12
    assert losses == losses_with
    assert seen == seen_with
    assert len({state for state, _ in seen}) > 3  # it does move
    assert all(torch.equal(reached[name], reached_with[name]) for name in reached)


def test_modules_that_were_in_eval_mode_stay_so() -> None:
    model = tiny_model()
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    sample(model, [[2], [3, 4]], 5, 0.8, 0)
    assert [module.training for module in model.modules()] == before


def test_random_state_and_mode_come_back_when_sampling_fails() -> None:
    model = tiny_model()
    model.train()
    before = torch.get_rng_state()
    with pytest.raises(IndexError):
        sample(model, [[10**6]], 5, 0.8, 0)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


# -- the text ----------------------------------------------------------------------------------------------------------
def test_the_text_is_that_of_each_prompt_alone_and_of_the_seed() -> None:
    """Padding on the left changes nothing: at a temperature near 0 each row is the greedy text of its prompt."""
    model = tiny_model()
    prompts = [[2], [3, 7, 9, 11]]
    made = sample(model, prompts, 20, 1e-6, 0)
    for prompt, row in zip(prompts, made, strict=True):
        ids = list(prompt)
        for _ in range(20):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert row == ids[len(prompt) :]
    warm = sample(model, prompts, 20, 1.0, 0)
    assert warm == sample(model, prompts, 20, 1.0, 0)
    assert warm != sample(model, prompts, 20, 1.0, 1)


def test_an_end_of_text_token_ends_nothing() -> None:
    model = tiny_model()
    assert model.generation_config.eos_token_id == 1
    model.lm_head.bias = torch.nn.Parameter(100.0 * (torch.arange(model.config.vocab_size) == 1))
    assert sample(model, [[2]], 12, 1.0, 0) == [[1] * 12]


def test_a_model_that_writes_nothing_scores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("insitu.train.monitor.sample", lambda *_: [[1] * 60, [1] * 60])  # end of text only
    run(trainer(tmp_path, varied(8), [monitor(every=1)], max_steps=1))
    (row,) = rows(tmp_path)
    assert row["score"] == 0
    assert [one["note"] for one in row["samples"]] == ["empty", "empty"]


# -- the log and a resume ----------------------------------------------------------------------------------------------
class Killed(TrainerCallback):  # type: ignore[misc]
    """Ends the process, as it were, before the sixth step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_a_run_that_was_killed_stops_where_the_whole_one_does(tmp_path: Path) -> None:
    """The count of low scores goes on over the break, and the log has no step twice."""

    def made(path: Path, *more: Any) -> Any:
        watch = monitor(threshold=99.9, patience=4)
        return trainer(path, varied(40), [watch, *more], max_steps=30, save_strategy="steps", save_steps=5)

    whole = made(tmp_path / "whole")
    run(whole)
    assert whole.state.global_step == 6
    assert [(row["step"], row["low"]) for row in rows(tmp_path / "whole")] == [(2, 1), (4, 2), (5, 3), (6, 4)]
    broken = made(tmp_path / "broken", Killed())
    with pytest.raises(KeyboardInterrupt):
        run(broken)
    log = tmp_path / "broken" / samples.NAME
    assert [row["step"] for row in samples.read(log)] == [2, 4, 5]
    samples.append(log, {"step": 6, "score": 1.0, "low": 4})  # of a step that the checkpoint does not have
    with log.open("ab") as out:
        out.write(b'{"step": 8, "sco')
    again = made(tmp_path / "broken")
    run(again, resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-5"))
    assert again.state.global_step == 6
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


def test_rows_after_the_step_of_a_resume_are_forgotten_and_a_torn_line_too(tmp_path: Path) -> None:
    path = tmp_path / samples.NAME
    for step in (2, 4, 6):
        samples.append(path, {"step": step, "score": 10.0, "low": step // 2, "loss": None})
    with path.open("ab") as out:
        out.write(b'{"step": 8, "sco')
    assert [row["step"] for row in samples.read(path)] == [2, 4, 6]
    assert [row["low"] for row in samples.rewind(path, 4)] == [1, 2]
    samples.append(path, {"step": 6, "score": 20.0, "low": 3, "loss": 1.5})
    assert [(row["step"], row["score"]) for row in samples.read(path)] == [(2, 10.0), (4, 10.0), (6, 20.0)]


@pytest.mark.parametrize("line", ["{", "[]", '{"step": 1}'])
def test_a_broken_line_inside_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / samples.NAME
    path.write_text(f'{{"step": 1, "score": 1, "low": 0}}\n{line}\n{{"step": 3, "score": 1, "low": 0}}\n')
    with pytest.raises(ValueError, match=r"samples\.jsonl:2: .*move the file away"):
        samples.read(path)


def test_a_row_says_what_the_plot_and_a_reader_need(tmp_path: Path) -> None:
    run(trainer(tmp_path, varied(8), [monitor()], max_steps=4))
    first, second = rows(tmp_path)
    assert (first["step"], second["step"]) == (2, 4)
    assert first["score"] == pytest.approx(first["bigrams"] + first["trigrams"] + first["words"] + first["characters"])
    assert first["score"] == pytest.approx(sum(one["score"] for one in first["samples"]) / 2)
    assert [one["prompt"] for one in first["samples"]] == ["The", "I bal"]
    assert all(len(one["text"].split()) > 50 for one in first["samples"])
    assert second["loss"] > 0
    json.dumps(first)


# -- the kept checkpoint -----------------------------------------------------------------------------------------------
def checkpoint(directory: Path, step: int, text: str) -> Path:
    made = directory / f"checkpoint-{step}"
    (made / "deep").mkdir(parents=True, exist_ok=True)
    (made / "deep" / "weights").write_text(text)
    return made


def test_the_kept_checkpoint_survives_its_original_and_gives_way_to_the_next(tmp_path: Path) -> None:
    assert kept.last_good(tmp_path) is None
    first = checkpoint(tmp_path, 10, "ten")
    assert kept.keep(first) == tmp_path / "good-10"
    assert (tmp_path / "good-10" / "deep" / "weights").stat().st_nlink == 2  # no second copy
    shutil.rmtree(first)
    assert (tmp_path / "good-10" / "deep" / "weights").read_text() == "ten"
    kept.keep(checkpoint(tmp_path, 9, "nine"))
    kept.keep(checkpoint(tmp_path, 100, "hundred"))
    assert [path.name for path in tmp_path.glob("*good*")] == ["good-100"]
    kept.keep(checkpoint(tmp_path, 100, "hundred"))  # the same step again
    assert [path.name for path in tmp_path.glob("*good*")] == ["good-100"]


def test_a_kill_at_any_call_leaves_a_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that changes the disk is in turn the one at which the process dies."""
    import os

    class Killed(BaseException):
        pass

    left = [0]

    def dying(call: Any) -> Any:
        def instead(*args: Any, **options: Any) -> Any:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return call(*args, **options)

        return instead

    with monkeypatch.context() as patched:
        for module, name in ((os, "link"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (os, "rename")):
            patched.setattr(module, name, dying(getattr(module, name)))
        kills = 0
        for steps in ((10, 20), (20, 20)):
            for at in range(100):
                left[0] = 10**9
                shutil.rmtree(tmp_path, ignore_errors=True)
                kept.keep(checkpoint(tmp_path, steps[0], "old"))
                fresh = checkpoint(tmp_path, steps[1], "old" if steps[0] == steps[1] else "new")
                left[0] = at
                try:
                    kept.keep(fresh)
                except Killed:
                    kills += 1
                    left[0] = 10**9
                    found = kept.last_good(tmp_path)
                    assert found is not None
                    assert (found / "deep" / "weights").read_text() in ("old", "new")
                    assert kept.keep(fresh).name == f"good-{steps[1]}"  # and the next time clears up
                    assert len(list(tmp_path.glob("*good*"))) == 1
                else:
                    break
        assert kills > 10


def test_a_good_checkpoint_does_not_change_when_its_steps_are_trained_anew(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, 20, "first time")
    kept.keep(made)
    kept.part_from(tmp_path, 30)
    assert (made / "deep" / "weights").stat().st_nlink == 2  # it is not written again: nothing to do
    kept.part_from(tmp_path, 10)
    (made / "deep" / "weights").write_text("second ti")  # in place, cut off by a kill
    assert (tmp_path / "good-20" / "deep" / "weights").read_text() == "first time"


def test_a_good_checkpoint_that_is_gone_is_said_and_stops_nothing(tmp_path: Path, caplog: Any) -> None:
    class Gone(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            shutil.rmtree(tmp_path / f"checkpoint-{state.global_step}")

    made = trainer(tmp_path, varied(16), [monitor(), Gone()], max_steps=4, save_strategy="steps", save_steps=2)
    with caplog.at_level(logging.WARNING, logger="insitu.train"):
        run(made)
    assert made.state.global_step == 4
    assert caplog.text.count("is good and not there any more: it is not kept") == 2
    assert kept.last_good(tmp_path) is None


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"every": -1}, r"monitor\.every=-1; expected an integer, 0 or more"),
        ({"every": 2.5}, r"monitor\.every=2\.5"),
        ({"tokens": 0}, r"monitor\.tokens=0; expected an integer, 1 or more"),
        ({"patience": 0}, r"monitor\.patience=0"),
        ({"patience": True}, r"monitor\.patience=True"),
        ({"threshold": 100}, r"monitor\.threshold=100; expected a number over 0, below 100"),
        ({"temperature": 0}, r"monitor\.temperature=0; expected a number over 0"),
        ({"temperature": float("nan")}, r"monitor\.temperature=nan"),
        ({"prompts": []}, r"monitor\.prompts=\[\]; expected a list of at least one text"),
        ({"prompts": "The"}, r"monitor\.prompts='The'; expected a list"),
        ({"action": "rollback"}, r"monitor\.action='rollback'; expected 'stop' or 'warn'.*good-STEP"),
    ],
)
def test_a_bad_setting_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MonitorConfig(**change)


def test_what_cannot_be_sampled_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the prompt '' encodes to no token"):
        monitor(prompts=["The", ""])
    with pytest.raises(ValueError, match="turns the monitor off"):
        monitor(every=0)
    made = trainer(tmp_path, varied(8), [monitor(tokens=CONTEXT - 1)])
    with pytest.raises(
        ValueError, match=r"monitor\.tokens=127 after a prompt of 2 tokens.*128 positions; give at most 126"
    ):
        run(made)
    assert made.state.global_step == 0


def test_the_plot_is_drawn_at_the_end(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run(trainer(tmp_path, varied(8), [monitor()], max_steps=4))
    assert "</svg>" in (tmp_path / samples.PLOT).read_text()
