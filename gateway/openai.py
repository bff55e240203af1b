"""Bodies of OpenAI's API: what clients send, checked. Every refusal is an ApiError that names the field.

Unknown fields are ignored and null means "not given". What would change the answer and is not served is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from gateway.errors import ApiError, bad_request

DEFAULT_COMPLETION_TOKENS = 16
MAX_CHOICES = 256
_MAX_STOPS = 16
_MAX_STOP_CHARS = 1024

_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
_Natural = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
_Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
_Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]
_NumTop = Annotated[int, msgspec.Meta(ge=0, le=20)]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints take."""

    model: Annotated[str, msgspec.Meta(min_length=1)]
    max_tokens: _Positive | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: _Probability | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    stop: str | list[str] | None = None
    seed: _Int64 | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Extensions that load generators use.
    ignore_eos: bool | None = None
    min_tokens: _Natural | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=2**31)] | None = None
    min_p: _Probability | None = None
    stop_token_ids: list[_Natural] | None = None
    return_token_ids: bool | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=100)] | None = None
    logit_bias: Annotated[dict[str, _Bias], msgspec.Meta(max_length=4096)] | None = None
    prompt_logprobs: _NumTop | None = None
    include_stop_str_in_output: bool | None = None
    priority: _Int64 | None = None
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    # Known, and refused unless neutral.
    structured_outputs: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    truncate_prompt_tokens: Any = None
    skip_special_tokens: bool | None = None
    use_beam_search: Any = None

    @property
    def num_samples(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    name: Annotated[str, msgspec.Meta(min_length=1)]
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatBody(GenerationBody, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    max_completion_tokens: _Positive | None = None
    logprobs: bool | None = None
    top_logprobs: _NumTop | None = None
    tools: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1, max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    chat_template: Any = None
    add_generation_prompt: Any = None
    continue_final_message: Any = None
    echo: Any = None
    best_of: Any = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def num_top_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionBody(GenerationBody, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any]
    max_tokens: _Natural | None = None
    logprobs: _NumTop | None = None
    echo: bool | None = None
    best_of: Annotated[int, msgspec.Meta(ge=1, le=20)] | None = None
    suffix: str | None = None
    prompt_embeds: Any = None
    add_special_tokens: bool | None = None

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def wanted_tokens(self) -> int:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens


_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "structured_outputs": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True,),
    "use_beam_search": (False,),
}
"""Values that leave the answer as it is, beside null, of fields that are not served."""
_NEUTRAL_CHAT: Mapping[str, tuple[Any, ...]] = {
    **_NEUTRAL,
    "functions": (),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "chat_template": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "echo": (False,),
    "best_of": (1,),
}
_NEUTRAL_COMPLETION: Mapping[str, tuple[Any, ...]] = {**_NEUTRAL, "suffix": ("",), "prompt_embeds": ()}

_Body = TypeVar("_Body", ChatBody, CompletionBody)
_Decoded = TypeVar("_Decoded")
_AT = re.compile(r" - at `(?:key in )?\$(?:\.\.\.)?\.?([^`]*)`$")
_MISSING = re.compile(r"missing required field `([^`]+)`")


def parse(data: bytes, type_: type[_Body]) -> _Body:
    """Decode and check a request body. Raises ApiError (400) naming the field."""
    body = decode(data, type_)
    _check_served(body)
    _check_generation(body)
    return body


def decode(data: bytes, type_: type[_Decoded]) -> _Decoded:
    """A JSON body as `type_`. Raises ApiError (400) naming the field."""
    try:
        return msgspec.json.decode(data, type=type_)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"The body is not valid JSON: {error}"[:300]) from error
    except RecursionError as error:
        raise bad_request("The body is not valid JSON: it is nested too deeply") from error


def _invalid(message: str) -> ApiError:
    """400 from a decoder's message, which ends with the path of the field."""
    path = _AT.search(message)
    missing = _MISSING.search(message)
    param = path.group(1) if path else ""
    if missing:
        param = f"{param}.{missing.group(1)}".lstrip(".")
    text = message[: path.start()] if path else message
    return bad_request(f"Invalid {param or 'body'}: {text[:300]}", param or None)


def _check_served(body: GenerationBody) -> None:
    for name, neutral in (_NEUTRAL_CHAT if isinstance(body, ChatBody) else _NEUTRAL_COMPLETION).items():
        value = getattr(body, name)
        if value is None:
            continue
        # `0` of an int field and `False` of a bool field are different things and equal in Python.
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
            raise bad_request(f"{name} is not served (given {repr(value)[:60]})", name)


def _check_generation(body: GenerationBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream: true", "stream_options")
    if len(body.stops) > _MAX_STOPS:
        raise bad_request(f"stop must have at most {_MAX_STOPS} strings", "stop")
    if any(not 1 <= len(stop) <= _MAX_STOP_CHARS for stop in body.stops):
        raise bad_request(f"stop strings must have 1 to {_MAX_STOP_CHARS} characters", "stop")
    if body.prompt_logprobs is not None and body.stream:
        raise bad_request("prompt_logprobs needs stream: false", "prompt_logprobs")
    if isinstance(body, ChatBody):
        _check_chat(body)
    elif isinstance(body, CompletionBody):
        _check_completion(body)


def _check_chat(body: ChatBody) -> None:
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")


def _check_completion(body: CompletionBody) -> None:
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens must be at least 1 without echo", "max_tokens")
    if body.best_of is None:
        return
    if body.best_of < body.num_samples:
        raise bad_request(f"best_of must not be less than n ({body.num_samples})", "best_of")
    if body.best_of > body.num_samples and body.stream:
        raise bad_request("best_of greater than n cannot be streamed", "best_of")
