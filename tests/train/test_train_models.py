"""The models of a run: shapes by name, weights from a seed, and what does not fit together."""

from pathlib import Path

import pytest
import torch
from training_runs import config_of

from insitu.diagnostics.skeleton import skeleton
from insitu.train.fields import ConfigError
from insitu.train.models import ModelConfig, build, check_fits, shape_of
from insitu.train.prepare import prepare


@pytest.mark.parametrize(
    ("name", "d", "layers", "vocabulary"),
    [("andrea-tiny", 128, 4, 2305), ("andrea-12m", 384, 6, 2305), ("andrea-120m", 768, 12, 8449)],
)
def test_the_gpts_have_the_parameters_of_the_lessons_and_two_positions(
    name: str, d: int, layers: int, vocabulary: int
) -> None:
    assert sum(p.numel() for p in skeleton(name).parameters()) == 12 * d * d * layers + 1026 * d + 2 * vocabulary * d


def test_a_model_from_scratch_has_the_tokenizers_vocabulary_and_the_options() -> None:
    shape = shape_of(ModelConfig(name="llama-9m", options={"num_hidden_layers": 1}), 300)
    assert (shape.vocab_size, shape.num_hidden_layers, shape.hidden_size) == (300, 1, 128)
    assert shape_of(ModelConfig(name="llama-9m", options={"vocab_size": 512}), 300).vocab_size == 512
    with pytest.raises(ConfigError, match="the tokenizer has 300 tokens"):
        shape_of(ModelConfig(name="llama-9m", options={"vocab_size": 299}), 300)
    with pytest.raises(ConfigError, match=r"model.options.num_hiden_layers is unknown: did you mean num_hidden_layers"):
        shape_of(ModelConfig(name="llama-9m", options={"num_hiden_layers": 1}), 300)


def test_weights_from_scratch_are_a_function_of_the_seed(tmp_path: Path) -> None:
    config = ModelConfig(name="andrea-tiny", options={"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1})
    shape = shape_of(config, 260)
    first = build(config, shape, 1, None, tmp_path)
    torch.rand(5)
    again, other = build(config, shape, 1, None, tmp_path), build(config, shape, 2, None, tmp_path)
    matrices = [p.ndim == 2 for p in first.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    same = [torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters(), strict=True)]
    assert not any(equal for equal, matrix in zip(same, matrices, strict=True) if matrix)


def test_what_does_not_fit_is_refused() -> None:
    shape = shape_of(ModelConfig(name="andrea-tiny"), 300)
    check_fits(shape, 300, 1024)
    with pytest.raises(ConfigError, match=r"data.sequence_length=1025: the model has 1024 positions"):
        check_fits(shape, 300, 1025)
    with pytest.raises(ConfigError, match="the tokenizer has 301 tokens and the model knows 300"):
        check_fits(shape, 301, 16)


def test_a_run_refuses_a_tokenizer_that_is_not_the_models(tmp_path: Path) -> None:
    model = build(
        config := ModelConfig(name="andrea-tiny", options={"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1}),
        shape_of(config, 270),
        1,
        None,
        tmp_path,
    )
    model.save_pretrained(tmp_path / "model")
    given = {"name": str(tmp_path / "model"), "options": {}}
    with pytest.raises(ConfigError, match="the tokenizer has 280 tokens and the model knows 270"):
        prepare(config_of(tmp_path, model=given))
    with pytest.raises(ConfigError, match=r"has no tokenizer: give data.tokenizer.path"):
        prepare(config_of(tmp_path, model=given, data={"tokenizer": None}))


def test_names_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model 'no/such-model': its config cannot be had"):
        prepare(config_of(tmp_path, model={"name": "no/such-model", "options": {}}))
    with pytest.raises(ConfigError, match=r"is a shape and has no tokenizer: give data.tokenizer.vocab_size"):
        prepare(config_of(tmp_path, data={"tokenizer": None}))
    with pytest.raises(ConfigError, match=r"model.options change the shape"):
        ModelConfig(name="some/model", options={"num_hidden_layers": 2})
