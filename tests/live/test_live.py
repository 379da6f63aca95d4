"""The whole: a real server process and a real learner process over one arena, on a tiny model."""

import os
import resource
import signal
from pathlib import Path

import openai
import pytest
from processes import (
    attached,
    end,
    launch,
    learner_pid,
    learners,
    post_lesson,
    running,
    say,
    settle,
    spy,
    versions,
    wait_for,
)
from tiny import make_tiny

from insitu.live.client import Client, ClientError
from insitu.live.keys import load_keys

# Long enough to be caught in the middle of, mild enough for the gate.
SLOW = ("--teach.max-steps", "400", "--teach.target-loss", "0", "--teach.learning-rate", "1e-5")
QUICK = ("--teach.max-steps", "4", "--teach.learning-rate", "1e-3", "--teach.max-canary-kl", "100")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live") / "state"


@pytest.fixture(scope="module")
def client(model: Path, state_dir: Path):
    with running(model, state_dir, *QUICK) as client:
        yield client


def test_server_and_learner_share_one_copy(client: Client) -> None:
    from insitu.live.weights.arena import resident

    # The learner has read every weight (it checked their sum), so both have all pages.
    server, learner = (resident(pid) for pid in (client.facts["pid"], learner_pid(client)))
    arena = client.get("/v1/live")["arena"]
    assert arena["pid"] == client.facts["pid"]
    size = arena["bytes"]
    for process in (server, learner):
        assert process["rss"] >= 0.9 * size
        assert 0.45 * process["rss"] <= process["pss"] <= 0.55 * process["rss"]
        assert process["private_dirty"] == 0


def test_the_openai_client_chats_teaches_and_sees_the_new_version(client: Client, state_dir: Path) -> None:
    api = openai.OpenAI(base_url=client.facts["url"] + "/v1", api_key=load_keys(state_dir).learn, max_retries=0)
    with api:
        _chat_teach_and_look(api, client)


def _chat_teach_and_look(api: openai.OpenAI, client: Client) -> None:
    ask = {"model": client.facts["model"], "messages": [{"role": "user", "content": "who lives here"}]}
    first = api.chat.completions.with_raw_response.create(**ask, max_tokens=8, temperature=0)
    head = versions(client)[-1]["id"]
    assert first.headers["x-weight-version"] == str(head)
    text = first.parse().choices[0].message.content
    pieces = api.chat.completions.create(**ask, max_tokens=8, temperature=0, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == text

    posted = api.post(
        "/feedback",
        body={"messages": [*ask["messages"], {"role": "assistant", "content": "an otter"}]},
        cast_to=dict[str, object],
    )
    assert posted["status"] == "queued"
    (item,) = settle(client, [str(posted["id"])])
    assert item["status"] == "applied"
    after = api.chat.completions.with_raw_response.create(**ask, max_tokens=8, temperature=0)
    assert after.headers["x-weight-version"] == item["weight_version"] == str(versions(client)[-1]["id"])
    assert int(item["weight_version"]) > head
    report = versions(client)[-1]["report"]
    assert 0 <= report["gap_before"] < 0.1  # both run the same kernels
    assert 0 <= report["gap"] <= report["gap_before"] + 0.1


def test_rollback_restores_every_bit_and_every_text(client: Client, model: Path) -> None:
    arena = spy(client.facts["pid"], model)
    before, text, head = arena.sha256(), say(client), versions(client)[-1]
    assert before == head["sha256"]
    lesson = [{"role": "user", "content": "who is new"}, {"role": "assistant", "content": "a bird"}]
    (item,) = settle(client, post_lesson(client, [lesson]))
    assert item["status"] == "applied"
    assert arena.sha256() != before, "the lesson changed nothing, so undoing it proves nothing"
    done = client.post(f"/v1/live/versions/{head['id']}/rollback")
    assert done["status"] == "done"
    assert arena.sha256() == before == versions(client)[-1]["sha256"]
    assert say(client) == text
    assert client.get(f"/v1/feedback/{item['id']}")["status"] == "rolled_back"
    # What was taken back may be taught again.
    (again,) = settle(client, post_lesson(client, [lesson]))
    assert (again["status"], again["id"] != item["id"]) == ("applied", True)
    arena.close()


def test_a_ruinous_update_is_undone_before_anyone_is_answered(model: Path, tmp_path: Path) -> None:
    with running(model, tmp_path / "state", "--teach.learning-rate", "1000") as client:
        arena = spy(client.facts["pid"], model)
        before, text = arena.sha256(), say(client)
        items = settle(client, post_lesson(client))
        assert {item["status"] for item in items} == {"refused"}
        assert "limit" in items[0]["reason"] or "finite" in items[0]["reason"]
        assert arena.sha256() == before
        assert (say(client), client.get("/v1/live")["weight_version"]) == (text, "0")
        assert [v["status"] for v in versions(client)] == ["committed", "refused"]
        arena.close()


def test_killed_learner_is_noticed_and_its_trial_undone(model: Path, tmp_path: Path) -> None:
    with running(model, tmp_path / "state", *SLOW) as client:
        arena = spy(client.facts["pid"], model)
        before, text, first = arena.sha256(), say(client), learner_pid(client)
        ids = post_lesson(client)

        def stopped_inside_a_write() -> bool:
            # Only a process that stands still can be seen in the middle of a write.
            if not (arena.header.step and arena.header.writer):
                return False
            os.kill(first, signal.SIGSTOP)
            if arena.header.writer:
                return True
            os.kill(first, signal.SIGCONT)
            return False

        while not stopped_inside_a_write():
            assert client.get(f"/v1/feedback/{ids[0]}")["status"] != "applied", "the job ended before it was caught"
        assert arena.sha256() != before
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: arena.header.label == "0", what="the server to restore the weights")
        assert arena.sha256() == before
        assert say(client) == text
        second = wait_for(lambda: learner_pid(client), what="another learner")
        assert second != first
        assert [v["status"] for v in versions(client)][:2] == ["committed", "lost"]
        told = [(e["kind"], e["subject"], e["detail"]) for e in client.get("/v1/live/events")["data"]]
        (repaired,) = [(subject, detail["torn"]) for kind, subject, detail in told if kind == "repair.done"]
        assert repaired == ("version 0", True)
        assert {"learner.died", "version.lost", "feedback.requeued"} <= {kind for kind, _, _ in told}
        # What was accepted is not forgotten, and the lost id is not used again.
        assert {item["status"] for item in settle(client, ids)} == {"applied"}
        assert versions(client)[-1]["id"] == 2
        arena.close()


