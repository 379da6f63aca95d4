"""A checkpoint directory made on the spot: a random Llama of two layers with a chat tokenizer that can spell any text."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from insitu.data.chat import Example
from insitu.live import canaries
from insitu.live.checkpoint import checkpoint_files, read
from insitu.live.weights import attach
from insitu.live.weights.arena import Arena

CONTEXT = 256
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TEXT = ["user\n", "assistant\n", "system\n", "the capital of", "what is the"]
_VOCABULARY = 240


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: a token for each byte of UTF-8 text (control characters left out), and a few common pieces."""
    # Bytes and the letters that stand for them; 0xC0, 0xC1 and 0xF5 up occur in no UTF-8 text.
    useful = [b for b in range(256) if (b >= 32 or b in b"\n\t") and b not in (127, 0xC0, 0xC1) and b < 0xF5]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = [_letter(b) for b in useful]
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHATML,
        model_max_length=CONTEXT,
    )


def tiny_config(*, tied: bool = True, intermediate_size: int = 96) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        # Wide enough that the context decides: with the default the logits hardly differ from one another.
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def make_tiny(
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = True,
    intermediate_size: int = 96,
) -> Path:
    """Write config, safetensors and tokenizer as ``save_pretrained`` does, and return ``directory``. Same seed, same bytes.

    ``TeachConfig(learning_rate=3e-3)`` teaches it eight short examples in about ten steps, with a canary KL of about 0.2.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_config(tied=tied, intermediate_size=intermediate_size)).to(dtype)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def on_arena(directory: Path, *, dtype: torch.dtype = torch.bfloat16, requires_grad: bool = False) -> tuple[Arena, Any]:
    """The checkpoint in an arena, and the model on views of it: what the server process and the learner process hold."""
    skeleton = attach.skeleton(directory, dtype)
    arena = Arena.create(attach.layout(skeleton))
    attach.fill(arena.views(), read(checkpoint_files(directory)), attach.tied(skeleton))
    return arena, attach.build(directory, arena, requires_grad=requires_grad)


def frozen(model: Any, said: Sequence[Example], version: int = 0) -> list[canaries.Frozen]:
    """Canaries that the model continued with ``said``, named canary-0, canary-1, ..., as they are now."""
    asked = {f"canary-{i}": f"prompt {i}" for i in range(len(said))}
    return canaries.freeze(model, asked, said, version, 0)


def _letter(byte: int) -> str:
    """The character by which byte-level tokenizers write this byte."""
    if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
        return chr(byte)
    rest = [b for b in range(256) if not (33 <= b <= 126 or 161 <= b <= 172 or b >= 174)]
    return chr(256 + rest.index(byte))
