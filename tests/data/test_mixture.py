"""The training stream: who is chosen when, what that depends on, and that it goes on exactly where it was."""

import json
import math
import random
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed import byte_tokenizer, config, numbered, write_source
from torch.utils.data import DataLoader

from insitu.data.config import DataConfig
from insitu.data.messages import DataError
from insitu.data.mixture import Mixture, make_mixture

S = 4  # sequences in a step


def _mixture(
    names: str = "abc", *, documents: int = 30, rank: int = 0, world_size: int = 1, seed: int = 3, **options: Any
) -> Mixture:
    options = {"hold": [2, 5]} | options
    return Mixture(
        [numbered(k + 1, documents, 11) for k in range(len(names))],
        config(names, **options),
        sequence_length=8,
        seed=seed,
        sequences_per_step=S,
        rank=rank,
        world_size=world_size,
    )


def _loss(step: int, source: int) -> float:
    """A loss as training would give it: a function of the step and what was in it."""
    return (source + 2) * (1 + step) ** -0.2 * (1 + 0.1 * math.sin(step * 12.9898 + source))


def _train(mixture: Mixture, steps: int, start: int = 1, ahead: int = 0) -> list[list[tuple[int, list[int]]]]:
    """Draw and observe as a trainer does; ``ahead`` sequences are drawn before the step's loss is known."""
    iterator, drawn, found = iter(mixture), [], []
    share = S // mixture.world_size
    for step in range(start, start + steps):
        while len(drawn) < (step - start + 1) * share + ahead:
            item = next(iterator)
            assert torch.equal(item["input_ids"], item["labels"])
            drawn.append((item["source"], item["input_ids"].tolist()))
        mine = drawn[(step - start) * share : (step - start + 1) * share]
        mixture.observe(step, _loss(step, mine[0][0]))
        found.append(mine)
    return found


def test_a_step_is_of_one_source_and_a_hold_of_one_source() -> None:
    mixture = _mixture()
    steps = _train(mixture, 120)
    for number, step in enumerate(steps, start=1):
        (source,) = {source for source, _ in step}
        first, chosen, hold = next(entry for entry in reversed(mixture.choices) if entry[0] <= number)
        assert chosen == source
        assert first <= number < first + hold
        for name, ids in step:
            assert all(token == 0 or token // 1000 == name + 1 for token in ids), "the sequence is of that source"
    assert {source for _, source, _ in mixture.choices} == {0, 1, 2}
    assert all(2 <= hold <= 5 for _, _, hold in mixture.choices)


@pytest.mark.parametrize("mixture", ["bandit", "weighted"])
def test_every_sequence_of_a_source_comes_in_order_and_once(mixture: str) -> None:
    made = _mixture(mixture=mixture)
    found: dict[int, list[list[int]]] = {0: [], 1: [], 2: []}
    for step in _train(made, 100):
        for source, ids in step:
            found[source].append(ids)
    for source, sequences in found.items():
        stream = made.streams[source]
        assert sequences == [stream.sequence(p).tolist() for p in range(len(sequences))]
    assert [len(found[k]) for k in range(3)] == made.positions


def test_drawing_ahead_changes_nothing() -> None:
    plain = _train(_mixture(), 80)
    assert _train(_mixture(), 80, ahead=1) == plain
    assert _train(_mixture(), 80, ahead=S) == plain


def test_a_choice_uses_losses_of_two_steps_before_and_none_later() -> None:
    """Step 40 of a run: another loss at 39 or 40 cannot change who is chosen for it, one at 38 can."""

    def chosen(changed: int, factor: float) -> int:
        mixture = _mixture(hold=[1, 1], exploration=0.3)
        iterator = iter(mixture)
        for step in range(1, 41):
            item = next(iterator)
            for _ in range(S - 1):
                next(iterator)
            if step == 40:
                return int(item["source"])
            mixture.observe(step, _loss(step, item["source"]) * (factor if step == changed else 1))
        raise AssertionError

    factors = [1e-3, 0.1, 0.5, 2.0, 10.0, 1e3]
    assert len({chosen(39, factor) for factor in [1.0, *factors]}) == 1
    assert len({chosen(38, factor) for factor in [1.0, *factors]}) > 1


def test_an_unobserved_step_is_an_error_and_not_a_guess() -> None:
    mixture = _mixture()
    iterator = iter(mixture)
    for _ in range(2 * S):
        next(iterator)
    with pytest.raises(RuntimeError, match="step 3 is drawn, but the loss of step 1 was not observed"):
        next(iterator)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -1.0])
