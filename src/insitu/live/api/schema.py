"""Request bodies, in OpenAI's words. A parameter is served, or has a neutral value that changes nothing, or is refused by
name: an option that is silently ignored is a wrong answer.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair is valid JSON, and nothing behind here can take it
        raise PydanticCustomError("unicode", "the text is not valid Unicode") from None
    return text


def _only(*neutral: Any) -> BeforeValidator:
    """A parameter of OpenAI's that is not served: null and the values that mean "off" pass, since clients send them."""

    def check(value: Any) -> Any:
        # By type too, because True == 1 and 0 == False.
        if value is None or any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in neutral):
            return value
        hint = "".join(f" or send {json.dumps(off)}" for off in neutral)
        raise PydanticCustomError("unsupported", "this is not supported; leave it out{hint}", {"hint": hint})

    return BeforeValidator(check)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Text = Annotated[str, AfterValidator(_unicode)]
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$")]
Ids = Annotated[list[int], Field(fail_fast=True)]  # else a wrong list of a million makes a million errors
Stop = Annotated[Text, Field(min_length=1, max_length=1000)]
Stops = Annotated[
    Annotated[list[Stop], Field(max_length=4, fail_fast=True)] | None,
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
]
Ignored = Annotated[Any, Field(description="Accepted; defined to have no effect on the answer.")]


class TextPart(_Body):
    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[TextPart], Field(fail_fast=True)]


def as_text(content: Content) -> str:
    """Parts are joined as they are: a client that splits a text does not mean a break."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    # What the openai client sends back when it repeats an answer.
    name: Annotated[Any, _only()] = None
    refusal: Annotated[Any, _only()] = None
    audio: Annotated[Any, _only()] = None
    tool_calls: Annotated[Any, _only([])] = None
    function_call: Annotated[Any, _only()] = None
    annotations: Annotated[Any, _only([])] = None

    def plain(self) -> dict[str, Any]:
        """``developer`` is OpenAI's newer name for ``system``, and the only one of the two that chat templates lack."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": as_text(self.content)}


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, _only(False)] = None


class _Sampling(_Body):
    """What chat and text completions share."""

    model: Text
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Ignored = None

    n: Annotated[Any, _only(1)] = None
    presence_penalty: Annotated[Any, _only(0)] = None
    frequency_penalty: Annotated[Any, _only(0)] = None
    logit_bias: Annotated[Any, _only({})] = None


class ChatRequest(_Sampling):
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    metadata: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    store: Annotated[Any, _only(False)] = None
    service_tier: Annotated[Any, _only("auto", "default")] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    modalities: Annotated[Any, _only(["text"])] = None
    tools: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none")] = None
    functions: Annotated[Any, _only([])] = None
    function_call: Annotated[Any, _only("none")] = None
    parallel_tool_calls: Annotated[Any, _only()] = None
    reasoning_effort: Annotated[Any, _only("none")] = None
    verbosity: Annotated[Any, _only()] = None
    prediction: Annotated[Any, _only()] = None
    audio: Annotated[Any, _only()] = None
    web_search_options: Annotated[Any, _only()] = None


class CompletionRequest(_Sampling):
    prompt: Text | Ids | Annotated[list[Text], Field(fail_fast=True)] | Annotated[list[Ids], Field(fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    best_of: Annotated[Any, _only(1)] = None
    suffix: Annotated[Any, _only("")] = None


class LearnMessage(_Body):
    """Any role and weight pass here: what cannot be learned from is a 422, not a malformed body."""

    role: Any
    content: Content
    # The names that insitu.data.messages reads.
    weight: Any = None
    train: Any = None
    trainable: Any = None
    loss_mask: Any = None

    def plain(self) -> dict[str, Any]:
        role = "system" if self.role == "developer" else self.role
        return {**self.model_dump(exclude_none=True), "role": role, "content": as_text(self.content)}


class Correction(_Body):
    role: Literal["assistant"]
    content: Content


class FeedbackRequest(_Body):
    id: Id | None = None
    messages: Annotated[list[LearnMessage], Field(fail_fast=True)] | None = None
    completion_id: Text | None = None
    correction: Text | Correction | None = None
    context_ids: Ids | None = None
    continuation_ids: Ids | None = None
    freeze_context: bool | None = None
    hold: bool | None = None


class Nothing(_Body):
    """Nothing to say: it is in the path."""


def as_list(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """OpenAI's shape of a page: the next one is asked for with ``after=last_id``."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}


class CanaryRequest(_Body):
    prompt: Text
