"""Chat examples to tokens and a loss mask, through the tokenizer's own chat template.

The targets of an assistant turn are its content and the token that ends the turn; what surrounds them (the header before,
the newline after) is written by the template and never by the model, so it is no target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from insitu.data import template
from insitu.data.jsonl import read_jsonl
from insitu.data.messages import DataError, TooLongError, check_example, check_messages

__all__ = [
    "DataError",
    "Example",
    "encode_continuation",
    "encode_messages",
    "encode_prompt",
    "encode_question",
    "read_jsonl",
]


@dataclass(frozen=True, slots=True)
class Example:
    """One example: ``loss_mask[i]`` is True where token i is a target. ``freeze_context`` runs the tokens before the first
    target without gradient, so the update changes how the model answers and not how it reads."""

    input_ids: list[int]
    loss_mask: list[bool]
    freeze_context: bool = False

    def __post_init__(self) -> None:
        assert len(self.input_ids) == len(self.loss_mask)
        assert any(self.loss_mask)
        assert not self.loss_mask[0], "the first token has nothing before it to be predicted from"


def encode_messages(
    tokenizer: Any,
    messages: Sequence[Any],
    *,
    max_length: int,
    train: Sequence[bool] | None = None,
    freeze_context: bool = False,
) -> Example:
    """Encode a conversation; its assistant turns of weight 1 are the targets.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: ``{"role", "content"}`` and, for an assistant, ``weight`` 0 or 1 (default 1).
        max_length: the model's context, in tokens.
        train: one flag per message, in place of the weights (a correction trains only the last turn).
        freeze_context: stored in the example.

    Raises:
        DataError: with ``param`` naming the field.
    """
    if train is not None:
        messages = _with_weights(messages, train)
    turns = check_example(messages)
    control = template.control_tokens(tokenizer)
    template.refuse_control_tokens(tokenizer, turns, control)
    text, spans = template.turn_spans(tokenizer, turns, control, max_length)
    input_ids = template.encode(tokenizer, text)
    loss_mask = [False] * len(input_ids)
    for span in spans:
        first, last = template.token_span(tokenizer, text, input_ids, span, control)
        loss_mask[first:last] = [True] * (last - first)
    if not any(loss_mask):
        raise DataError("the chat template left no token of any assistant turn to learn", "messages")
    if loss_mask[0]:
        raise DataError("the reply is the first token, with nothing before it; put a user message first", "messages")
    return Example(input_ids, loss_mask, freeze_context)


def encode_prompt(tokenizer: Any, messages: Sequence[Any]) -> list[int]:
    """Token ids that ask the model for the next assistant turn: what serving feeds it, and what training conditions on."""
    turns = check_messages(messages)
    template.refuse_control_tokens(tokenizer, turns, template.control_tokens(tokenizer))
    return template.encode(tokenizer, template.render(tokenizer, turns, add_generation_prompt=True))


def encode_question(tokenizer: Any, text: str) -> list[int]:
    """Token ids that put ``text`` to the model: as a user's turn; where there is no chat template, as text to go on from.

    Raises:
        DataError: it contains a control token of the template, or encodes to no token.
    """
    if tokenizer.chat_template:
        return encode_prompt(tokenizer, [{"role": "user", "content": text}])
    ids: list[int] = tokenizer(text)["input_ids"]  # with what the tokenizer puts before a text
    if not ids:
        raise DataError(f"{text!r} encodes to no token; give a text with a word in it")
    return ids


def encode_continuation(
    context_ids: Sequence[int],
    continuation_ids: Sequence[int],
    *,
    vocab_size: int,
    max_length: int,
    freeze_context: bool = False,
) -> Example:
    """An example of raw token ids: ``continuation_ids`` are the targets, ``context_ids`` what they follow."""
    for name, ids in (("context_ids", context_ids), ("continuation_ids", continuation_ids)):
        if isinstance(ids, str | bytes) or not isinstance(ids, Sequence):
            raise DataError(f"{name} is {type(ids).__name__}; expected a list of token ids", name)
        for i, token in enumerate(ids):
            # bool is an int in Python and `true` in JSON: never a token id.
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise DataError(
                    f"{name}[{i}]={token!r} is no token id; expected an integer from 0 to {vocab_size - 1}",
                    f"{name}[{i}]",
                )
    if not context_ids:
        raise DataError("context_ids is empty; the first target needs a token before it, such as BOS", "context_ids")
    if not continuation_ids:
        raise DataError("continuation_ids is empty; there is nothing to learn", "continuation_ids")
    length = len(context_ids) + len(continuation_ids)
    if length > max_length:
        raise TooLongError(
            f"context_ids and continuation_ids are {length} tokens, {length - max_length} more than the context of "
            f"{max_length}; drop tokens from the start of context_ids",
            "context_ids",
        )
    mask = [False] * len(context_ids) + [True] * len(continuation_ids)
    return Example([*context_ids, *continuation_ids], mask, freeze_context)


def _with_weights(messages: Sequence[Any], train: Sequence[bool]) -> list[Any]:
    turns = check_messages(messages)
    if len(train) != len(turns):
        raise ValueError(f"train has {len(train)} flags for {len(turns)} messages; expected one per message")
    return [{**turn.for_template(), "weight": int(flag)} for turn, flag in zip(turns, train, strict=True)]
