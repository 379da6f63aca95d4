"""A model without a chat template, as `insitu train pretrain` writes it: served, taught by token ids, and undone."""

import json
import random
from pathlib import Path

import pytest
from processes import running, settle, versions
from transformers import AutoTokenizer

from insitu.cli.training import pretrain
from insitu.data.chat import DataError, encode_question
from insitu.live import prompts
from insitu.live.client import ClientError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes after a few steps."""
    directory = tmp_path_factory.mktemp("pretrained")
    dice = random.Random(1)
    documents = [" ".join(dice.choices(prompts.ANCHORS, k=5)) for _ in range(60)]
    (directory / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    config = {
        "model": {"name": "andrea-tiny", "options": {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2}},
        "data": {
            "sources": [{"name": "prose", "path": str(directory / "prose.jsonl")}], "tokenizer": {"vocab_size": 280},
            "sequence_length": 16,
        },
        "optimizer": {"name": "apollo", "options": {"rank": 4}},
        "monitor": {"every": 0},
        "training": {
            "output_dir": str(directory / "out"), "max_steps": 8, "learning_rate": 1e-2, "per_device_train_batch_size": 4,
            "use_cpu": True, "disable_tqdm": True,
        },
    }  # fmt: skip
    (directory / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    pretrain(config=directory / "config.yaml")
    return directory / "out"


def test_it_is_served_and_taught_by_token_ids_and_undone(trained: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    context, lesson = (tokenizer(text)["input_ids"] for text in ("What do cows", " name three fruits"))
    options = ("--teach.learning-rate", "3e-3", "--teach.max-canary-kl", "100", "--teach.max-worst-kl", "100")
    with running(trained, tmp_path / "state", *options) as client:

        def written() -> str:
            asked = {"model": client.facts["model"], "prompt": context, "max_tokens": len(lesson), "temperature": 0}
            text: str = client.post("/v1/completions", asked)["choices"][0]["text"]
            return text

        before = written()
        assert before != " name three fruits"
        posted = client.post("/v1/feedback", {"context_ids": context, "continuation_ids": lesson})
        (item,) = settle(client, [posted["id"]])
        assert item["status"] == "applied", item
        assert versions(client)[-1]["report"]["canary_kl"] > 0  # the canaries are text to go on from, and judge it
        assert written() == " name three fruits"
        client.post("/v1/live/versions/0/rollback")
        assert written() == before
        assert versions(client)[-1]["sha256"] == versions(client)[0]["sha256"]
        with pytest.raises(ClientError, match=r"no chat template: ask it through /v1/completions"):
            client.reply([{"role": "user", "content": "What do cows"}], max_tokens=4)


def test_a_question_is_the_text_itself_where_there_is_no_template(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert encode_question(tokenizer, "What do cows") == tokenizer("What do cows")["input_ids"] != []
    with pytest.raises(DataError, match="encodes to no token"):
        encode_question(tokenizer, "")