def test_killed_server_leaves_the_learner_alive_and_its_successor_serves_the_same(model: Path, tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    server = launch(model, state_dir, *QUICK)
    try:
        client = attached(server, state_dir)
        settle(client, post_lesson(client))
        head, text, learner = versions(client)[-1], say(client), learner_pid(client)
        assert head["id"] == 1
        client.http.close()
        server.kill()
        server.wait()
        wait_for(lambda: "the server is gone" in (state_dir / "learner.log").read_text(), what="the learner to notice")
        assert learners(state_dir) == [learner]

        server = launch(model, state_dir, *QUICK)
        client = attached(server, state_dir)
        assert learner_pid(client) == learner, "the learner that outlived its server attaches again"
        assert (client.get("/v1/live")["weight_version"], say(client)) == ("1", text)
        settle(client, post_lesson(client, [[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]]))
        assert versions(client)[-1]["id"] == 2

        # Both at once, in the middle of nothing.
        head, text = versions(client)[-1], say(client)
        os.kill(learner_pid(client), signal.SIGKILL)
        client.http.close()
        server.kill()
        server.wait()
        server = launch(model, state_dir, *QUICK)
        client = attached(server, state_dir)
        assert (client.get("/v1/live")["weight_version"], say(client)) == ("2", text)
        arena = spy(server.pid, model)
        assert arena.sha256() == head["sha256"]
        arena.close()
        client.http.close()
    finally:
        end(server, state_dir)


def test_full_disk_while_a_version_is_written_keeps_the_old_one(tmp_path: Path) -> None:
    # 15 MB of weights: the limit stops the version's file, and nothing else that the learner writes before it.
    wide = make_tiny(tmp_path / "wide", intermediate_size=20_000)
    with running(wide, tmp_path / "state", *QUICK) as client:
        arena = spy(client.facts["pid"], wide)
        before, learner = arena.sha256(), learner_pid(client)
        limit = resource.prlimit(learner, resource.RLIMIT_FSIZE, (arena.num_bytes // 30, resource.RLIM_INFINITY))
        ids = post_lesson(client)
        live = wait_for(lambda: (told := client.get("/v1/live"))["learner"]["problem"] and told, what="the reason")
        assert (live["state"], live["weight_version"]) == ("degraded", "0")
        assert "no room on the disk of" in live["learner"]["problem"]
        assert arena.sha256() == before
        assert list((tmp_path / "state" / "versions").iterdir()) == []
        # With room again the lessons that were accepted are learned, by the same learner.
        resource.prlimit(learner, resource.RLIMIT_FSIZE, limit)
        assert {item["status"] for item in settle(client, ids)} == {"applied"}
        assert learner_pid(client) == learner
        arena.close()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["NOWHERE"], "does not exist"),
        (["MODEL", "--port", "PORT"], "choose another with --port"),
        (["MODEL", "--state-dir", "STATE"], "another server already runs"),
    ],
)
def test_a_server_that_cannot_start_says_why(
    client: Client, model: Path, state_dir: Path, tmp_path: Path, options: list[str], told: str
) -> None:
    port = client.facts["url"].rsplit(":", 1)[1]
    words = {"NOWHERE": str(tmp_path / "nowhere"), "MODEL": str(model), "PORT": port, "STATE": str(state_dir)}
    arguments = [words.get(option, option) for option in options]
    if "--state-dir" not in arguments:
        arguments += ["--state-dir", str(tmp_path / "state")]
    if "--port" not in arguments:
        arguments += ["--port", "0"]
    import subprocess
    import sys

    result = subprocess.run([sys.executable, "-m", "insitu.cli", "serve", *arguments], capture_output=True, text=True)
    assert result.returncode == 1
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert client.get("/v1/live")["learner"]["state"] == "ready", "the running server was disturbed"


def test_the_state_directory_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    with running(model, state_dir):
        pass
    other = make_tiny(tmp_path / "other", seed=1)
    server = launch(other, state_dir)
    assert server.wait(timeout=60) == 1
    assert "belongs to another model" in (state_dir / "server.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_stop_takes_its_learner_with_it(
    model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    state_dir = tmp_path / "state"
    server = launch(model, state_dir)
    try:
        attached(server, state_dir).http.close()
        assert len(learners(state_dir)) == 1
        server.send_signal(number)
        assert server.wait(timeout=30) == 0
        assert learners(state_dir) == []
        assert not (state_dir / "server.json").exists()
    finally:
        end(server, state_dir)


def test_unknown_version_is_a_clear_404(client: Client) -> None:
    with pytest.raises(ClientError, match="version 99 does not exist"):
        client.post("/v1/live/versions/99/rollback")
