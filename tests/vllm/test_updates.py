"""Two clients read while the weights change twenty times: every token is of the version that it is said to be of."""

import json
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make
from processes import settle
from transformers import AutoModelForCausalLM

from conftest import Serve
from insitu.live.client import Client
from insitu.live.store import Store
from insitu.live.versions import Versions

TOKENS = 40
PREFIX = (
    "the keeper of the lighthouse counts the boats that come home. " * 6
)  # about 300 tokens, two blocks of vLLM's prefix cache
# In fp32 another way to the same sum (a cached prefix, another batch, Transformers' kernels) moves no log-probability by
# more than 2e-6, so what is left is the weights.
NOISE = 1e-4
OPTIONS = ("--dtype", "float32", "--teach.max-steps", "2", "--teach.warmup-steps", "0", "--teach.learning-rate", "1e-3")


@dataclass
class Reply:
    prompt: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)

    @property
    def versions(self) -> list[str]:
        return [span["version"] for span in self.spans]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("updates") / "model")


def ask(client: Client, question: str) -> Reply:
    """A greedy streamed reply behind the shared prefix; AssertionError if anything in it is not as it must be."""
    reply, finish, done = Reply(), None, False
    body = {
        "model": client.facts["model"],
        "messages": [{"role": "system", "content": PREFIX}, {"role": "user", "content": question}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "logprobs": True,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    with client.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            done = done or line == "data: [DONE]"
            if not line.startswith("data: {"):
                continue
            told = json.loads(line.removeprefix("data: "))
            reply.prompt = told.get("prompt_token_ids") or reply.prompt
            reply.spans = told.get("weight_version_spans") or reply.spans
            for choice in told["choices"]:
                reply.ids += choice.get("token_ids") or []
                reply.logprobs += [token["logprob"] for token in (choice.get("logprobs") or {}).get("content", [])]
                finish = choice.get("finish_reason") or finish
    assert (done, finish, len(reply.ids), len(reply.logprobs)) == (True, "length", TOKENS, TOKENS)
    assert len(reply.prompt) > 256
    return reply


def read_while_learning(client: Client, state_dir: Path, updates: int) -> list[Reply]:
    """What two clients were answered while so many lessons, one after the other, became versions."""
    replies: list[Reply] = []
    failed: list[BaseException] = []
    enough = threading.Event()

    def read(name: int) -> None:
        try:
            with Client(state_dir) as reader:
                while not enough.is_set():
                    replies.append(ask(reader, f"{name}, {len(replies)}"))
        except BaseException as error:
            failed.append(error)

    readers = [threading.Thread(target=read, args=(name,)) for name in range(2)]
    for reader in readers:
        reader.start()
    try:
        for number in range(updates):
            lesson = [
                {"role": "user", "content": f"lesson {number}"},
                {"role": "assistant", "content": f"otter {number}"},
            ]
            (item,) = settle(client, [client.post("/v1/feedback", {"messages": lesson})["id"]])
            assert item["status"] == "applied", item
    finally:
        enough.set()
        for reader in readers:
            reader.join()
    assert failed == []
    return replies


def off(replies: list[Reply], state_dir: Path) -> float:
    """By how many nats any token that is labelled with a committed version is off what that version's file says of it.

    Both what the server said of the token, and what greedy decoding would have taken in its place, by Transformers.
    """
    worst = 0.0
    with closing(Store(state_dir / "insitu.db")) as store:
        base = Path(str(store.get_meta("base")))
        versions = Versions(state_dir, base, store)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        for version in sorted({int(v) for reply in replies for v in reply.versions if v.isdigit()}):
            model.load_state_dict(dict(versions.iter_version(version)))
            for reply in replies:
                for span in (span for span in reply.spans if span["version"] == str(version)):
                    part = slice(span["start"], span["end"])
                    with torch.no_grad():
                        logits = model(torch.tensor([reply.prompt + reply.ids])).logits[0, len(reply.prompt) - 1 : -1]
                    rows = logits.log_softmax(-1)[part]
                    taken = rows.gather(1, torch.tensor(reply.ids[part]).unsqueeze(1)).squeeze(1)
                    said = torch.tensor(reply.logprobs[part])
                    worst = max(worst, *(taken - said).abs().tolist(), *(rows.max(1).values - taken).tolist())
    return worst


def cached_tokens(client: Client) -> float:
    lines = client.request("GET", "/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("vllm:prefix_cache_hits_total{")).split()[-1])


@pytest.fixture
def served(serve: Serve, model: Path, tmp_path: Path) -> Callable[[], Any]:
    return lambda: serve(model, tmp_path / "state", *OPTIONS, "--teach.max-canary-kl", "100")


def calm(client: Client, state_dir: Path) -> float:
    """The same check while nothing changes: of fresh prefixes, then of cached ones."""
    first = [ask(client, f"calm {n}") for n in range(4)]
    before = cached_tokens(client)
    again = [ask(client, f"calm {n}") for n in range(4)]
    assert cached_tokens(client) - before >= 4 * 256, "without hits in the prefix cache this file asks for nothing"
    return off(first + again, state_dir)


def test_every_token_is_of_the_version_that_it_is_said_to_be_of(served: Any, tmp_path: Path) -> None:
    with served() as client:
        assert calm(client, tmp_path / "state") < NOISE
        before = cached_tokens(client)
        replies = read_while_learning(client, tmp_path / "state", updates=20)
        assert cached_tokens(client) > before
        for reply in replies:
            starts, ends = ([span[side] for span in reply.spans] for side in ("start", "end"))
            assert (starts[0], starts[1:], ends[-1]) == (0, ends[:-1], TOKENS), reply.spans
            assert len(set(reply.versions)) == len(reply.versions)
        whole = [reply for reply in replies if len(reply.versions) == 1 and reply.versions[0].isdigit()]
        assert len({reply.versions[0] for reply in whole}) > 10
        assert sum(len(reply.versions) > 1 for reply in replies) > 10
        assert off(replies, tmp_path / "state") < NOISE


def test_the_same_check_finds_a_publish_that_forgets_nothing(
    inject: Callable[[str], None], served: Any, tmp_path: Path
) -> None:
    inject("stale_cache")
    with served() as client:
        assert calm(client, tmp_path / "state") < NOISE, "the defect shows only when weights change"
        replies = read_while_learning(client, tmp_path / "state", updates=4)
        assert off(replies, tmp_path / "state") > 100 * NOISE
