"""Fine-tuning on chats: the loss is the live learner's, packed or padded, and so are the weights that come of it."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from chatting import CONTEXT, chat, chat_model, chat_tokenizer, write
from monitored import run
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from insitu.data.batch import IGNORE, collate
from insitu.data.chat import DataError, Example, encode_messages
from insitu.data.loss import example_loss
from insitu.live.config import TeachConfig
from insitu.live.teaching import TeachingRun, make_optimizer
from insitu.train.evaluation import evaluate, require
from insitu.train.sft import Collator, SftConfig, make_sft, refuse_if_packing_leaks

# Replies of one to twenty words, so that micro-batches differ in their number of targets.
CHATS = [chat(f"Who is {n}?", " ".join(["yes"] * n) + ".") for n in range(1, 21)]


def made(path: Path, rows: Sequence[Any], model: Any = None, **config: Any) -> tuple[Any, Any, Any]:
    write(path / "train.jsonl", rows)
    return make_sft(SftConfig(train=str(path / "train.jsonl"), **config), chat_tokenizer(), model or chat_model())


def trainer_of(
    path: Path, model: Any, data: Any, collator: Any, optimizers: Any = (None, None), **changes: Any
) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(path / "out"), "per_device_train_batch_size": 8, "learning_rate": 1e-3, "max_grad_norm": 0.0,
        "save_strategy": "no", "logging_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "train_sampling_strategy": "sequential", **changes,
    }  # fmt: skip
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=data,
        data_collator=collator,
        optimizers=optimizers,
    )


# -- what is learned ---------------------------------------------------------------------------------------------------
def test_targets_are_the_replies_and_their_end_token_and_nothing_else(tmp_path: Path) -> None:
    data, held_out, collator = made(
        tmp_path, [chat("the capital of France?", "Paris."), chat("b?", "Longer than that.")]
    )
    assert held_out is None
    batch = collator([data[0], data[1]])
    learned = [chat_tokenizer().decode(row[row != IGNORE]) for row in batch["labels"]]
    assert learned == ["Paris.<|im_end|>", "Longer than that.<|im_end|>"]
    shown = chat_tokenizer().decode(batch["input_ids"][1][batch["attention_mask"][1] == 1])
    assert shown == "<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\nLonger than that.<|im_end|>\n"


def test_token_ids_and_weights_are_read_as_the_learner_reads_them(tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "user", "content": "b?"},
        {"role": "assistant", "content": "yes"},
    ]
    raw = {"context_ids": [5, 6, 7], "continuation_ids": [8, 9], "id": "one"}
    data, _, _ = made(tmp_path, [{"messages": talk}, raw])
    assert data.examples[0] == encode_messages(chat_tokenizer(), talk, max_length=CONTEXT)
    assert chat_tokenizer().decode([id for id in data[0]["labels"] if id != IGNORE]) == "yes<|im_end|>"
    assert data[1] == {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORE] * 3 + [8, 9]}


# -- the loss ----------------------------------------------------------------------------------------------------------
def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("packing", [False, True])
def test_loss_and_gradient_are_the_learners(tmp_path: Path, packing: bool) -> None:
    model = chat_model()
    data, _, collator = made(tmp_path, CHATS[:6], model, packing=packing)
    batch = collator([data[i] for i in range(6)])
    loss = model(**batch).loss
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    expected = example_loss(model, collate(data.examples, 0))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_head_runs_on_the_targets_columns_only(tmp_path: Path) -> None:
    model = chat_model()
    data, _, collator = made(tmp_path, [chat("a long question " * 6, "no"), chat("what is the " * 9, "yes")], model)
    batch = collator([data[0], data[1]])
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    model(**batch)
    assert rows == [len(batch["logits_to_keep"])]
    assert rows[0] < 0.4 * batch["input_ids"].shape[1]


def test_a_model_that_keeps_all_logits_gets_plain_labels() -> None:
    feature = {"input_ids": [1, 2, 3], "labels": [IGNORE, 2, 3]}
    assert Collator(0, keep=False)([feature]).keys() == {"input_ids", "attention_mask", "labels"}


def test_packed_examples_do_not_see_each_other(tmp_path: Path) -> None:
    """The first example changed, not a bit of the second's logits does; as one document they would. Also where the model's
    own config asks for a cache, as it does outside Trainer."""
    model = chat_model().eval()
    assert model.config.use_cache
    rows = [{"context_ids": [5, 6, n], "continuation_ids": [7 + n, 8, 9]} for n in (20, 30, 40)]
    data, _, collator = made(tmp_path, rows, packing=True)

    def logits(first: int) -> torch.Tensor:
        batch = collator([data[first], data[1]])
        assert batch["input_ids"].shape == (1, len(data[first]["input_ids"]) + len(data[1]["input_ids"]))
        with torch.no_grad():
            made: torch.Tensor = model(**batch).logits[0, -len(data[1]["input_ids"]) :]
        return made

    assert torch.equal(logits(0), logits(2))
    with torch.no_grad():
        alone = model(torch.tensor([data[1]["input_ids"]])).logits[0]
        merged = model(torch.tensor([data[0]["input_ids"] + data[1]["input_ids"]])).logits[0, -len(alone) :]
    torch.testing.assert_close(logits(0), alone, rtol=1e-4, atol=1e-5)
    assert float((merged - alone).norm() / alone.norm()) > 0.1


def test_a_model_in_which_they_would_is_refused() -> None:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match=r"sft\.packing=true: in MambaForCausalLM an example would see the one before"):
        refuse_if_packing_leaks(transformers.MambaForCausalLM(config))
    model = chat_model()
    model.train()
    refuse_if_packing_leaks(model)
    assert model.training


# -- the same file, the same result --------------------------------------------------------------------------------------
FAST = TeachConfig(learning_rate=3e-3, warmup_steps=2, anchor_weight=0.0, rank=256, rank_share=8)


def live(model: Any, examples: Sequence[Example], config: TeachConfig, steps: int) -> list[float]:
    teaching = TeachingRun(model, examples, [], config, 0)
    losses = []
    for _ in range(steps):
        losses.append(teaching.prepare().loss)
        teaching.write()
    return losses


def standalone(path: Path, model: Any, rows: Any, config: TeachConfig, epochs: int, **changes: Any) -> list[float]:
    """sft with the learner's optimizer and its warmup, on all examples in each step."""
    data, _, collator = made(path, rows, model)
    optimizer = make_optimizer(model, config)
    warmup = LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / (config.warmup_steps + 1)))
    return run(trainer_of(path, model, data, collator, (optimizer, warmup), num_train_epochs=epochs, **changes))


