"""vLLM as a serving engine: the safe moment to write, and what the learner asks of it."""

import asyncio
import math
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from vllm_client import CONTEXT, FINAL_ONLY, World, best_at, logprob, stand_in_modules

from insitu.live.engines import vllm as module
from insitu.live.engines.base import EngineError, EngineInfo, RequestTooLongError, Token
from insitu.live.engines.vllm import VLLMEngine
from insitu.live.vllm_plugin.refusals import RefusedError


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    stand_in_modules(monkeypatch)
    world = World()
    yield world
    assert world.client.running == 0, "a request was left running in vLLM"
    world.server.close()


# -- the safe moment ---------------------------------------------------------------------------------------------------
def test_an_update_pauses_refreshes_forgets_and_labels_in_this_order(world: World) -> None:
    world.engine.pause()
    assert world.client.calls == [("pause", "keep", False)]  # requests are kept
    report = world.engine.publish("4+1")
    assert (report.version, report.recomputed) == ("4+1", 0)
    assert 0 <= report.seconds < 20
    assert world.engine.version == "4+1"
    world.engine.resume()
    forget = ("reset_prefix_cache", True, True)
    assert world.client.calls[1:] == ["refresh", forget, ("version", "4+1"), "resume"]


def test_a_model_that_sees_forgets_what_it_saw_too_before_the_label_changes(world: World) -> None:
    world.client.model_config.is_multimodal_model = True
    world.engine.pause()
    world.engine.publish("5")
    world.engine.resume()
    caches = ["reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"]
    assert world.client.names == ["pause", "refresh", *caches, "version", "resume"]


def test_several_steps_may_be_published_in_one_pause(world: World) -> None:
    world.engine.pause()
    for version in ("4+1", "4+2"):
        world.engine.publish(version)
    world.engine.resume()
    assert world.engine.version == "4+2"
    assert world.client.names == ["pause", *["refresh", "reset_prefix_cache", "version"] * 2, "resume"]


@pytest.mark.parametrize(
    ("misuse", "said"),
    [
        (lambda engine: engine.publish("5"), "publish.. outside a pause"),
        (lambda engine: engine.resume(), "resume.. without a pause"),
        (lambda engine: (engine.pause(), engine.pause()), "already paused"),
        (lambda engine: (engine.pause(), engine.resume(), engine.resume()), "without a pause"),
        (lambda engine: (engine.pause(), engine.resume(), engine.publish("5")), "outside a pause"),
    ],
)
def test_misuse_is_refused_and_vllm_is_not_asked(
    world: World, misuse: Callable[[VLLMEngine], object], said: str
) -> None:
    with pytest.raises(RuntimeError, match=said):
        misuse(world.engine)
    assert world.client.names in ([], ["pause"], ["pause", "resume"])
    assert world.engine.version == "4"


def test_a_prefix_cache_that_is_not_reset_is_not_published(world: World) -> None:
    world.client.cache_resets = False
    world.engine.pause()
    with pytest.raises(EngineError, match="mix old and new weights"):
        world.engine.publish("4+1")
    assert world.client.names == ["pause", "refresh", "reset_prefix_cache"]
    assert world.engine.version == "4"
    with pytest.raises(RuntimeError, match="already paused"):
        world.engine.pause()  # nobody is answered meanwhile
    world.client.cache_resets = True
    world.engine.publish("4+1")
    world.engine.resume()
    assert world.engine.version == "4+1"


def test_weights_that_cannot_be_refreshed_are_not_published_and_no_cache_is_dropped(world: World) -> None:
    world.weights.fail = RefusedError("vLLM has moved 'lm_head.weight' away from the arena")
    world.engine.pause()
    with pytest.raises(RefusedError, match=r"lm_head\.weight"):
        world.engine.publish("4+1")
    assert world.client.names == ["pause", "refresh"]
    assert world.engine.version == "4"
    world.weights.fail = ConnectionError("the other side is gone")
    with pytest.raises(ConnectionError):
        world.engine.publish("4+1")
    assert world.engine.version == "4"


@pytest.mark.parametrize("failing", ["reset_prefix_cache", "version", "reset_mm_cache"])
def test_whatever_fails_in_a_publish_the_version_is_the_old_one(world: World, failing: str) -> None:
    world.client.model_config.is_multimodal_model = True
    world.client.fail = {failing: ValueError("not today")}
    world.engine.pause()
    with pytest.raises(ValueError, match="not today"):
        world.engine.publish("4+1")
    assert world.engine.version == "4"


def test_a_pause_that_fails_is_no_pause_and_a_resume_that_fails_no_end_of_it(world: World) -> None:
    world.client.fail = {"pause": ValueError("not today")}
    with pytest.raises(ValueError, match="not today"):
        world.engine.pause()
    with pytest.raises(RuntimeError, match="outside a pause"):
        world.engine.publish("5")
    world.client.fail = {"resume": ValueError("not today")}
    world.engine.pause()
    with pytest.raises(ValueError, match="not today"):
        world.engine.resume()
    world.client.fail = {}
    world.engine.publish("5")
    world.engine.resume()


