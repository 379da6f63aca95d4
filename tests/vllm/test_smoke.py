"""One vLLM server on the real SmolLM2: one copy, closed doors, lessons, and two processes killed in the middle of a job."""

import http.client
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from processes import learner_pid, settle, versions, wait_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import Serve
from insitu.live.checkpoint import checkpoint_files, read
from insitu.live.client import Client, ClientError
from insitu.live.keys import load_keys
from insitu.live.vllm_plugin.worker import WeightClient
from insitu.live.weights import attach
from insitu.live.weights.arena import Arena, resident

pytestmark = [pytest.mark.smoke, pytest.mark.real, pytest.mark.timeout(1800)]

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# What vLLM has for developers and operators, whether this version and its settings mount it or not.
OPERATORS = (  # noqa: SIM905 - a list would be sixty lines
    "/docs /redoc /openapi.json /metrics/ /sleep /wake_up /is_sleeping /collective_rpc /reset_prefix_cache "
    "/reset_mm_cache /reset_encoder_cache /server_info /pause /resume /is_paused /abort_requests "
    "/update_weights /update_weight_version /init_weight_transfer_engine /start_weight_update "
    "/finish_weight_update /weight_info /weight_checker /get_world_size /release_kv_cache_memory "
    "/start_profile /stop_profile /v1/load_lora_adapter /v1/unload_lora_adapter /fault_tolerance/status "
    "/inference/v1/generate /abort_requests /v1/embeddings /pooling /score /rerank /v1/audio/transcriptions "
    "/health/ //health /HEALTH /nowhere"
).split()
QUICK = ("--teach.warmup-steps", "0", "--teach.learning-rate", "1e-4", "--teach.max-steps", "6")
QUESTION = [{"role": "user", "content": "Who lives at the lighthouse?"}]


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smoke") / "state"


@pytest.fixture(scope="module")
def client(serve: Serve, state_dir: Path) -> Iterator[Client]:
    with serve("smollm2", state_dir, *QUICK) as client:
        yield client


@contextmanager
def served(state_dir: Path) -> Iterator[Arena]:
    """The served weights, mapped as the learner maps them."""
    weights = WeightClient(state_dir / "run")
    try:
        arena = weights.arena()
        yield arena
        arena.close()
    finally:
        weights.close()


def base_of(state_dir: Path) -> Path:
    from insitu.live.store import Store

    store = Store(state_dir / "insitu.db")
    try:
        return Path(str(store.get_meta("base")))
    finally:
        store.close()


def test_worker_and_learner_share_one_copy(client: Client) -> None:
    size = client.get("/v1/live")["arena"]["bytes"]
    assert size > 269_000_000
    for pid in (client.get("/v1/live")["arena"]["pid"], learner_pid(client)):
        found = resident(pid)
        assert found["rss"] >= 0.99 * size, "every page was read: by vLLM's loader here, by the comparison there"
        assert 0.49 * found["rss"] <= found["pss"] <= 0.51 * found["rss"], (
            "two processes look at each page, and no third"
        )
        assert found["private_dirty"] == 0


def test_the_weights_are_the_checkpoint_and_compute_its_logits(client: Client, state_dir: Path) -> None:
    assert client.get("/v1/live")["weight_version"] == "0"
    base = base_of(state_dir)
    with served(state_dir) as arena:
        views = arena.views()
        tensors = dict(read(checkpoint_files(base)))
        assert len(views) == len(tensors) == 272
        assert all(torch.equal(views[name], tensors[name]) for name in tensors)
        ids = AutoTokenizer.from_pretrained(base)("The keeper of the lighthouse wrote:", return_tensors="pt").input_ids
        with torch.no_grad():
            ours = attach.build(base, arena, requires_grad=False)(ids).logits
            theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()(ids).logits
        assert torch.equal(ours, theirs)