def test_a_loss_that_is_not_finite_is_refused(loss: float) -> None:
    with pytest.raises(ValueError, match="training loss of step 5 is"):
        _mixture().observe(5, loss)


def test_workers_of_a_data_loader_are_refused() -> None:
    loader = DataLoader(_mixture(), batch_size=2, num_workers=1)
    with pytest.raises(RuntimeError, match="set dataloader_num_workers to 0"):
        next(iter(loader))


def test_two_runs_are_the_same_and_another_seed_is_not() -> None:
    assert _train(_mixture(), 60) == _train(_mixture(), 60)
    assert _train(_mixture(), 60) != _train(_mixture(seed=4), 60)


def test_each_source_has_an_order_of_its_own() -> None:
    orders = [tuple(stream._order(0)[0]) for stream in _mixture().streams]
    assert len(set(orders)) == 3


@pytest.mark.parametrize("mixture", ["bandit", "weighted"])
def test_ranks_draw_disjoint_parts_of_the_same_steps(mixture: str) -> None:
    whole = _train(_mixture(mixture=mixture), 60)
    for world_size in (2, 4):
        ranks = []
        for rank in range(world_size):
            made = _mixture(mixture=mixture, rank=rank, world_size=world_size)
            iterator, steps = iter(made), []
            for step, everything in enumerate(whole, start=1):
                mine = [next(iterator) for _ in range(S // world_size)]
                steps.append([(item["source"], item["input_ids"].tolist()) for item in mine])
                made.observe(step, _loss(step, everything[0][0]))  # the mean over ranks: the same number on each
            ranks.append(steps)
        together = [[ranks[j % world_size][t][j // world_size] for j in range(S)] for t in range(60)]
        assert together == whole


@pytest.mark.parametrize("mixture", ["bandit", "weighted"])
@pytest.mark.parametrize("ahead", [0, 1, S])
def test_a_resumed_run_is_the_run_that_never_stopped(mixture: str, ahead: int) -> None:
    options = {
        "mixture": mixture,
        "floor": {"a": 0.4},
        "warmup": {"a": True, "b": True},
        "warmup_steps": 15,
        "max_epochs": {"c": 5},
    }
    whole_mixture = _mixture(**options)
    whole = _train(whole_mixture, 90)
    for stop in (1, 2, 3, 14, 40, 77):
        first = _mixture(**options)
        assert _train(first, stop, ahead=ahead) == whole[:stop]
        state = json.loads(json.dumps(first.state_dict(stop * S)))
        second = _mixture(**options)
        second.load_state_dict(state)
        assert second.state_dict(stop * S) == state
        assert _train(second, 90 - stop, start=stop + 1) == whole[stop:]
        assert second.choices == whole_mixture.choices
        assert second.rewards == whole_mixture.rewards
        assert second.state_dict(90 * S) == whole_mixture.state_dict(90 * S)


def test_a_run_resumes_on_another_number_of_ranks() -> None:
    whole = _train(_mixture(), 50)
    first = _mixture()
    _train(first, 20)
    second = _mixture(rank=1, world_size=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(20 * S))))
    iterator = iter(second)
    for step in range(21, 51):
        mine = [next(iterator) for _ in range(S // 2)]
        assert [(item["source"], item["input_ids"].tolist()) for item in mine] == whole[step - 1][1::2]
        second.observe(step, _loss(step, mine[0]["source"]))


def test_a_run_goes_back_to_an_earlier_state_of_itself() -> None:
    mixture = _mixture()
    begun = _train(mixture, 10)
    state = json.loads(json.dumps(mixture.state_dict(10 * S)))
    _train(mixture, 12, start=11)
    mixture.load_state_dict(state)
    with pytest.raises(ValueError, match="no state before sequence 80; kept are those before 40"):
        mixture.state_dict(20 * S)
    assert begun + _train(mixture, 30, start=11) == _train(_mixture(), 40)


def test_state_can_be_had_of_the_last_steps_only_and_of_whole_ones() -> None:
    mixture = _mixture()
    _train(mixture, 30, ahead=S)
    for step in (29, 30):
        assert mixture.state_dict(step * S)["step"] == step
    with pytest.raises(RuntimeError, match="loss of step 31 was not observed"):
        mixture.state_dict(31 * S)
    for sequences in (10 * S, 30 * S + 1):
        with pytest.raises(ValueError, match=f"no state before sequence {sequences}"):
            mixture.state_dict(sequences)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed 3, this run 4"),
        ({"mixture": "weighted"}, "mixture bandit, this run weighted"),
        ({"documents": 31}, "other text or with another tokenizer: a, b, c"),
        ({"names": "abd"}, r"sources \['a', 'b', 'c'\], this run \['a', 'b', 'd'\]"),
    ],
)
def test_a_state_of_another_run_is_refused(change: dict[str, Any], message: str) -> None:
    state = _mixture().state_dict(0)
    with pytest.raises(DataError, match=message):
        _mixture(**change).load_state_dict(state)


def test_warmup_draws_from_its_sources_only() -> None:
    mixture = _mixture("abcd", warmup={"b": True, "d": True}, warmup_steps=40, floor={"a": 1.0}, hold=[1, 2])
    sources = [step[0][0] for step in _train(mixture, 120)]
    assert set(sources[:40]) == {1, 3}
    assert {0, 2} <= set(sources[41:])


def test_a_source_is_not_chosen_past_its_epochs() -> None:
    # 30 documents of 11 tokens are 41 sequences of 8 an epoch: two epochs are 82, of which whole steps use 80.
    mixture = _mixture(max_epochs={"a": 2, "b": 1}, floor={"a": 1.0})
    steps = _train(mixture, 200)
    counts = Counter(source for step in steps for source, _ in step)
    assert counts[0] == 80
    assert counts[1] == 40
    assert counts[2] == 800 - 120
    seen = Counter(token for step in steps for source, ids in step for token in ids if source == 0 and token)
    assert max(seen.values()) == 2
    last = max(first for first, source, _ in mixture.choices if source == 0)
    assert last < 200 * 0.5, "its floor does not bring it back"


def test_when_every_source_is_used_up_the_run_ends_with_the_reason() -> None:
    mixture = _mixture("ab", max_epochs={"a": 2, "b": 1})
    assert mixture.steps == 30
    _train(mixture, 30)
    with pytest.raises(DataError, match="no source is left for step 31"):
        next(iter(mixture))
    assert _mixture("ab", max_epochs={"a": 2}).steps is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": {"b": 0.05}}, "source b: max_epochs=0.05 of its text are 2 sequences"),
        ({"max_epochs": {"b": 1}, "warmup": {"b": True}, "warmup_steps": 11}, "max_epochs and weights allow 10 steps"),
        (
            {"mixture": "weighted", "weight": {"b": 0.0}, "warmup": {"b": True}, "warmup_steps": 3},
            "max_epochs and weights allow 0 steps",
        ),
    ],
)
def test_limits_that_cannot_work_are_refused_before_the_first_step(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        _mixture(**options)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 3), (2, 2), (-1, 2)])
def test_ranks_that_do_not_fit_the_step_are_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="expected a multiple of the ranks"):
        _mixture(rank=rank, world_size=world_size)


