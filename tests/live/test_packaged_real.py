"""The packaged model as it lies in the cache: bf16, complete, and it holds a conversation."""

from pathlib import Path

import pytest
from stand_ins import never

from insitu.live.packaged import cached_smollm2
from insitu.live.source import resolve


@pytest.fixture(scope="module")
def smollm2() -> Path:
    model = cached_smollm2()
    if model is None:
        pytest.skip(
            "needs SmolLM2-135M-Instruct in the cache (93 MB, no network in tests): `insitu serve smollm2` once"
        )
    return model


@pytest.mark.real
def test_the_real_model_is_bf16_and_complete(smollm2: Path) -> None:
    from safetensors import safe_open
    from transformers import GenerationConfig

    assert resolve("smollm2", ask=never) == resolve(str(smollm2)) == smollm2
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    generation = GenerationConfig.from_pretrained(smollm2)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)


@pytest.mark.real
def test_the_real_model_chats(smollm2: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from insitu.data.chat import encode_messages, encode_prompt

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.model_max_length == 8192
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = encode_prompt(tokenizer, question)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    output = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
    assert output[-1] == 2, "it ends its turn by itself"
    reply = tokenizer.decode(output, skip_special_tokens=True)
    assert "Paris" in reply
    # What it said is, token for token, what it would be taught to say.
    example = encode_messages(tokenizer, [*question, {"role": "assistant", "content": reply}], max_length=8192)
    assert [token for token, target in zip(example.input_ids, example.loss_mask, strict=True) if target] == output
