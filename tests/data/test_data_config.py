"""What of the data section is refused before any text is read."""

import dataclasses
import json
from typing import Any

import pytest

from insitu.data.config import DataConfig, SourceConfig
from insitu.data.messages import DataError


def _config(source: dict[str, Any] | None = None, **options: Any) -> DataConfig:
    return DataConfig(sources=[{"name": "a", "path": "a.txt"} | (source or {})], **options)


def test_a_file_of_yaml_becomes_the_dataclasses() -> None:
    config = _config({"weight": 2}, tokenizer={"vocab_size": 300}, hold=[3, 3])
    assert config.sources == [SourceConfig(name="a", path="a.txt", weight=2)]
    assert config.tokenizer is not None
    assert config.tokenizer.vocab_size == 300
    again = DataConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"wieght": 1}, r"data.sources\[0\] has no key 'wieght'; did you mean 'weight'"),
        ({"zzz": 1}, "has no key 'zzz'; expected one of name, path"),
        ({"name": "a/b"}, "expected a name without a slash"),
        ({"name": ""}, "expected a name without a slash"),
        ({"path": None}, "has no place; expected exactly one of path, hub, package"),
        ({"hub": "allenai/c4"}, "has path and hub; expected exactly one"),
        ({"path": 3}, "path=3; expected a string"),
        ({"path": None, "package": "andrea17"}, "package='andrea17'; expected andrea16"),
        ({"weight": -1}, "weight=-1; expected a number, 0 or more"),
        ({"weight": float("nan")}, "weight=nan; expected a number"),
        ({"weight": True}, "weight=True; expected a number"),
        ({"floor": 1.5}, "floor=1.5; expected a number, 0 to 1"),
        ({"warmup": "yes"}, "warmup='yes'; expected true or false"),
        ({"max_epochs": -2}, "max_epochs=-2; expected a number"),
        ({"max_documents": 0}, "max_documents=0; expected a whole number, 1 or more"),
    ],
)
def test_a_wrong_source_is_named(source: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        _config(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixture": "bandits"}, "data.mixture='bandits'; expected bandit or weighted"),
        ({"exploration": -1}, "data.exploration=-1; expected a number"),
        ({"hold": [9, 7]}, r"data.hold\[1\]=7; expected a whole number, 9 or more"),
        ({"hold": [0, 7]}, r"data.hold\[0\]=0; expected a whole number, 1 or more"),
        ({"hold": 7}, "data.hold=7; expected two numbers"),
        ({"warmup_steps": 5}, "no source is marked `warmup: true`"),
        ({"validation": 1.0}, "expected a share below 1"),
        ({"sequence_length": 1}, "data.sequence_length=1; expected a whole number, 2 or more"),
        ({"tokenizer": {}}, "needs either path .* or vocab_size"),
        ({"tokenizer": {"path": "x", "vocab_size": 300}}, "needs either path .* or vocab_size"),
        ({"tokenizer": {"vocab_size": 256}}, "vocab_size=256; expected a whole number, 257 or more"),
        ({"tokenizer": {"vocabsize": 300}}, "did you mean 'vocab_size'"),
        ({"tokenizer": "gpt2"}, "data.tokenizer='gpt2'; expected a mapping"),
    ],
)
def test_a_wrong_setting_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        _config(**options)


def test_sources_must_be_there_and_differ() -> None:
    with pytest.raises(DataError, match="expected a list of at least one source"):
        DataConfig(sources=[])
    with pytest.raises(DataError, match="two sources named 'a'"):
        DataConfig(sources=[{"name": "a", "path": "x"}, {"name": "a", "path": "y"}])
    with pytest.raises(DataError, match=r"data\.sources\[0\] has no name"):
        DataConfig(sources=[{"path": "x"}])
    with pytest.raises(DataError, match=r"every weight in data\.sources is 0"):
        _config({"weight": 0}, mixture="weighted")
