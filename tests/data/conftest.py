"""A byte-level tokenizer made on the spot, and chat templates of the kinds that models ship."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _marked(end_inside: str, end_outside: str) -> str:
    """ChatML with generation markers; what ends a turn stands inside the marked part, outside, or in both."""
    return (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        "{% generation %}{{ message['content'] + '" + end_inside + "' }}{% endgeneration %}{{ '" + end_outside + "' }}"
        "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


# Like Qwen3: a reply's <think> block is written while it is the last message and dropped once it is history.
_THINKING = (
    "{% for message in messages %}{% set text = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Like Mistral: no generation prompt, because the reply follows the user's turn directly.
_INSTRUCT = (
    "{{ '<|endoftext|>' }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + '<|im_end|>' }}{% else %}{{ raise_exception('only user and assistant') }}{% endif %}"
    "{% endfor %}"
)

_TEXT = [
    "The capital of France is Paris.\n\nAnd the capital of Italy is Rome.\n",
    "What is the answer?  It is 42, said the computer; nobody asked why.\n\n\n",
    "system user assistant tool think\n  \n <think> </think> [INST] [/INST]",
]


def _train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _TEXT * 4,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return tokenizer


TEMPLATES = {
    "chatml": _CHATML,
    "marked": _marked("<|im_end|>", "\\n"),
    "marked, end outside": _marked("", "<|im_end|>\\n"),
    "marked, newline inside": _marked("<|im_end|>\\n", ""),
    "marked, no newline": _marked("<|im_end|>", ""),
    "marked, end outside, no newline": _marked("", "<|im_end|>"),
    "thinking": _THINKING,
    "instruct": _INSTRUCT,
}


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    return TEMPLATES


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[str | None], Any]:
    """Make a tokenizer with a chat template, given by its name in TEMPLATES or in full."""
    trained = _train()

    def make(template: str | None) -> Any:
        return PreTrainedTokenizerFast(
            tokenizer_object=trained,
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            chat_template=TEMPLATES.get(template, template) if template else None,
        )

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer("chatml")


@pytest.fixture(scope="session")
def run_python() -> Callable[[str], None]:
    """Run code in a fresh interpreter; it must exit 0."""

    def run(code: str) -> None:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    return run
