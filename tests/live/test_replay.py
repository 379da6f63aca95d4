"""Replay: which earlier examples are drawn, and that they hold an earlier lesson."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONTEXT, make_tiny, on_arena, tiny_tokenizer

from insitu.data.batch import collate
from insitu.data.chat import Example, encode_continuation, encode_messages, encode_prompt
from insitu.data.loss import example_loss, kl_to_reference, reference_logprobs
from insitu.live import replay
from insitu.live.config import TeachConfig
from insitu.live.records import Feedback
from insitu.live.replay import replays
from insitu.live.store import Store
from insitu.live.teaching import TeachingRun

PAD = 0
FAST = TeachConfig(learning_rate=3e-3, warmup_steps=0, anchor_weight=1.0, anchors_per_step=6, rank=256, rank_share=8)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "insitu.db")
    made.commit(made.reserve("base", None), "0" * 64, {})
    yield made
    made.close()


def turns(question: str, reply: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def lesson(question: str, reply: str) -> Example:
    return encode_messages(tiny_tokenizer(), turns(question, reply), max_length=CONTEXT)


def encode(item: Feedback) -> Example:
    if item.kind == "messages":
        return encode_messages(tiny_tokenizer(), item.payload["messages"], max_length=CONTEXT)
    return encode_continuation(**item.payload, vocab_size=240, max_length=4096)


def teach(store: Store, *pairs: tuple[str, str]) -> int:
    ids = [store.add_feedback("messages", {"messages": turns(*pair)})[0].id for pair in pairs]
    version = store.reserve("teach", store.head(), feedback=ids)
    store.commit(version, f"{version:064}", {})
    return version


def replies(examples: Sequence[Example]) -> list[str]:
    found = []
    for e in examples:
        said = [id for id, target in zip(e.input_ids, e.loss_mask, strict=True) if target]
        found.append(tiny_tokenizer().decode(said, skip_special_tokens=True))
    return found


# -- which examples ----------------------------------------------------------------------------------------------------
def test_as_many_as_asked_for_of_what_is_applied(store: Store) -> None:
    teach(store, *((f"{n}?", f"{n}!") for n in range(10)))
    store.add_feedback("messages", {"messages": turns("queued?", "queued!")})
    drawn = replies(replays(store, encode, [lesson("new?", "new!")], 4, seed=0))
    assert len(set(drawn)) == 4
    assert set(drawn) <= {f"{n}!" for n in range(10)}
    everything = replies(replays(store, encode, [lesson("new?", "new!")], 99, seed=0))
    assert sorted(everything) == [f"{n}!" for n in range(10)]
    assert replays(store, encode, [], 0, seed=0) == []


def test_the_draw_is_the_seeds_and_other_seeds_draw_others(store: Store) -> None:
    teach(store, *((f"{n}?", f"{n}!") for n in range(10)))
    draws = [replies(replays(store, encode, [], 3, seed=seed)) for seed in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1]
    assert len({tuple(sorted(draw)) for draw in draws}) > 2


def test_what_was_rolled_back_is_not_replayed_until_it_is_served_again(store: Store) -> None:
    first = teach(store, ("one?", "one!"))
    second = teach(store, ("two?", "two!"))
    store.commit(store.reserve("rollback", second, target=first), "1" * 64, {})
    assert replies(replays(store, encode, [], 9, seed=0)) == ["one!"]
    store.commit(store.reserve("rollback", store.head(), target=second), "2" * 64, {})
    assert sorted(replies(replays(store, encode, [], 9, seed=0))) == ["one!", "two!"]


def test_a_correction_is_not_held_back_by_what_it_corrects(store: Store) -> None:
    teach(store, ("who?", "a fox"), ("where?", "here"))
    assert replies(replays(store, encode, [lesson("who?", "an otter")], 9, seed=0)) == ["here"]


def test_only_the_last_turn_counts_as_what_is_asked(store: Store) -> None:
    """The same question at the end of another conversation is another question."""
    payload = {"messages": [*turns("hi", "hello"), *turns("who?", "a fox")]}
    id = store.add_feedback("messages", payload)[0].id
    store.commit(store.reserve("teach", 0, feedback=[id]), "1" * 64, {})
    assert len(replays(store, encode, [lesson("who?", "x")], 9, seed=0)) == 1
    talk = encode_messages(tiny_tokenizer(), [*turns("hi", "hello"), *turns("who?", "x")], max_length=CONTEXT)
    assert replays(store, encode, [talk], 9, seed=0) == []


def test_of_a_long_reply_the_first_targets_are_held(store: Store) -> None:
    payload = {"context_ids": [5, 6, 7], "continuation_ids": [10 + i % 200 for i in range(500)]}
    id = store.add_feedback("continuation", payload)[0].id
    store.commit(store.reserve("teach", 0, feedback=[id]), "1" * 64, {})
    (held,) = replays(store, encode, [], 1, seed=0)
    assert held.input_ids == [*payload["context_ids"], *payload["continuation_ids"]][: 3 + replay._TARGETS]
    assert sum(held.loss_mask) == replay._TARGETS
    assert held.loss_mask[:3] == [False] * 3


# -- what they do ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


FIRST = [lesson(f"Who is {name}?", "A fox.") for name in ("Ada", "Bob", "Cyd", "Dan")]
SECOND = [lesson(f"Who was {name}?", "Nine owls.") for name in ("Eve", "Fay", "Gus", "Hal")]


def learn(model: Any, examples: Sequence[Example], held: Sequence[Example], seed: int, steps: int = 12) -> float:
    prompt = encode_prompt(tiny_tokenizer(), [{"role": "user", "content": "Tell me about 7."}])
    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0].tolist()
    anchor = Example(ids, [False] * len(prompt) + [True] * (len(ids) - len(prompt)))
    run = TeachingRun(model, examples, [anchor], replace(FAST, seed=seed), PAD, held)
    for _ in range(steps):
        loss = run.prepare().loss
        run.write()
    run.close()
    return loss


@torch.no_grad()
def loss_of(model: Any, examples: Sequence[Example]) -> float:
    return float(example_loss(model, collate(examples, PAD)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_replay_holds_an_earlier_lesson_that_is_forgotten_without(tiny: Path, seed: int) -> None:
    """Two lessons one after the other, once with the first one replayed in the second and once without.

    Measured on seeds 0 to 2: without, the first lesson's loss rises by 0.63 to 0.87 nats per token, with replay by less than
    0.01; the second lesson is learned as well in both arms (0.02).
    """

    def forgotten(held: Sequence[Example]) -> tuple[float, float]:
        arena, model = on_arena(tiny, requires_grad=True)
        learn(model, FIRST, [], seed)
        before = loss_of(model, FIRST)
        second = learn(model, SECOND, held, seed)
        after = loss_of(model, FIRST)
        arena.close()
        assert before < 0.5
        return after - before, second

    (free, free_loss), (kept, kept_loss) = forgotten([]), forgotten(FIRST)
    assert free > 0.5  # there was something to hold
    assert kept < 0.1
    assert max(free_loss, kept_loss) < 0.1


def test_replays_take_turns_beside_the_anchors_and_are_held_to_the_jobs_start(tiny: Path) -> None:
    arena, model = on_arena(tiny, requires_grad=True)
    nine = [lesson(f"{n}?", "yes " * n + "!") for n in range(1, 10)]  # two parts: at most eight in one forward
    start = {id(e): reference_logprobs(model, collate([e], PAD), torch.float32) for e in nine}
    run = TeachingRun(model, SECOND, FIRST[:1], replace(FAST, anchors_per_step=1), PAD, nine)
    assert [len(batch["input_ids"]) for batch, _ in run._replays] == [8, 1]
    told = []
    for _ in range(4):
        told.append(run.prepare())
        run.write()
    assert told[0].replay_kl < 1e-3  # nothing has changed yet
    assert min(t.replay_kl for t in told[1:]) > 10 * told[0].replay_kl
    assert told[1].replay_kl != told[1].anchor_kl
    with torch.no_grad():
        now = float(kl_to_reference(model, collate([nine[-1]], PAD), start[id(nine[-1])]))
    run._step = 1  # the turn of the longest, which lies alone in the second part
    assert run.prepare().replay_kl == pytest.approx(now, rel=0.05, abs=1e-3)
    arena.close()


def test_without_weight_nothing_is_held_and_nothing_computed(tiny: Path) -> None:
    arena, model = on_arena(tiny, requires_grad=True)
    run = TeachingRun(model, SECOND, FIRST, replace(FAST, anchor_weight=0.0), PAD, FIRST)
    assert (run._anchors, run._replays) == ([], [])
    assert run.prepare().replay_kl == 0.0
    arena.close()


@pytest.mark.parametrize("value", [-1, 1.5, None])
def test_a_bad_number_of_replays_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^replay=.*expected an integer, 0 or more"):
        TeachConfig(replay=value)
