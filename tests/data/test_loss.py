import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen3NextConfig

from insitu.data.batch import IGNORE, collate
from insitu.data.chat import Example
from insitu.data.loss import example_loss, kl_to_reference, reference_logprobs, target_logits, target_logprobs

VOCAB, PAD = 61, 0
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    # Caps its logits behind the head, and its first layer sees only a window.
    "gemma2": Gemma2Config(**SIZES, sliding_window=4, final_logit_softcapping=2.0),
    # Positions are learned, and counted from the mask or not at all.
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


def make_model(name: str) -> Any:
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that tokens differ and attention is not flat
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise + (1.0 if parameter.ndim == 1 else 0.0))
    return model


def make_examples() -> list[Example]:
    """Different lengths; one target and many; a mask in two parts, as of a conversation; targets up to the last token."""
    generator = torch.Generator().manual_seed(1)
    masks = ["..........xxxx.", ".x", "....xx...xxx..", "......x", "." * 20 + "xxxxxxx"]
    return [
        Example(torch.randint(3, VOCAB, (len(mask),), generator=generator).tolist(), [letter == "x" for letter in mask])
        for mask in masks
    ]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


def oracle(model: Any, example: Example) -> list[Tensor]:
    """Float64 log-probabilities over the vocabulary at each target, from one plain unpadded forward pass."""
    logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
    return [logits[i - 1].log_softmax(-1) for i, target in enumerate(example.loss_mask) if target]


def chosen(model: Any, example: Example) -> list[Tensor]:
    tokens = [token for token, target in zip(example.input_ids, example.loss_mask, strict=True) if target]
    return [row[token] for row, token in zip(oracle(model, example), tokens, strict=True)]


def test_batch_is_padded_on_the_right_and_labelled_at_targets_only() -> None:
    batch = collate([Example([5, 6, 7], [False, True, True]), Example([8, 9], [False, True])], pad_token_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7], [IGNORE, 9, IGNORE]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    with pytest.raises(ValueError, match="examples is empty"):
        collate([], pad_token_id=0)


def test_padded_logprobs_equal_each_example_alone(model: Any) -> None:
    examples = make_examples()
    found = target_logprobs(model, collate(examples, PAD))
    assert [len(row) for row in found] == [sum(example.loss_mask) for example in examples]
    for row, example in zip(found, examples, strict=True):
        assert row.dtype == torch.float32
        assert not row.requires_grad
        expected = torch.stack(chosen(model, example)).float()
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


def test_loss_is_the_mean_over_target_tokens_and_so_is_its_gradient(model: Any) -> None:
    examples = make_examples()
    every = torch.stack([value for example in examples for value in chosen(model, example)])
    expected = torch.autograd.grad(-every.mean(), list(model.parameters()))
    loss = example_loss(model, collate(examples, PAD))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), -every.mean(), rtol=1e-5, atol=1e-5)
    for found, gradient in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(found, gradient.float(), rtol=1e-4, atol=1e-5)


def test_transformers_own_loss_agrees(model: Any) -> None:
    batch = collate(make_examples(), PAD)
    torch.testing.assert_close(example_loss(model, batch), model(**batch).loss, rtol=1e-5, atol=1e-5)


def test_the_head_runs_only_where_some_example_has_a_target() -> None:
    model = make_model("llama")
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: rows.append(inputs[0].shape[1]))
    target_logits(model, collate([Example([5] * 50, [False] * 47 + [True] * 3)], PAD))
    assert rows == [3]


def test_a_model_that_cannot_select_positions_gives_the_same() -> None:
    inner = make_model("llama")

    class Plain(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=inner(input_ids=input_ids, attention_mask=attention_mask).logits)

    batch = collate(make_examples(), PAD)
    torch.testing.assert_close(example_loss(Plain(), batch), example_loss(inner, batch), rtol=1e-6, atol=1e-6)


# --- freeze_context -----------------------------------------------------------------------------------------------------