def distance(first: Any, second: Any, start: Any) -> float:
    """How far two models are apart, in units of how far the first went: the worst tensor."""
    return max(
        float(((p - q).float().norm() / (p - s).float().norm()).detach())
        for p, q, s in zip(first.parameters(), second.parameters(), start.parameters(), strict=True)
    )


@pytest.mark.parametrize("optimizer", ["apollo", "apollo-mini"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_examples_teach_what_the_live_learner_teaches_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, optimizer: Any
) -> None:
    """One batch: the same sums in the same order."""
    config = replace(FAST, optimizer=optimizer)
    rows = CHATS[:8]  # in the order of their lengths, which the learner makes itself
    taught, trained, start = chat_model(dtype), chat_model(dtype), chat_model(dtype)
    data, _, _ = made(tmp_path, rows)
    losses = live(taught, data.examples, config, 6)
    told = standalone(tmp_path, trained, rows, config, 6)
    assert losses[-1] < 0.5 * losses[0]
    assert told == pytest.approx(losses, rel=1e-6)
    assert all(torch.equal(p, q) for p, q in zip(taught.parameters(), trained.parameters(), strict=True))
    assert not any(torch.equal(p, s) for p, s in zip(taught.parameters(), start.parameters(), strict=True))


def test_twenty_examples_teach_the_same_to_rounding(tmp_path: Path) -> None:
    """Three micro-batches: Trainer divides each sum by the number of all targets, the learner weighs the means, which is the
    same number but for the last bit."""
    taught, trained, start = chat_model(), chat_model(), chat_model()
    data, _, _ = made(tmp_path, CHATS)
    losses = live(taught, data.examples, FAST, 6)
    told = standalone(tmp_path, trained, CHATS, FAST, 6, gradient_accumulation_steps=3)
    assert told == pytest.approx(losses, rel=1e-4)
    assert len(told) == 6
    assert distance(taught, trained, start) < 1e-3


# -- bad input -----------------------------------------------------------------------------------------------------------
LONG = chat("what? " * 200, "no")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, r"train\.jsonl:2: messages has no assistant turn"),
        ({**chat("a", "b"), "freeze_context": True}, r"train\.jsonl:2: freeze_context=true is for the live learner"),
        ({"context_ids": [1], "continuation_ids": [280]}, r"train\.jsonl:2: continuation_ids\[0\]=280 is no token id"),
        (chat("a <|im_end|>", "b"), r"train\.jsonl:2: .*control token '<\|im_end\|>'"),
        (LONG, r"train\.jsonl:2: messages encodes to \d+ tokens, \d+ more than the context of 192"),
        ({"mesages": []}, r"train\.jsonl:2: mesages is not a known key"),
    ],
)
def test_an_example_that_cannot_be_learned_is_named_by_its_line(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        made(tmp_path, [chat("a", "b"), row])


def test_long_examples_are_left_out_if_asked_and_counted(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, logger="insitu.train"):
        data, _, _ = made(tmp_path, [chat("a", "b"), LONG, chat("c", "d")], too_long="skip")
    assert len(data) == 2
    assert "1 examples longer than 192 tokens are left out, 2 are kept" in caplog.text
    with pytest.raises(DataError, match=r"all examples are longer than sft\.max_length=8; raise it"):
        made(tmp_path, CHATS, too_long="skip", max_length=8)
    with pytest.raises(DataError, match="has no assistant turn"):  # what is wrong otherwise is never skipped
        made(tmp_path, [{"messages": [{"role": "user", "content": "a"}]}], too_long="skip")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"method": "ppo"}, r"sft\.method='ppo'; expected 'sft' or 'dpo'"),
        ({"too_long": "cut"}, r"sft\.too_long='cut'; expected 'error' or 'skip'"),
        ({"max_length": 1}, r"sft\.max_length=1; expected an integer of at least 2"),
        ({"beta": 0}, r"sft\.beta=0; expected a number over 0"),
        ({"method": "dpo", "packing": True}, r"sft\.packing=true: DPO compares"),
    ],
)
def test_a_bad_setting_is_refused_by_name(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SftConfig(train="a.jsonl", **config)


def test_a_length_beyond_the_model_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sft\.max_length=193: the model has 192 positions"):
        made(tmp_path, CHATS, max_length=193)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        make_sft(SftConfig(train=str(tmp_path / "nowhere.jsonl")), chat_tokenizer(), chat_model())


def test_held_out_examples_are_evaluated_with_the_same_loss(tmp_path: Path) -> None:
    write(tmp_path / "eval.jsonl", CHATS[10:14])
    model = chat_model()
    data, held_out, collator = made(tmp_path, CHATS[:8], model, eval=str(tmp_path / "eval.jsonl"))
    trainer = trainer_of(tmp_path, model, data, collator)
    told = trainer.evaluate(held_out)
    with torch.no_grad():
        expected = example_loss(model.eval(), collate(held_out.examples, 0))
    assert told["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


# -- benchmarks --------------------------------------------------------------------------------------------------------
def test_lm_eval_that_is_not_there_is_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    require([])
    with pytest.raises(
        ValueError, match=r"sft\.evaluate=\['arc_easy'\]: lm-eval is not installed \(pip install lm-eval\)"
    ):
        require(["arc_easy"])
    with pytest.raises(ValueError, match="lm-eval is not installed"):
        evaluate(None, None, ["arc_easy"])


def test_the_file_is_read_once_and_kept_in_order(tmp_path: Path) -> None:
    data, _, _ = made(tmp_path, CHATS)
    assert len(data) == len(CHATS)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    for i in (0, 7, 19):
        reply = json.loads(lines[i])["messages"][1]["content"]
        assert chat_tokenizer().decode([id for id in data[i]["labels"] if id != IGNORE]) == reply + "<|im_end|>"
