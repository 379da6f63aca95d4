"""What the API server asks of vLLM's worker while nothing reads the weights: refresh what is derived, put a version back."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from weight_worker import Worker

from insitu.live.vllm_plugin.refusals import RefusedError


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Worker]:
    (tmp_path / "state").mkdir(mode=0o700)
    world = Worker(tmp_path / "state")
    yield world
    world.close()


# -- refresh -----------------------------------------------------------------------------------------------------------
def test_refresh_runs_in_the_worker_each_time_it_is_asked_for(world: Worker) -> None:
    client = world.connect()
    assert world.refreshed == 0  # attaching asks for nothing
    assert [client.refresh() for _ in range(3)] == [3, 3, 3]
    assert world.refreshed == 3


def test_the_workers_reason_arrives_as_a_refusal_and_the_line_goes_on(world: Worker) -> None:
    client = world.connect()

    def moved() -> int:
        raise RefusedError("vLLM has moved 'lm_head.weight' away from the arena")

    def broken() -> int:
        raise RuntimeError("größer als gedacht")

    world.refresh = moved
    with pytest.raises(RefusedError, match=r"^RefusedError: vLLM has moved 'lm_head\.weight'"):
        client.refresh()
    world.refresh = broken
    with pytest.raises(RefusedError, match=r"^RuntimeError: größer als gedacht$"):
        client.refresh()
    world.refresh = lambda: 5
    assert client.refresh() == 5


# -- restore -----------------------------------------------------------------------------------------------------------
def test_restore_puts_the_version_back_in_the_worker_and_the_header_shows_it(world: Worker) -> None:
    client = world.connect()
    for version in (4, 0, 12):
        client.restore(version)
        assert client.header.label == str(version)
        assert (world.arena.views()["q"] == version).all()
    assert world.restored == [4, 0, 12]


def test_a_version_that_cannot_be_restored_is_a_refusal_with_the_reason(world: Worker) -> None:
    client = world.connect()
    with pytest.raises(RefusedError, match=r"^ValueError: version 99 does not exist$"):
        client.restore(99)
    client.restore(1)
    assert world.restored == [1]


def test_requests_from_several_threads_over_one_line_get_each_their_own_answer(world: Worker) -> None:
    client = world.connect()
    found: list[object] = []
    world.refresh = lambda: 7

    def ask(turn: int) -> None:
        for _ in range(20):
            if turn == 0:
                found.append(client.refresh() == 7)
            elif turn == 1:
                found.append(client.manifest()["num_bytes"] == world.arena.num_bytes)
            else:
                client.restore(5)
                found.append(client.header.version == 5)

    threads = [threading.Thread(target=ask, args=(turn,)) for turn in (0, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [True] * 60


def test_two_api_servers_do_not_refresh_at_the_same_time(world: Worker) -> None:
    inside, most = [0], [0]
    entered = threading.Event()

    def slow() -> int:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        entered.set()
        threading.Event().wait(0.05)
        inside[0] -= 1
        return 1

    world.refresh = slow
    clients = [world.connect() for _ in range(4)]
    threads = [threading.Thread(target=client.refresh) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert entered.is_set()
    assert (world.refreshed, most[0]) == (4, 1)
