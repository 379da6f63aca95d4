"""The verbs, as a user types them, against a real server."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import running, settle, versions
from tiny import make_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from insitu.live.checkpoint import checkpoint_files, digest
from insitu.live.client import Client

QUICK = ("--teach.max-steps", "4", "--teach.learning-rate", "1e-3", "--teach.max-canary-kl", "100")


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli") / "state"


@pytest.fixture(scope="module")
def client(state_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    model = make_tiny(tmp_path_factory.mktemp("cli-model") / "tiny")
    with running(model, state_dir, *QUICK) as client:
        yield client


def insitu(state_dir: Path, *words: str, told: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "INSITU_STATE": str(state_dir), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "insitu.cli", *words], input=told, capture_output=True, text=True, env=environment
    )


def example(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


def test_learn_versions_status_and_rollback(client: Client, state_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "lesson.jsonl"
    file.write_text(example("who lives here", "an otter") + "\n" + example("name it", "the otter") + "\n")
    learned = insitu(state_dir, "learn", str(file))
    assert learned.returncode == 0, learned.stderr
    version = versions(client)[-1]["id"]
    assert f"the model is now version {version}" in learned.stderr
    assert json.loads(insitu(state_dir, "status").stdout)["weight_version"] == str(version)
    table = insitu(state_dir, "versions").stdout
    assert "teach" in table
    assert "committed" in table
    undone = insitu(state_dir, "rollback", "0")
    assert undone.returncode == 0
    assert "bit for bit equal to version 0" in undone.stdout
    assert versions(client)[-1]["sha256"] == versions(client)[0]["sha256"]


def test_a_version_is_exported_pinned_and_let_go(client: Client, state_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "lesson.jsonl"
    file.write_text(example("who lives there", "a badger") + "\n")
    assert insitu(state_dir, "learn", str(file)).returncode == 0
    made = versions(client)[-1]
    out = tmp_path / "out"
    exported = insitu(state_dir, "export", str(made["id"]), str(out))
    assert exported.returncode == 0, exported.stderr
    assert json.loads((out / "insitu-version.json").read_text())["sha256"] == made["sha256"]
    assert digest(checkpoint_files(out)) == made["sha256"]
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    served = client.reply([{"role": "user", "content": "who lives there"}], max_tokens=12)[0]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "who lives there"}], add_generation_prompt=True, return_tensors="pt"
    )
    said = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(said, skip_special_tokens=True) == served

    again = insitu(state_dir, "export", str(made["id"]), str(out))
    assert (again.returncode, "exists; choose a new directory" in again.stderr) == (1, True)
    unknown = insitu(state_dir, "export", "99", str(tmp_path / "other"))
    assert (unknown.returncode, "version 99 does not exist; committed versions" in unknown.stderr) == (1, True)
    nowhere = insitu(state_dir, "export", "0", str(tmp_path / "other"), "--state-dir", str(tmp_path))
    assert (nowhere.returncode, "is not a state directory" in nowhere.stderr) == (1, True)
    assert not (tmp_path / "other").exists()
    assert list(tmp_path.glob(".*")) == []

    assert insitu(state_dir, "pin", str(made["id"])).returncode == 0
    assert "pinned" in insitu(state_dir, "versions").stdout
    assert insitu(state_dir, "unpin", str(made["id"])).returncode == 0
    assert "pinned" not in insitu(state_dir, "versions").stdout
    insitu(state_dir, "rollback", "0")


def test_learn_reads_standard_input(client: Client, state_dir: Path) -> None:
    assert insitu(state_dir, "learn", "-", told=example("say it", "yes") + "\n").returncode == 0
    assert versions(client)[-1]["kind"] == "teach"


def test_a_broken_line_names_file_line_and_field_and_teaches_nothing(
    client: Client, state_dir: Path, tmp_path: Path
) -> None:
    before = len(versions(client))
    file = tmp_path / "broken.jsonl"
    file.write_text(example("a", "b") + '\n{"messages": [{"role": "robot", "content": "x"}]}\n')
    result = insitu(state_dir, "learn", str(file))
    assert result.returncode == 1
    for part in ("broken.jsonl", "2", "role", "robot"):
        assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert len(versions(client)) == before
    assert client.get("/v1/live")["feedback"].get("queued", 0) == 0


def test_feedback_is_held_shown_released_and_withdrawn(client: Client, state_dir: Path) -> None:
    turns = json.loads(example("where is it", "in the river"))
    ids = [
        client.post("/v1/feedback", {**turns, "id": id, "hold": True})["id"] for id in ("held-1", "held-2", "held-3")
    ]
    listed = insitu(state_dir, "feedback", "list", "--status", "held")
    assert all(id in listed.stdout for id in ids), listed.stderr
    assert "river" in insitu(state_dir, "feedback", "show", "held-1").stdout
    assert insitu(state_dir, "feedback", "withdraw", *ids[:2]).stdout == "held-1 withdrawn\nheld-2 withdrawn\n"
    assert insitu(state_dir, "feedback", "release", "held-3").stdout == "held-3 queued\n"
    settle(client, ids[2:])
    late = insitu(state_dir, "feedback", "hold", "held-3")
    assert (late.returncode, late.stdout) == (1, "")
    assert "held-3' is applied: roll back" in late.stderr
    told = [json.loads(line) for line in insitu(state_dir, "events", "--limit", "200").stdout.splitlines()]
    assert [e["kind"] for e in told if e["subject"] == "held-3"] == [
        "feedback.accepted",
        "feedback.released",
        "feedback.applied",
    ]
    assert [e["kind"] for e in told if e["subject"] == "held-1"] == ["feedback.accepted", "feedback.withdrawn"]
    report = versions(client)[-1]["report"]
    committed = [e for e in told if e["kind"] == "version.committed"][-1]["detail"]
    assert (committed["seconds"], committed["steps"]) == (report["seconds"], len(report["steps"]))
    assert 0 < committed["stall"]["median"] <= committed["stall"]["max"]


def test_chat_answers_and_takes_a_correction(client: Client, state_dir: Path) -> None:
    before = versions(client)[-1]["id"]
    talk = insitu(state_dir, "chat", "--max-tokens", "8", told="who are you\n/no the otter\n/quit\n")
    assert talk.returncode == 0, talk.stderr
    assert client.facts["model"] in talk.stdout
    assert versions(client)[-1]["id"] == before + 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("learn", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (("rollback", "99"), "version 99 does not exist"),
        (("status", "--state-dir", "/nonexistent"), "no server runs on /nonexistent"),
    ],
)
def test_what_cannot_be_done_is_one_line_on_stderr(
    client: Client, state_dir: Path, words: tuple[str, ...], told: str
) -> None:
    result = insitu(state_dir, *words)
    assert result.returncode == 1
    assert told in result.stderr
    assert "Traceback" not in result.stderr


def test_doctor_names_versions(tmp_path: Path) -> None:
    told = insitu(tmp_path, "doctor").stdout
    assert "torch 2." in told
    assert "transformers 5." in told
