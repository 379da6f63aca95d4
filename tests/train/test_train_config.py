"""A configuration: what it resolves to, and that each mistake in it is told before anything is trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_runs import config_of, content, write_config
from transformers import TrainingArguments

from insitu.cli.training import config_schema, pretrain
from insitu.train.config import json_schema, load, resolve
from insitu.train.fields import ConfigError


def test_a_flag_wins_over_the_file_and_reaches_into_lists(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    flags = ["--training.learning_rate", "1e-3", "--data.sources.1.weight=2", "--model.options.num_hidden_layers", "1"]
    config = load(path, flags)
    assert config.training["learning_rate"] == 0.001
    assert [source.weight for source in config.data.sources] == [1.0, 2]
    assert config.model.options["num_hidden_layers"] == 1
    assert config.model.options["hidden_size"] == 32
    assert load(path).training["learning_rate"] == 1e-2


@pytest.mark.parametrize("written", ["1e-3", "1E-3", "1.0e-3", "0.001", "+1e-3", ".1e-2"])
def test_a_number_is_read_as_everybody_writes_it(written: str, tmp_path: Path) -> None:
    assert load(write_config(tmp_path), ["--training.learning_rate", written]).training["learning_rate"] == 0.001


def test_no_is_a_word_and_false_is_none(tmp_path: Path) -> None:
    flags = ["--training.save_strategy", "no", "--training.use_cpu", "false", "--training.disable_tqdm=True"]
    training = load(write_config(tmp_path), flags).training
    assert (training["save_strategy"], training["use_cpu"], training["disable_tqdm"]) == ("no", False, True)


def test_training_has_no_second_defaults(tmp_path: Path) -> None:
    assert config_of(tmp_path).training == content(tmp_path)["training"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "section": ({"trainin": {}}, "trainin is unknown: did you mean training"),
    "key": ({"training": {"max_step": 3}}, r"training.max_step is unknown: did you mean max_steps"),
    "near key": ({"model": {"nam": "llama-9m"}}, "model.nam is unknown: did you mean name"),
    "deep key": ({"data": {"sources": [{"name": "a", "pat": "b"}]}}, "did you mean 'path'"),
    "type": ({"training": {"max_steps": "ten"}}, "training.max_steps='ten': expected a whole number"),
    "boolean": ({"training": {"use_cpu": 1}}, "training.use_cpu=1: expected true or false"),
    "choice": ({"model": {"weights": "random"}}, "model.weights='random': expected 'pretrained', 'scratch' or null"),
    "no mapping": ({"model": "llama-9m"}, "model='llama-9m': expected a mapping"),
    "other verb": ({"sft": {}}, "sft is no section of `insitu train pretrain`: its text is in data"),
    "elsewhere": ({"training": {"bf16": True}}, "training.bf16=True: precision is precision.compute"),
    "optimizer": ({"optimizer": {"name": "apolo"}}, "optimizer.name='apolo' is unknown: did you mean apollo"),
    "preset": (
        {"optimizer": {"preset": "apollo-130"}},
        "optimizer.preset='apollo-130' is unknown: did you mean apollo-130m",
    ),
    "lr": ({"optimizer": {"options": {"lr": 0.1}}}, "set training.learning_rate instead"),
    "foreign release": (
        {"optimizer": {"name": "adamw", "release": True}},
        "optimizer.release: adamw has no such thing",
    ),
    "preset model": ({"model": {"name": "llama-9m", "weights": "pretrained"}}, "a shape without weights"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_named_with_its_place_and_the_way_out(case: str, tmp_path: Path) -> None:
    changes, message = WRONG[case]
    sections = content(tmp_path)
    for name, values in changes.items():
        sections[name] = {**sections.get(name, {}), **values} if isinstance(values, dict) else values
    with pytest.raises(ValueError, match=message):
        resolve(sections)


def test_a_key_that_is_missing_is_named(tmp_path: Path) -> None:
    for section, key in (("model", "name"), ("data", "sources"), ("training", "output_dir")):
        sections = content(tmp_path)
        del sections[section][key]
        with pytest.raises(ConfigError, match=f"{section}.{key} is missing"):
            resolve(sections)


def test_files_that_are_none_and_flags_that_are_none(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    with pytest.raises(ConfigError, match=r"nowhere.yaml does not exist: expected a YAML file"):
        load(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("model: {name: ")
    with pytest.raises(ConfigError, match="is not YAML"):
        load(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="expected sections"):
        load(tmp_path / "list.yaml")
    for flags, message in (
        (["--max_steps", "3"], "is no flag: expected --section.key value"),
        (["--training.max_steps"], "has no value"),
        (["--data.sources.7.weight", "1"], "'7' is no index of the 2 items of data.sources"),
        (["--training.max_steps.more", "1"], "has no keys"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(path, flags)


def test_a_dry_run_prints_a_file_that_is_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path)
    pretrain("--training.max_steps", "5", config=path, dry_run=True)
    printed = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    (tmp_path / "printed.yaml").write_text(printed)
    assert load(tmp_path / "printed.yaml").as_dict() == load(path, ["--training.max_steps", "5"]).as_dict()
    assert yaml.safe_load(printed)["monitor"]["every"] == 0


def test_a_preset_shows_in_the_dry_run_and_the_file_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes: dict[str, Any] = {"optimizer": {"preset": "apollo-130m", "options": {"refresh": 50}}}
    pretrain(config=write_config(tmp_path, **changes), dry_run=True)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["training"]["learning_rate"] == 1e-2  # the file's; the preset has the same
    assert printed["training"]["adam_epsilon"] == 1e-6
    assert (printed["optimizer"]["options"]["refresh"], printed["optimizer"]["options"]["rank"]) == (50, 192)
    pretrain("--training.learning_rate", "5e-4", config=write_config(tmp_path, **changes), dry_run=True)
    assert yaml.safe_load(capsys.readouterr().out)["training"]["learning_rate"] == 5e-4


def test_the_command_tells_a_mistake_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^insitu: training.max_step is unknown: did you mean max_steps\?$"):
        pretrain("--training.max_step", "3", config=write_config(tmp_path))


def test_the_schema_knows_every_key_of_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    config_schema()
    printed = capsys.readouterr().out
    schema = json_schema()
    assert json.loads(printed) == schema
    assert set(schema["properties"]) == {"model", "data", "sft", "optimizer", "precision", "monitor", "training"}
    training = schema["properties"]["training"]["properties"]
    assert training["max_steps"]["type"] == "integer"
    assert training["learning_rate"]["default"] == TrainingArguments.learning_rate
    assert "bf16" not in training
    assert schema["properties"]["model"]["required"] == ["name"]
    assert "name" in schema["properties"]["data"]["properties"]["sources"]["items"]["properties"]
