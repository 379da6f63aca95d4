"""The proof before the first answer: every tensor is the version's, and the engine reads the memory that is written."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from insitu.live.proof import LEAST_MOVE, compare, probe
from insitu.live.weights.arena import Arena, plan
from insitu.live.weights.attach import AttachError
from insitu.live.weights.header import Header

BF16, FP32 = torch.bfloat16, torch.float32
IDS = [0, 3, 1, 4, 1, 5, 2, 6]
SHAPES = [("embed", BF16, (7, 16)), ("norm", BF16, (16,)), ("bias", FP32, (7,))]


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(plan(SHAPES))
    for view in arena.views().values():
        view.copy_(torch.randn(view.shape))
    arena.views()["norm"].copy_(1 + 0.2 * torch.randn(16))
    arena.stamp(5)
    yield arena
    arena.close()


def version(arena: Arena) -> dict[str, torch.Tensor]:
    return {name: view.clone() for name, view in arena.views().items()}


# -- names and bytes ---------------------------------------------------------------------------------------------------
def test_equal_tensors_pass_in_any_order_and_the_speed_is_told(arena: Arena) -> None:
    told = version(arena)
    for tensors in (told.items(), reversed(told.items())):
        assert 0 < compare(arena.views(), tensors, {}) < math.inf


def test_a_tied_tensor_may_come_under_either_name_or_both(arena: Arena) -> None:
    told, aliases = version(arena), {"head": "embed"}
    compare(arena.views(), told.items(), aliases)
    compare(arena.views(), {**told, "head": told["embed"]}.items(), aliases)
    embed = told.pop("embed")
    compare(arena.views(), {**told, "head": embed}.items(), aliases)
    with pytest.raises(AttachError, match=r"'head' in the arena is not what the version holds"):
        compare(arena.views(), {**told, "embed": embed, "head": embed + 1}.items(), aliases)
    with pytest.raises(AttachError, match=r"the version's 'head' is nowhere in the arena"):
        compare(arena.views(), {**told, "head": embed}.items(), {})


def test_the_version_may_be_of_another_dtype_if_it_rounds_to_the_same(arena: Arena) -> None:
    wide = {name: tensor.double() for name, tensor in version(arena).items()}
    wide["embed"] += wide["embed"] * 1e-6  # less than half a step of bf16
    compare(arena.views(), wide.items(), {})
    wide["bias"] += wide["bias"] * 1e-6  # but many of fp32
    with pytest.raises(AttachError, match="'bias'"):
        compare(arena.views(), wide.items(), {})


def exchanged(told: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**told, "embed": told["embed"].flip(0)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: {**told, "stranger": torch.zeros(2)}, "the version's 'stranger' is nowhere in the arena"),
        (lambda told: {n: t for n, t in told.items() if n != "norm"}, "the version lacks 'norm', which the arena has"),
        (lambda told: {}, "the version lacks 'bias'"),
        (lambda told: {**told, "norm": told["norm"][:-1]}, "'norm' in the arena is not what"),
        (lambda told: {**told, "embed": told["embed"].T}, "'embed' in the arena is not what"),
        (lambda told: {**told, "norm": told["norm"].view(1, 16)}, "'norm' in the arena is not what"),
        (lambda told: {**told, "norm": told["norm"][:1]}, "'norm' in the arena is not what"),
        (exchanged, "'embed' in the arena is not what"),
        (lambda told: {**told, "bias": told["bias"] * torch.nan}, "'bias' in the arena is not what"),
    ],
    ids=["unknown", "missing", "empty", "shorter", "turned", "same numbers", "would broadcast", "rows moved", "NaN"],
)
def test_a_version_that_is_not_in_the_arena_is_refused_by_the_tensors_name(
    arena: Arena, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], said: str
) -> None:
    told = version(arena)
    compare(arena.views(), told.items(), {})  # good until then
    with pytest.raises(AttachError, match=said):
        compare(arena.views(), change(told).items(), {})


def test_any_one_element_that_differs_by_its_last_bit_is_noticed(arena: Arena) -> None:
    told = version(arena)
    for name, view in arena.views().items():
        whole = view.view(-1).view(torch.int16 if view.dtype == BF16 else torch.int32)
        for at in (0, whole.numel() // 2, whole.numel() - 1):
            whole[at] ^= 1
            with pytest.raises(AttachError, match=f"'{name}'"):
                compare(arena.views(), told.items(), {})
            whole[at] ^= 1
    compare(arena.views(), told.items(), {})


# -- the memory that is read -------------------------------------------------------------------------------------------
class Server:
    """An engine that computes log-probabilities from ``weights``, and notes when it was paused, shown and asked."""

    def __init__(self, arena: Arena, weights: dict[str, torch.Tensor]) -> None:
        self.arena = arena
        self.weights = weights
        self.events: list[str] = []
        self.headers: list[Header] = []
        self.spoil: Callable[[int, list[float]], list[float]] = lambda asked, told: told
        self.asked = 0

    def score(self) -> Sequence[float]:
        self.events.append("score")
        self.headers.append(self.arena.header)
        hidden = self.weights["embed"][IDS[:-1]] * self.weights["norm"]
        logits = hidden.float() @ self.weights["embed"].float().T + self.weights["bias"]
        told = [float(row[id]) for row, id in zip(logits.log_softmax(-1), IDS[1:], strict=True)]
        self.asked += 1
        return self.spoil(self.asked, told)

    def hide(self) -> None:
        self.events.append("pause")

    def expose(self) -> None:
        assert not self.arena.header.writer, "a server refuses to publish while a write is going on"
        self.events.append("publish")

    def probe(self, name: str = "norm") -> float:
        return probe(self.arena, name, self.score, self.expose, self.hide)


def contents(arena: Arena) -> bytes:
    return os.pread(arena.fd, arena.num_bytes, 0)  # header and padding too


@pytest.mark.parametrize("name", ["norm", "bias", "embed"])
def test_an_engine_that_reads_the_arena_passes_and_everything_is_as_before(arena: Arena, name: str) -> None:
    server = Server(arena, arena.views())
    before, told = contents(arena), server.score()
    assert LEAST_MOVE <= server.probe(name) < math.inf
    assert contents(arena) == before
    assert server.score() == told


def test_the_order_is_pause_write_publish_ask_twice_and_the_change_is_a_trial(arena: Arena) -> None:
    server = Server(arena, arena.views())
    epoch = arena.header.epoch
    server.probe()
    assert server.events == ["score", *["pause", "publish", "score"] * 2]
    assert server.headers == [Header(epoch, 5, step, writer=0) for step in (0, 1, 0)]


@pytest.mark.parametrize("kept", [0.0, -0.0, 1.0, -1.0, 8 / 9, -8 / 9, 0.875, 1e-4, -1e-4, 2.3, -40.0, 300.0])
def test_the_element_is_moved_far_away_whatever_it_was(arena: Arena, kept: float) -> None:
    arena.views()["norm"][0] = kept
    seen: list[float] = []
    server = Server(arena, arena.views())
    server.spoil = lambda _, told: seen.append(float(arena.views()["norm"][0])) or told
    before = contents(arena)
    server.probe()
    rounded = float(torch.tensor(kept).bfloat16())
    assert (seen[0], seen[2]) == (rounded, rounded)
    assert abs(seen[1] - rounded) >= 8
    assert contents(arena) == before  # the sign of a zero included


def test_an_engine_that_reads_a_private_copy_is_refused_and_everything_is_as_before(arena: Arena) -> None:
    server = Server(arena, version(arena))
    before = contents(arena)
    with pytest.raises(AttachError, match=r"one element of 'norm'.*did not move \(0.0e\+00 nats\).*private copy"):
        server.probe()
    assert contents(arena) == before
    assert server.events[-2:] == ["publish", "score"]  # and the pause was ended


def test_an_engine_that_copies_only_that_tensor_is_refused(arena: Arena) -> None:
    views = arena.views()
    server = Server(arena, {**views, "norm": views["norm"].clone()})
    with pytest.raises(AttachError, match=r"'norm'.*private copy"):
        server.probe()
    assert server.probe("bias") > LEAST_MOVE  # the others it does read


def test_an_engine_that_keeps_what_it_read_first_is_refused_as_not_returning(arena: Arena) -> None:
    """It reads the arena once more after the change, and never again."""
    server = Server(arena, arena.views())
    stale: list[list[float]] = []

    def spoil(asked: int, told: list[float]) -> list[float]:
        stale.append(told)
        return stale[min(asked, 2) - 1]

    server.spoil = spoil
    before = contents(arena)
    with pytest.raises(AttachError, match=r"'norm' was put back.*did not return"):
        server.probe()
    assert contents(arena) == before


def test_a_little_noise_of_the_engine_is_no_reason_to_refuse_it_and_much_is(arena: Arena) -> None:
    moved = Server(arena, arena.views()).probe()
    for share, ok in ((0.1, True), (0.6, False)):
        server = Server(arena, arena.views())
        server.spoil = lambda asked, told, share=share: [x + share * moved * (asked == 3) for x in told]
        if ok:
            assert server.probe() == pytest.approx(moved)
        else:
            with pytest.raises(AttachError, match="did not return"):
                server.probe()


def test_noise_alone_does_not_pass_for_a_move(arena: Arena) -> None:
    server = Server(arena, version(arena))
    server.spoil = lambda asked, told: [x + 0.9 * LEAST_MOVE * (asked == 2) for x in told]
    with pytest.raises(AttachError, match="private copy"):
        server.probe()


@pytest.mark.parametrize("at", [0, 2, -1])
@pytest.mark.parametrize("asked", [1, 2, 3])
@pytest.mark.parametrize("reads_the_arena", [True, False])
def test_a_single_nan_anywhere_is_refused(arena: Arena, asked: int, at: int, reads_the_arena: bool) -> None:
    server = Server(arena, arena.views() if reads_the_arena else version(arena))

    def spoil(now: int, told: list[float]) -> list[float]:
        if now == asked:
            told[at] = math.nan
        return told

    server.spoil = spoil
    before = contents(arena)
    with pytest.raises(AttachError, match="'norm'"):
        server.probe()
    assert contents(arena) == before


@pytest.mark.parametrize("spoil", [lambda told: told[:-1], lambda told: [*told, -1.0]])
def test_a_server_that_answers_for_more_or_fewer_tokens_is_an_error(arena: Arena, spoil: Any) -> None:
    server = Server(arena, arena.views())
    server.spoil = lambda asked, told: spoil(told) if asked == 2 else told
    with pytest.raises(ValueError, match=r"longer|shorter"):
        server.probe()