def test_weights_are_kept_at_every_moment() -> None:
    weights = {"a": 3.0, "b": 1.0, "c": 0.0, "d": 2.5}
    mixture = _mixture("abcd", mixture="weighted", weight=weights)
    counts = np.zeros(4)
    for number, item in enumerate(islice(iter(mixture), 1500), start=1):
        counts[item["source"]] += 1
        shares = np.array([*weights.values()]) / 6.5 * number
        assert (np.abs(counts - shares) < 1).all()
    assert counts[2] == 0


def test_a_source_that_waited_for_the_end_of_the_warmup_does_not_catch_up() -> None:
    mixture = _mixture("ab", mixture="weighted", warmup={"a": True}, warmup_steps=50)
    steps = _train(mixture, 60)
    assert {source for step in steps[:50] for source, _ in step} == {0}
    assert all(Counter(source for source, _ in step) == {0: 2, 1: 2} for step in steps[50:])


# From files


def _files(tmp_path: Path, **options: Any) -> DataConfig:
    sources = [
        {"name": name, "path": str(write_source(tmp_path / f"{name}.jsonl", 60, seed))}
        for seed, name in enumerate("ab")
    ]
    return DataConfig(sources=sources, validation=0.2, **options)


def _make(data: DataConfig, cache: Path, **options: Any) -> tuple[Mixture, dict[str, Any]]:
    return make_mixture(data, byte_tokenizer(), 16, 0, cache=cache, sequences_per_step=S, **options)


