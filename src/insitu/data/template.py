"""What a chat template makes of a conversation: its text, its control tokens, and where each turn lies in it.

Where a turn begins and ends comes from the template's ``{% generation %}`` markers if it has them, else from rendering the
conversation up to the turn and up to its end. Either way one rule then decides: the text before the turn must encode to an
exact prefix of all the token ids. That is what the server feeds the model when it asks for the reply; if it does not hold,
training would teach a token sequence that is never served, and the example is refused.
"""

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from insitu.data.messages import DataError, Message, TooLongError

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
# transformers compiles a template once per process, and while it records generation markers any other rendering of that
# template adds its own. One rendering at a time.
_RENDERING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Control:
    """The tokens that make up the structure of a conversation, id -> text: ``special`` by the tokenizer's word,
    ``structural`` because the chat template writes them though the tokenizer calls them ordinary. ``unk`` stands apart:
    any unknown word encodes to it, so its id says nothing and only its text does."""

    special: dict[int, str]
    structural: dict[int, str]
    unk: str | None


@dataclass(frozen=True, slots=True)
class Span:
    """A turn in the rendered text, in characters. ``param`` is its field; ``marked`` if generation markers gave it."""

    start: int
    stop: int
    param: str
    marked: bool


def control_tokens(tokenizer: Any) -> Control:
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    structural = {}
    template = _template(tokenizer)
    for token, added in tokenizer.added_tokens_decoder.items():
        if added.special:
            special[token] = added.content
        elif added.content in template:
            structural[token] = added.content
    # Where unk is also the end token (GPT-2), it is that.
    unk = special.pop(tokenizer.unk_token_id, None) if tokenizer.unk_token_id != tokenizer.eos_token_id else None
    return Control(special, structural, unk)


def refuse_control_tokens(tokenizer: Any, turns: Sequence[Message], control: Control) -> None:
    """Refuse content that encodes to a control token: with ``<|im_start|>`` inside, two messages become five turns."""
    for i, turn in enumerate(turns):
        # `<think>` is a reply's own, and whoever teaches decides what the assistant says.
        refused = control.special if turn.role == "assistant" else control.special | control.structural
        found = [refused[token] for token in encode(tokenizer, turn.content) if token in refused]
        if control.unk is not None and control.unk in turn.content:
            found.append(control.unk)
        if found:
            raise DataError(
                f"messages[{i}].content contains the control token {found[0]!r}, which would change the turns of the "
                "conversation; remove it or spell it differently",
                f"messages[{i}].content",
            )


def _template(tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            "this model's tokenizer has no chat template: ask it through /v1/completions and teach it with context_ids and "
            "continuation_ids, or use a chat model",
            "messages",
        )
    template: str = tokenizer.get_chat_template()
    return template


def encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def render(tokenizer: Any, turns: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    return _render_marked(tokenizer, turns, markers=False, add_generation_prompt=add_generation_prompt)[0]


def _render_marked(
    tokenizer: Any, turns: Sequence[Message], *, markers: bool = True, add_generation_prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the character ranges inside the template's generation markers.

    What ``apply_chat_template`` does before it encodes. Its own mask of tokens is not used: where the last marked character
    has no token of its own (a tokenizer that drops newlines) it runs on to the end of the text.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        with _RENDERING:
            texts, marked = render_jinja_template(
                conversations=[[turn.for_template() for turn in turns]],
                chat_template=_template(tokenizer),
                return_assistant_tokens_mask=markers,
                add_generation_prompt=add_generation_prompt,
                **tokenizer.special_tokens_map,
            )
    except TemplateError as error:  # the template's own raise_exception, such as "roles must alternate"
        raise DataError(f"the model's chat template refuses these messages: {error}", "messages") from error
    return texts[0], list(marked[0]) if markers else []


def turn_spans(tokenizer: Any, turns: Sequence[Message], control: Control, max_length: int) -> tuple[str, list[Span]]:
    """The rendered conversation, and where in it the turns to be learned are."""
    has_markers = _GENERATION_MARKER.search(_template(tokenizer)) is not None
    text, marked = _render_marked(tokenizer, turns, markers=has_markers)
    # Before the turns are looked at one by one, which takes long in a long conversation.
    length = len(encode(tokenizer, text))
    if length > max_length:
        raise TooLongError(
            f"messages encodes to {length} tokens, {length - max_length} more than the context of {max_length}; shorten "
            "it or split the conversation",
            "messages",
        )
    if has_markers:
        return text, _marked_spans(text, marked, turns)
    return text, [_prefix_span(tokenizer, text, turns, i, control) for i, turn in enumerate(turns) if turn.train]


def _marked_spans(text: str, marked: list[tuple[int, int]], turns: Sequence[Message]) -> list[Span]:
    assistant = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    # A template may mark several parts of one turn, or none; a weight of 0 can be followed only where it marks one each.
    one_to_one = len(marked) == len(assistant) and all(
        turns[i].content.strip() in text[start:stop] for i, (start, stop) in zip(assistant, marked, strict=True)
    )
    if one_to_one:
        spans = [Span(*part, f"messages[{i}].content", marked=True) for i, part in zip(assistant, marked, strict=True)]
        return [span for i, span in zip(assistant, spans, strict=True) if turns[i].train]
    if all(turns[i].train for i in assistant):
        return [Span(*part, "messages", marked=True) for part in marked]
    raise DataError(
        f"the chat template's {len(marked)} generation markers do not match {len(assistant)} assistant turns one to one, "
        "so weight 0 cannot be followed; send the conversation up to the turn to be learned, without weights",
        "messages",
    )


def _prefix_span(tokenizer: Any, text: str, turns: Sequence[Message], i: int, control: Control) -> Span:
    where = f"messages[{i}]"
    if i == 0:
        raise DataError(f"{where} is an assistant turn with nothing before it; put a user message first", where)
    before = render(tokenizer, turns[:i], add_generation_prompt=True)
    upto = render(tokenizer, turns[: i + 1])
    if not (text.startswith(upto) and upto.startswith(before) and len(before) < len(upto)):
        raise DataError(
            f"{where}: the chat template writes this turn differently when the reply is asked for than in the whole "
            "conversation, so its tokens cannot be told apart; give it weight 0 and teach the last turn only",
            where,
        )
    reply = encode(tokenizer, upto[len(before) :])
    if before == render(tokenizer, turns[:i]) and reply[:1] and reply[0] in control.special | control.structural:
        raise DataError(
            f"{where}: the chat template has no generation prompt (add_generation_prompt changes nothing), so the header "
            "of the turn cannot be told from the reply; add one to the template, or generation markers",
            where,
        )
    return Span(len(before), len(upto), f"{where}.content", marked=False)


def token_span(tokenizer: Any, text: str, input_ids: list[int], span: Span, control: Control) -> tuple[int, int]:
    """The tokens of a turn, from the reply's first to the one that ends the turn."""
    before = encode(tokenizer, text[: span.start])
    upto = encode(tokenizer, text[: span.stop])
    if input_ids[: len(before)] != before or input_ids[: len(upto)] != upto:
        raise DataError(
            f"{span.param}: the first or last characters of the reply merge with the chat template's into one token, which "
            "the model never sees when it is asked for the reply; remove white space at the ends of content",
            span.param,
        )
    return len(before), _end_of_turn(tokenizer, input_ids, len(before), len(upto), span, control)


def _end_of_turn(tokenizer: Any, input_ids: list[int], start: int, stop: int, span: Span, control: Control) -> int:
    """Where the targets stop: just behind the control token that ends the turn, if the template writes one."""
    ends = [i for i in range(start, stop) if input_ids[i] in control.special or input_ids[i] in control.structural]
    # The template writes a newline behind the end token; the model never does.
    closed = bool(ends) and not tokenizer.decode(input_ids[ends[-1] + 1 : stop]).strip()
    if closed and input_ids[ends[-1]] in control.special:
        return ends[-1] + 1
    if span.marked and start < stop < len(input_ids) and input_ids[stop] in control.special:
        return stop + 1  # markers that leave the end token out: a model trained so would never learn to stop
    return ends[-1] + 1 if closed else stop