def test_frozen_context_gives_the_same_loss(model: Any) -> None:
    batch = collate(make_examples(), PAD)
    frozen = example_loss(model, batch, freeze_context=True)
    torch.testing.assert_close(frozen, example_loss(model, batch), rtol=1e-5, atol=1e-5)


def test_frozen_context_has_the_gradient_of_detached_keys_and_values() -> None:
    model = make_model("llama")
    examples = make_examples()
    batch = collate(examples, PAD)
    parameters = list(model.parameters())
    found = torch.autograd.grad(example_loss(model, batch, freeze_context=True), parameters)
    plain = torch.autograd.grad(example_loss(model, batch), parameters)

    # The oracle: one ordinary padded pass in which keys and values before the last context token carry no gradient.
    context = torch.zeros(*batch["labels"].shape, 1, dtype=torch.bool)
    for row, example in enumerate(examples):
        context[row, : example.loss_mask.index(True) - 1] = True
    hooks = [
        projection.register_forward_hook(lambda _module, _inputs, output: torch.where(context, output.detach(), output))
        for layer in model.model.layers
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    ]
    expected = torch.autograd.grad(example_loss(model, batch), parameters)
    for hook in hooks:
        hook.remove()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    difference = sum(float((mine - other).norm()) for mine, other in zip(found, plain, strict=True))
    assert difference > 0.1, "without a difference the comparison above would prove nothing"


def test_frozen_context_refuses_gradient_checkpointing() -> None:
    """transformers would drop the keys and values of the context, and only log it."""
    model = make_model("llama")
    # Called activation_checkpointing_enable from transformers 5.23 on; the older name is still there and warns.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        example_loss(model, collate(make_examples(), PAD), freeze_context=True)


def test_frozen_context_refuses_recurrent_layers() -> None:
    config = Qwen3NextConfig(**SIZES, layer_types=["linear_attention", "full_attention"], num_experts=0)
    stand_in = SimpleNamespace(config=config, training=False)
    with pytest.raises(ValueError, match="recurrent"):
        example_loss(stand_in, collate(make_examples(), PAD), freeze_context=True)


# --- divergence from a reference ----------------------------------------------------------------------------------------


def test_kl_is_the_mean_over_targets_of_the_textbook_sum(model: Any) -> None:
    examples = make_examples()
    batch = collate(examples, PAD)
    rows = torch.stack([row for example in examples for row in oracle(model, example)])
    reference = torch.randn(rows.shape, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
    expected = (reference.double().exp() * (reference.double() - rows)).sum(-1).mean()
    found = kl_to_reference(model, batch, reference)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert found.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_to_itself_is_zero_and_so_is_its_gradient(model: Any, dtype: torch.dtype) -> None:
    batch = collate(make_examples(), PAD)
    reference = reference_logprobs(model, batch, dtype)
    assert reference.dtype == dtype
    assert reference.shape == (int((batch["labels"] != IGNORE).sum()), VOCAB)
    divergence = kl_to_reference(model, batch, reference)
    # bf16 keeps 8 bits: log-probabilities around -4 are off by up to 2^-7, their squares by 6e-5.
    tolerance = 1e-6 if dtype == torch.float32 else 2e-4
    assert -1e-6 < divergence.item() < tolerance
    gradients = torch.autograd.grad(divergence, list(model.parameters()), materialize_grads=True)
    far = torch.autograd.grad(example_loss(model, batch), list(model.parameters()), materialize_grads=True)
    norm, scale = (math.sqrt(sum(float(g.square().sum()) for g in each)) for each in (gradients, far))
    assert norm < 0.02 * scale


def test_a_reference_of_another_batch_is_refused() -> None:
    model = make_model("llama")
    batch = collate(make_examples(), PAD)
    with pytest.raises(ValueError, match=r"shape \(3, 61\); expected \(18, 61\)"):
        kl_to_reference(model, batch, torch.zeros(3, VOCAB))