def test_no_document_is_on_both_sides(tmp_path: Path) -> None:
    mixture, validation = _make(_files(tmp_path), tmp_path / "cache")
    tokenizer = byte_tokenizer()
    for k, name in enumerate("ab"):
        written = {json.loads(line)["text"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()}
        sides = []
        for ids in (mixture.streams[k].tokens.ids, validation[name].tokens.ids):
            sides.append(set(tokenizer.decode(ids.astype(np.int64)).split("<end>")) - {""})
        assert sides[0].isdisjoint(sides[1])
        assert sides[0] | sides[1] == written
        assert 3 <= len(sides[1]) <= 25


def test_text_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cache = _files(tmp_path), tmp_path / "cache"
    first, _ = _make(data, cache)
    monkeypatch.setattr("insitu.data.mixture.write_tokens", lambda *_: pytest.fail("encoded again"))
    again, _ = _make(data, cache)
    assert _train(again, 20) == _train(first, 20)
    write_source(tmp_path / "b.jsonl", 61, 9)
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        _make(data, cache)


def test_changed_text_does_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    data = _files(tmp_path)
    first, _ = _make(data, tmp_path / "cache")
    state = first.state_dict(0)
    write_source(tmp_path / "b.jsonl", 61, 9)
    second, _ = _make(data, tmp_path / "cache")
    with pytest.raises(DataError, match=r"other text or with another tokenizer: b$"):
        second.load_state_dict(state)


def test_a_source_without_validation_documents_is_said_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "one.txt").write_text("a single document")
    data = DataConfig(sources=[{"name": "one", "path": str(tmp_path / "one.txt")}], validation=0.01)
    _, validation = _make(data, tmp_path / "cache")
    assert validation == {}
    assert "source one: none of its 1 documents falls into the validation share of 0.01" in caplog.text


@pytest.mark.parametrize(
    ("content", "validation", "message"),
    [
        ("", 0.1, "source one is empty"),
        (" \n\t\n", 0.1, "source one is empty"),
        ("a single document", 0.999999, "all of its documents .1. fall into the validation share"),
    ],
)
def test_a_source_without_training_documents_is_refused(
    tmp_path: Path, content: str, validation: float, message: str
) -> None:
    (tmp_path / "one.txt").write_text(content)
    data = DataConfig(sources=[{"name": "one", "path": str(tmp_path / "one.txt")}], validation=validation)
    with pytest.raises(DataError, match=message):
        _make(data, tmp_path / "cache")


def test_all_places_are_looked_at_before_the_first_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _files(tmp_path)
    data.sources[1].path = str(tmp_path / "missing.jsonl")
    monkeypatch.setattr("insitu.data.mixture.write_tokens", lambda *_: pytest.fail("encoded"))
    with pytest.raises(DataError, match=r"source b: .*missing\.jsonl: no such file or directory"):
        _make(data, tmp_path / "cache")


def test_a_tokenizer_without_an_end_of_text_token_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        make_mixture(_files(tmp_path), tokenizer, 16, 0, cache=tmp_path, sequences_per_step=S)


def test_what_a_model_learns_easily_is_left_for_what_it_does_not(tmp_path: Path) -> None:
    """The whole loop with a stand-in for a model: a table of counts, whose loss on noise does not fall."""
    rng = random.Random(0)
    (tmp_path / "text.txt").write_text(" ".join(rng.choices(["alpha", "beta", "gamma"], k=4000)))
    (tmp_path / "noise.txt").write_text("".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(9000)))
    sources = [{"name": name, "path": str(tmp_path / f"{name}.txt")} for name in ("noise", "text")]
    data = DataConfig(sources=sources, validation=0, hold=[2, 4], exploration=0.3)
    mixture, _ = _make(data, tmp_path / "cache")
    counts, iterator = np.ones((257, 257)), iter(mixture)
    for step in range(1, 301):
        total = 0.0
        for _ in range(S):
            ids = next(iterator)["input_ids"].numpy()
            probabilities = counts[ids[:-1], ids[1:]] / counts[ids[:-1]].sum(axis=1)
            total += float(-np.log(probabilities).mean())
            np.add.at(counts, (ids[:-1], ids[1:]), 0.05)
        mixture.observe(step, total / S)
    assert mixture.positions[1] > 1.5 * mixture.positions[0]