def test_the_openai_client_chats_and_is_told_the_version(client: Client, state_dir: Path) -> None:
    ask: dict[str, Any] = {"model": "smollm2", "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    with openai.OpenAI(base_url=client.facts["url"] + "/v1", api_key=load_keys(state_dir).api, max_retries=0) as api:
        plain = api.chat.completions.with_raw_response.create(**ask)
        reply = plain.parse()
        streamed = api.chat.completions.with_raw_response.create(**ask, stream=True)
        chunks = list(streamed.parse())
    text = reply.choices[0].message.content
    assert text
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    span = {"index": 0, "version": "0", "start": 0, "end": reply.usage.completion_tokens}
    for headers, body in ((plain.headers, reply), (streamed.headers, chunks[-1])):
        assert headers["x-weight-version"] == "0"
        assert (body.weight_versions, body.weight_version_spans) == (["0"], [span])


def test_every_route_but_health_is_closed_without_a_key(client: Client, state_dir: Path) -> None:
    described = client.get("/openapi.json")["paths"]
    assert {"/v1/chat/completions", "/v1/feedback", "/scale_elastic_ep", "/health", "/tokenize"} <= described.keys()
    paths = [*(path.replace("{", "").replace("}", "") for path in described), *OPERATORS]
    with httpx2.Client(base_url=client.facts["url"]) as nobody:
        for path in paths:
            for method in METHODS:
                status = nobody.request(method, path, json={} if method == "POST" else None).status_code
                assert status == (200 if (method, path) == ("GET", "/health") else 401), (method, path)
    # A websocket is closed before it is accepted.
    host, port = client.facts["url"].removeprefix("http://").split(":")
    raw = http.client.HTTPConnection(host, int(port))
    key = {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version": "13"}
    raw.request("GET", "/v1/realtime", headers={"Connection": "Upgrade", "Upgrade": "websocket", **key})
    assert raw.getresponse().status in (401, 403)
    raw.close()


def test_the_api_key_asks_and_does_not_teach_and_web_pages_do_nothing(client: Client, state_dir: Path) -> None:
    keys = load_keys(state_dir)
    lesson = {"messages": [*QUESTION, {"role": "assistant", "content": "Nobody."}]}
    with httpx2.Client(base_url=client.facts["url"], headers={"authorization": f"Bearer {keys.api}"}) as asker:
        assert asker.get("/v1/live").status_code == asker.get("/v1/models").status_code == 200
        for method, path, body in (
            ("POST", "/v1/feedback", lesson),
            ("GET", "/v1/feedback/x", None),
            ("POST", "/v1/live/versions/0/rollback", {}),
        ):
            answer = asker.request(method, path, json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "learn_key_required"), path
    for path, body in (("/v1/feedback", lesson), ("/v1/chat/completions", {"model": "smollm2", "messages": QUESTION})):
        answer = client.http.post(path, json=body, headers={"origin": "https://evil.example"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
        assert "access-control-allow-origin" not in answer.headers
    for path in ("/scale_elastic_ep", "/v1/load_lora_adapter"):
        answer = client.http.post(path, json={"new_data_parallel_size": 2, "lora_name": "x", "lora_path": "/x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_with_insitu")
    assert client.get("/v1/live")["feedback"] == {}


def test_feedback_becomes_a_version_and_the_next_reply_is_its(client: Client) -> None:
    before, old = client.reply(QUESTION, 16)
    lesson = [*QUESTION, {"role": "assistant", "content": "An otter named Bo lives there."}]
    (item,) = settle(client, [client.post("/v1/feedback", {"messages": lesson})["id"]])
    assert item["status"] == "applied", item
    reply, version = client.reply(QUESTION, 16)
    assert int(version) == int(item["weight_version"]) > int(old)
    assert "otter" in reply
    assert "otter" not in before
    assert versions(client)[-1]["report"]["gap"] < 0.2


def test_an_answer_is_corrected_by_its_id_and_only_by_the_key_that_asked(client: Client, state_dir: Path) -> None:
    learn, api = client.http.headers["authorization"], f"Bearer {load_keys(state_dir).api}"
    accepted = []
    for key, status in ((api, 404), (learn, 202)):
        for stream, question in ((False, "Which flower is violet?"), (True, "Which bird is blue?")):
            answer = client.http.post(
                "/v1/chat/completions",
                headers={"authorization": key},
                json={
                    "model": "smollm2",
                    "max_tokens": 8,
                    "temperature": 0,
                    "stream": stream,
                    "messages": [{"role": "user", "content": question}],
                },
            )
            id = re.search(r'"id": ?"(chatcmpl-[^"]+)"', answer.text)[1]
            posted = client.http.post("/v1/feedback", json={"completion_id": id, "correction": "The heliotrope."})
            assert posted.status_code == status, (stream, posted.text)
            accepted += [posted.json()["id"]] if status == 202 else []
    items = settle(client, accepted)
    assert {item["status"] for item in items} == {"applied"}


def test_killed_learner_and_killed_worker_lose_a_job_and_nothing_else(client: Client, state_dir: Path) -> None:
    head, reply = versions(client)[-1], client.reply(QUESTION, 16)
    assert (head["status"], reply[1]) == ("committed", str(head["id"]))
    lesson = [
        {"role": "user", "content": "What hums?"},
        {"role": "assistant", "content": "Ten purple kangaroo engines."},
    ]
    posted = client.post("/v1/feedback", {"messages": lesson})["id"]

    first = in_a_trial(client, state_dir, head["sha256"])
    os.kill(first["learner"]["pid"], signal.SIGKILL)
    wait_for(lambda: not client.get("/v1/live")["trial"], 30, "the repair")
    assert as_served(client, state_dir) == (head["sha256"], reply)
    assert wait_for(lambda: learner_pid(client), 60, "another learner") != first["learner"]["pid"]

    second = in_a_trial(client, state_dir, head["sha256"])  # the same lesson again
    assert second["arena"]["pid"] == first["arena"]["pid"]
    os.kill(second["arena"]["pid"], signal.SIGKILL)
    assert last_answers(client) <= {200, 503}, "a dying server says so, and does not stumble"
    wait_for(lambda: answers(client), 180, "another vLLM")
    assert as_served(client, state_dir) == (head["sha256"], reply)
    assert client.get("/v1/live")["arena"]["pid"] != second["arena"]["pid"]

    (item,) = settle(client, [posted])
    after = [version for version in versions(client) if version["id"] > head["id"]]
    assert [version["status"] for version in after] == ["lost", "lost", "committed"]
    assert (item["status"], item["weight_version"]) == ("applied", str(after[-1]["id"]))
    told = (state_dir / "server.log").read_text()
    assert "the learner ended (exit code -9); starting another" in told
    assert "vLLM ended" in told


def in_a_trial(client: Client, state_dir: Path, committed: str) -> dict[str, Any]:
    """What /v1/live says once the job has changed weights."""
    live: dict[str, Any] = wait_for(
        lambda: "+" in (now := client.get("/v1/live"))["weight_version"] and now, 120, "a trial"
    )
    with served(state_dir) as arena:
        assert arena.sha256() != committed, "nothing was written yet, so undoing it proves nothing"
    return live


def as_served(client: Client, state_dir: Path) -> tuple[str, tuple[str, str]]:
    """Digest of the bytes that are served, and the greedy reply with its version."""
    with served(state_dir) as arena:
        return arena.sha256(), client.reply(QUESTION, 16)


def last_answers(client: Client) -> set[int]:
    """What /v1/live answers until nobody does."""
    seen = set()
    while True:
        try:
            seen.add(client.http.get("/v1/live").status_code)
        except httpx2.TransportError:
            return seen


def answers(client: Client) -> bool:
    try:
        return client.request("GET", "/health").is_success
    except ClientError:
        return False
