"""The guard through a real server: canaries from the command line, drift from version to version, warnings that are seen."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import post_lesson, running, say, settle, spy, versions
from tiny import make_tiny

from insitu.live.canaries import FILE
from insitu.live.client import Client

# The tiny model talks nonsense and is easily moved: the limits on that are wide, and one is so narrow that it always warns.
WIDE = ("--teach.max-canary-kl", "100", "--teach.max-worst-kl", "100", "--teach.max-drift-kl", "100")
MORE = ("--teach.max-drift-loss", "100", "--teach.max-canary-loss", "100", "--teach.max-repetition-rise", "1")
QUICK = ("--teach.max-steps", "4", "--teach.learning-rate", "1e-3", "--teach.warn-canary-kl", "0", *WIDE, *MORE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guard") / "state"


@pytest.fixture(scope="module")
def client(model: Path, state_dir: Path) -> Iterator[Client]:
    with running(model, state_dir, *QUICK) as client:
        yield client


def insitu(state_dir: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "INSITU_STATE": str(state_dir), "COLUMNS": "250"}
    return subprocess.run([sys.executable, "-m", "insitu.cli", *words], capture_output=True, text=True, env=environment)


def lesson(word: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": f"what is {word}"}, {"role": "assistant", "content": f"{word} is an owl"}]]


def taught(client: Client, word: str) -> dict[str, Any]:
    """The verdict on a lesson that was committed."""
    (item,) = settle(client, post_lesson(client, lesson(word)))
    assert item["status"] == "applied", item
    found: dict[str, Any] = versions(client)[-1]["report"]["verdict"]
    return found


def test_drift_goes_on_from_version_0_and_an_added_canary_says_since_when(client: Client, state_dir: Path) -> None:
    first = taught(client, "one")["figures"]
    assert first["since"] == "0"
    assert first["drift_kl"] == pytest.approx(first["canary_kl"], abs=0.02)
    second = taught(client, "two")["figures"]
    assert second["drift_kl"] > 1.2 * second["canary_kl"]

    added = insitu(state_dir, "canary", "add", "How is [my] shop?")
    assert (added.returncode, "canary-1 judges" in added.stdout) == (0, True), added.stderr
    third = taught(client, "three")["figures"]
    assert third["since"] == "0, 2"
    mine = third["canaries"][-1]
    assert (mine["name"], mine["since"], len(third["canaries"])) == ("canary-1", 2, 9)
    assert mine["kl"] == pytest.approx(mine["drift_kl"], abs=0.02)
    assert "[my]" not in str(versions(client))  # a report goes to whoever may ask; a prompt may be private
    assert "How is [my] shop?" in insitu(state_dir, "canary", "list").stdout
    assert state_dir.stat().st_mode & 0o77 == 0  # the prompts are in a file there
    assert (state_dir / FILE).exists()

    removed = insitu(state_dir, "canary", "remove", "canary-1")
    assert removed.returncode == 0
    assert len(taught(client, "four")["figures"]["canaries"]) == 8
    again = insitu(state_dir, "canary", "remove", "canary-1")
    assert (again.returncode, "no canary" in again.stderr, "Traceback" in again.stderr) == (1, True, False)
    refused = insitu(state_dir, "canary", "add", "")
    assert (refused.returncode, "empty" in refused.stderr) == (1, True)


def test_a_warning_commits_and_is_seen(client: Client, state_dir: Path) -> None:
    verdict = taught(client, "five")
    assert verdict["level"] == "warn"
    assert "changed unrelated replies" in verdict["reasons"][0]
    assert versions(client)[-1]["status"] == "committed"
    table = insitu(state_dir, "versions").stdout
    assert "warn" in table
    assert "changed unrelated replies" in " ".join(table.split())


def test_a_broken_file_of_canaries_is_written_anew_and_the_log_says_so(client: Client, state_dir: Path) -> None:
    head = versions(client)[-1]["id"]
    content = bytearray((state_dir / FILE).read_bytes())
    content[-1] ^= 1
    (state_dir / FILE).write_bytes(content)
    assert taught(client, "six")["figures"]["since"] == str(head)
    assert f"the drift is measured from version {head} on" in (state_dir / "learner.log").read_text()


def test_a_lesson_of_one_word_over_and_over_is_refused_before_anything_is_trained(client: Client, model: Path) -> None:
    arena, before, text = spy(client.facts["pid"], model), versions(client), say(client)
    sha256 = arena.sha256()
    looping = [[{"role": "user", "content": "who"}, {"role": "assistant", "content": "a" * 100}]]
    (item,) = settle(client, post_lesson(client, looping))
    assert item["status"] == "refused"
    assert "repeats itself" in item["reason"]
    assert (arena.sha256(), versions(client), say(client)) == (sha256, before, text)
    arena.close()


def test_an_audit_that_refuses_restores_the_version_before(model: Path, tmp_path: Path) -> None:
    """Every step is within the gate; the drift limit refuses at the end."""
    options = [o if o != "100" else "1e6" for o in QUICK]
    options[options.index("--teach.max-drift-kl") + 1] = "1e-6"
    with running(model, tmp_path / "state", *options) as client:
        arena = spy(client.facts["pid"], model)
        sha256, text = arena.sha256(), say(client)
        (item,) = settle(client, post_lesson(client, lesson("one")))
        assert item["status"] == "refused"
        assert "drifted" in item["reason"]
        assert "since version 0" in item["reason"]
        assert (arena.sha256(), say(client)) == (sha256, text)
        refused = versions(client)[-1]
        assert (refused["status"], refused["report"]["verdict"]["level"]) == ("refused", "refuse")
        assert len(refused["report"]["steps"]) > 1
        assert client.get("/v1/live")["weight_version"] == "0"
        arena.close()
