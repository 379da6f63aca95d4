"""Chat messages as a person writes them: their shape, checked before any tokenizer sees them.

A message is ``{"role": ..., "content": ...}``. An assistant message may carry a ``weight`` of 0 or 1, as in OpenAI's
fine-tuning files: 0 keeps the turn as context and takes no loss on it. Loads neither torch nor transformers, so the command
line can check a file before it starts anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as short

ROLES = ("system", "user", "assistant", "tool")
# `weight` is OpenAI's word; the others are read because files written for axolotl and verl use them.
WEIGHT_KEYS = ("weight", "train", "trainable", "loss_mask")


class DataError(ValueError):
    """An example that cannot be learned from. ``param`` is the field at fault, such as ``messages[2].role``."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class TooLongError(DataError):
    """An example of more tokens than the model's context; there is nothing else wrong with it."""


@dataclass(frozen=True, slots=True)
class Message:
    """One checked message; ``train`` says whether its tokens are targets (only an assistant's can be)."""

    role: str
    content: str
    train: bool = False

    def for_template(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


def check_messages(messages: object) -> list[Message]:
    """Read messages, or raise :class:`DataError` naming the first field that is wrong."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise DataError(f"messages is {type(messages).__name__}; expected a list of {{role, content}}", "messages")
    if not messages:
        raise DataError("messages is empty; expected at least one message", "messages")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def check_example(messages: object) -> list[Message]:
    """Like :func:`check_messages`, and there must be something to learn: an assistant turn with weight 1."""
    checked = check_messages(messages)
    if not any(message.role == "assistant" for message in checked):
        raise DataError("messages has no assistant turn; add the reply that is to be learned", "messages")
    if not any(message.train for message in checked):
        raise DataError(
            "every assistant turn in messages has weight 0; give the one to be learned weight 1", "messages"
        )
    return checked


def _check_message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is {short(message)}; expected an object with role and content", where)
    for key in ("role", "content"):
        if key not in message:
            raise DataError(f"{where} has no {key}; expected role and content", f"{where}.{key}")
    unknown = [key for key in message if key not in ("role", "content", *WEIGHT_KEYS)]
    if unknown:
        raise DataError(
            f"{where}.{unknown[0]} is not supported; a message has role, content and, for an assistant, weight",
            f"{where}.{unknown[0]}",
        )
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise DataError(f"{where}.role={short(role)} is unknown; expected one of {', '.join(ROLES)}", f"{where}.role")
    if not isinstance(content, str):
        raise DataError(f"{where}.content is {type(content).__name__}; expected a string", f"{where}.content")
    try:
        content.encode()
    except UnicodeEncodeError as error:  # half of a \ud83d\ude00 pair: valid JSON, but no tokenizer can read it
        raise DataError(f"{where}.content is not valid Unicode: {error.reason}", f"{where}.content") from None
    return Message(role, content, _read_weight(message, role, where))


def _read_weight(message: Mapping[object, object], role: str, where: str) -> bool:
    given = [key for key in WEIGHT_KEYS if message.get(key) is not None]
    if not given:
        return role == "assistant"
    if len(given) > 1:
        raise DataError(f"{where} has both {given[0]} and {given[1]}; keep one", f"{where}.{given[1]}")
    (key,) = given
    value = message[key]
    # Not `in (0, 1)` alone: a tensor or a string must be refused, and 1.0 is what some exporters write.
    if not isinstance(value, int | float) or value not in (0, 1):
        raise DataError(f"{where}.{key}={short(value)}; expected 0 or 1", f"{where}.{key}")
    if value and role != "assistant":
        raise DataError(
            f"{where}.{key}=1 on a {role} message; only assistant turns are learned, so remove it", f"{where}.{key}"
        )
    return bool(value)
