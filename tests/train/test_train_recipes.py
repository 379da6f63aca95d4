"""The recipes run as they are, but for their sizes and the place of their text."""

import json
from pathlib import Path

import pytest
from chatting import chat, chat_model, chat_tokenizer, write
from training_runs import losses, write_texts

from insitu.cli.training import pretrain, sft
from insitu.train import checkpoints
from insitu.train.config import load
from insitu.train.prepare import prepare
from insitu.train.run import Run

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = [
    "--training.disable_tqdm",
    "true",
    "--training.max_steps",
    "4",
    "--training.logging_steps",
    "2",
]


def test_every_recipe_is_known_to_the_tests() -> None:
    assert {path.name for path in RECIPES.iterdir()} == {"andrea-tiny.yaml", "llama-9m.yaml", "sft.yaml"}


def test_andrea_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPES / "andrea-tiny.yaml"
    write_texts(tmp_path)
    for source in load(recipe).data.sources:
        (tmp_path / f"{source.name}.jsonl").write_text((tmp_path / "prose.jsonl").read_text())
    monkeypatch.setenv("INSITU_DATA", str(tmp_path))
    flags = [
        *SMALL, "--training.output_dir", str(tmp_path / "out"), "--training.max_steps", "40", "--training.warmup_steps", "2",
        "--data.tokenizer.vocab_size", "280", "--data.sequence_length", "16", "--data.warmup_steps", "4",
        "--monitor.every", "20", "--monitor.tokens", "16", "--model.options.num_hidden_layers", "1",
        "--training.eval_steps", "40",
        "--data.sources.4.max_epochs", "50", "--data.sources.13.max_epochs", "50",
    ]  # fmt: skip
    pretrain(*flags, config=recipe)
    found = losses(tmp_path / "out")
    assert len(found) == 40
    assert found[-1] < found[0] - 0.5
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40]


def test_llama_9m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path)
    (tmp_path / "allenai").mkdir()
    (tmp_path / "allenai" / "c4.jsonl").write_text((tmp_path / "prose.jsonl").read_text())
    monkeypatch.setenv("INSITU_DATA", str(tmp_path))
    flags = [
        *SMALL, "--training.output_dir", str(tmp_path / "out"), "--data.tokenizer.vocab_size", "280",
        "--data.sequence_length", "16", "--monitor.every", "0", "--model.options.num_hidden_layers", "1",
        "--training.gradient_accumulation_steps", "1", "--data.validation", "0.1", "--training.eval_steps", "4",
    ]  # fmt: skip
    pretrain(*flags, config=RECIPES / "llama-9m.yaml")
    found = losses(tmp_path / "out")
    assert found[-1] < found[0]


def test_sft_and_that_it_goes_on_where_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chat_model().save_pretrained(tmp_path / "model")
    chat_tokenizer().save_pretrained(tmp_path / "model")
    chats = write(tmp_path / "chats.jsonl", [chat(f"Who is {n}?", " ".join(["yes"] * n) + ".") for n in range(1, 21)])
    flags = [
        *SMALL, "--model.name", str(tmp_path / "model"), "--sft.train", str(chats), "--sft.max_length", "128",
        "--training.per_device_train_batch_size", "4", "--training.max_steps", "8", "--training.save_steps", "3",
        "--training.save_total_limit", "9", "--training.learning_rate", "3e-3", "--precision.compute", "fp32",
    ]  # fmt: skip
    recipe = RECIPES / "sft.yaml"
    sft(*flags, "--training.output_dir", str(tmp_path / "out"), config=recipe)
    whole = losses(tmp_path / "out")
    assert len(whole) == 8
    assert whole[-1] < whole[0]

    for step in (6, 8):
        (tmp_path / "out" / f"checkpoint-{step}").rename(tmp_path / f"aside-{step}")
    run = prepare(load(recipe, [*flags, "--training.output_dir", str(tmp_path / "out")], "sft"), resume=True)
    assert isinstance(run, Run)
    assert run.resume == tmp_path / "out" / "checkpoint-3"
    run.train()
    assert losses(tmp_path / "out") == whole
    weights = [path / "model.safetensors" for path in (tmp_path / "aside-8", tmp_path / "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert sorted(checkpoints.steps_in(tmp_path / "out")) == [3, 6, 8]


@pytest.mark.filterwarnings("ignore")  # of TRL and what it brings
def test_dpo_writes_a_model_and_refuses_what_its_trainer_has_not(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs trl: pip install trl")
    from chatting import pair

    chat_model().save_pretrained(tmp_path / "model")
    chat_tokenizer().save_pretrained(tmp_path / "model")
    pairs = write(tmp_path / "pairs.jsonl", [pair(f"{n}?", "An otter.", "A badger.") for n in range(8)])
    flags = [
        *SMALL, "--model.name", str(tmp_path / "model"), "--sft.train", str(pairs), "--sft.method", "dpo",
        "--sft.max_length", "64", "--training.save_strategy", "no", "--training.output_dir", str(tmp_path / "out"),
        "--precision.compute", "fp32",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match=r"sft.method=dpo runs on TRL's trainer, which has no --resume"):
        sft(*flags, config=RECIPES / "sft.yaml", resume=True)
    sft(*flags, "--training.max_steps", "2", config=RECIPES / "sft.yaml")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "config.json").is_file()