def test_what_takes_too_long_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TIMEOUT", 0.05)
    world.client.hang = True
    failed: list[BaseException] = []

    def score() -> None:
        try:
            world.engine.score([1, 2])
        except TimeoutError as error:
            failed.append(error)

    thread = threading.Thread(target=score)
    thread.start()
    thread.join(10)
    assert failed
    for task in asyncio.all_tasks(world.server.loop):
        world.server.loop.call_soon_threadsafe(task.cancel)
    world.server.run(asyncio.sleep(0.01))


# -- a dead engine -----------------------------------------------------------------------------------------------------
def test_a_dead_engine_is_not_healthy_and_every_call_says_so(world: World) -> None:
    assert world.engine.healthy()
    world.engine.pause()
    assert world.engine.healthy()
    world.client.errored = True
    assert not world.engine.healthy()
    for ask in (lambda: world.engine.publish("5"), world.engine.resume, lambda: world.engine.score([1, 2])):
        with pytest.raises(EngineError, match="has died"):
            ask()
    assert world.engine.version == "4"
    assert world.client.names == ["pause", "refresh"]


def test_before_it_is_bound_it_is_not_healthy_and_knows_its_version() -> None:
    engine = VLLMEngine(EngineInfo("tiny", CONTEXT, (2,)), "4")
    engine.start()
    assert (engine.healthy(), engine.version, engine.info.model_name) == (False, "4", "tiny")
    with pytest.raises(EngineError, match="has died"):
        engine.score([1, 2])
    engine.close()


# -- score -------------------------------------------------------------------------------------------------------------
def test_a_score_is_what_vllm_says_of_each_token_after_the_first(world: World) -> None:
    ids = [3, 1, 4, 1, 5]
    assert world.engine.score(ids) == [Token(id, logprob(i, id), (), "4") for i, id in enumerate(ids) if i]
    ((_, prompt, params, request),) = world.client.calls
    assert prompt == {"prompt_token_ids": ids}
    assert vars(params) == {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "output_kind": FINAL_ONLY}
    assert request.startswith("insitu-")


@pytest.mark.parametrize("top", [1, 3, 20])
def test_the_best_tokens_come_in_the_order_of_their_rank_whether_the_wanted_one_is_among_them_or_not(
    world: World, top: int
) -> None:
    ids = [3, 17, 4, 30, 5]
    inside = 0
    for i, token in enumerate(world.engine.score(ids, top), start=1):
        best = best_at(i)[:top]
        assert [id for id, _ in token.top] == best
        assert [value for _, value in token.top] == [logprob(i, id) for id in best]
        assert token.logprob == logprob(i, ids[i])
        inside += ids[i] in best
    assert 0 < inside < 4 or top != 20  # both cases were met


def test_a_rank_that_vllm_does_not_tell_comes_last(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {7: (-3.0, None), 8: (-1.0, 1), 9: (-2.0, 2)}
    rows = {id: SimpleNamespace(logprob=p, rank=rank) for id, (p, rank) in told.items()}
    answer = SimpleNamespace(prompt_logprobs=[None, rows], outputs=[])
    monkeypatch.setattr(world.client, "_output", lambda ids, params: answer)
    (token,) = world.engine.score([1, 7], top=2)
    assert token == Token(7, -3.0, ((8, -1.0), (9, -2.0)), "4")


def test_one_token_has_nothing_to_score(world: World) -> None:
    assert world.engine.score([3]) == []


def test_a_score_carries_the_version_that_was_published_last(world: World) -> None:
    world.engine.pause()
    world.engine.publish("4+1")
    world.engine.resume()
    assert {token.version for token in world.engine.score([1, 2, 3])} == {"4+1"}


def test_each_request_has_a_name_of_its_own(world: World) -> None:
    for _ in range(3):
        world.engine.score([1, 2])
    assert len({request for *_, request in world.client.calls}) == 3


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1, 1000])
def test_what_does_not_fit_with_the_one_token_that_vllm_must_make_is_refused(world: World, length: int) -> None:
    with pytest.raises(RequestTooLongError, match=rf"{length} tokens and one more.*{CONTEXT}"):
        world.engine.score([1] * length)
    assert world.client.calls == []
    assert len(world.engine.score([1] * (CONTEXT - 1))) == CONTEXT - 2


def test_what_vllm_raises_or_does_not_answer_is_an_error(world: World) -> None:
    world.client.fail = {"generate": ValueError("the prompt is too strange")}
    with pytest.raises(ValueError, match="too strange"):
        world.engine.score([1, 2])
    world.client.fail = {}
    world.client.silent = True
    with pytest.raises(EngineError, match="without an answer"):
        world.engine.score([1, 2])
    world.client.silent = False
    assert math.isfinite(world.engine.score([1, 2])[0].logprob)
