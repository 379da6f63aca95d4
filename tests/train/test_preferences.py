"""Preferences: pairs are read strictly, and DPO makes the chosen reply likelier than the rejected one."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from chatting import chat_model, chat_tokenizer, pair, write

import insitu
from insitu.data.batch import collate
from insitu.data.chat import DataError, encode_messages
from insitu.data.loss import target_logprobs
from insitu.integrations.trainer import trainer_optimizer
from insitu.train.preferences import read_preferences, run_dpo
from insitu.train.sft import SftConfig

PAIRS = [pair(f"{n}?", "An otter.", "A badger.") for n in range(8)]


def margin(model: Any) -> float:
    """log p(chosen) - log p(rejected), of the first pair."""
    told = []
    for key in ("chosen", "rejected"):
        example = encode_messages(chat_tokenizer(), [*PAIRS[0]["prompt"], *PAIRS[0][key]], max_length=192)
        told.append(float(target_logprobs(model, collate([example], 0))[0].sum()))
    return told[0] - told[1]


def test_dpo_prefers_the_chosen_reply_with_this_packages_optimizer(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs trl (and with it datasets): pip install trl")
    model = chat_model()
    before = margin(model)
    training = {
        "output_dir": str(tmp_path / "out"), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "save_strategy": "no", "logging_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False,
    }  # fmt: skip
    config = SftConfig(train=str(write(tmp_path / "pairs.jsonl", PAIRS)), method="dpo", max_length=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of others
        trainer = run_dpo(
            config,
            model,
            chat_tokenizer(),
            training,
            optimizer=lambda args: trainer_optimizer(args, insitu.APOLLO, rank=8),
        )
    assert type(trainer.optimizer.optimizer) is insitu.APOLLO
    assert trainer.args.beta == 0.1
    assert trainer.args.max_length == 64
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(
        torch.log(torch.tensor(2.0)).item(), rel=1e-3
    )  # the reference is the model itself
    assert losses[-1] < 0.8 * losses[0]
    assert margin(model) > before + 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chosen": "An otter."}, r"pairs\.jsonl:2: messages is str; expected a list"),
        ({"chosen": PAIRS[0]["rejected"]}, r"pairs\.jsonl:2: chosen and rejected are the same"),
        ({"chosen": PAIRS[0]["prompt"]}, r"pairs\.jsonl:2: messages has no assistant turn"),
        ({"chosen": [*PAIRS[0]["prompt"], *PAIRS[0]["chosen"]]}, r"pairs\.jsonl:2: chosen has other turns"),
        ({"prompt": [*PAIRS[0]["prompt"], *PAIRS[0]["chosen"]]}, r"pairs\.jsonl:2: prompt ends with an assistant turn"),
        ({"prompt": []}, r"pairs\.jsonl:2: messages is empty"),
        (
            {"score": 1},
            r"pairs\.jsonl:2: expected an object with prompt, chosen, rejected and nothing else; found prompt",
        ),
    ],
)
def test_a_pair_that_is_none_is_named_by_its_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "pairs.jsonl", [PAIRS[0], {**PAIRS[0], **change}])
    with pytest.raises(DataError, match=said):
        read_preferences(path)


def test_an_empty_or_broken_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match=r"pairs\.jsonl: no pairs; expected one JSON object per line"):
        read_preferences(path)
    path.write_text("{\n")
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: not valid JSON"):
        read_preferences(path)


def test_without_trl_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    config = SftConfig(train=str(write(tmp_path / "pairs.jsonl", PAIRS)), method="dpo")
    with pytest.raises(ValueError, match=r"sft\.method='dpo' needs TRL: pip install trl"):
        run_dpo(config, chat_model(), chat_tokenizer(), {"output_dir": str(tmp_path)})
