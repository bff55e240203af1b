"""Bodies of OpenAI's API: what clients send, checked. Every refusal is an ApiError that names the field.

Unknown fields are ignored and null means "not given". What would change the answer and is not served is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from engine.protocol import SamplingParams
from gateway.errors import ApiError, bad_request, context_length_exceeded

DEFAULT_COMPLETION_TOKENS = 16
MAX_CHOICES = 256
_MAX_STOPS = 16
_MAX_STOP_CHARS = 1024

_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
_Natural = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
_Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]


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
    # Known, and refused unless neutral.
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)] | None = None
    logit_bias: dict[str, Any] | None = None
    logprobs: Any = None
    top_logprobs: Any = None
    response_format: dict[str, Any] | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    truncate_prompt_tokens: Any = None
    skip_special_tokens: bool | None = None

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


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: Any = None


class ChatBody(GenerationBody, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    max_completion_tokens: _Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None


class CompletionBody(GenerationBody, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: _Positive | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "include_stop_str_in_output": (False,),
    "prompt_logprobs": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True,),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "functions": (),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "echo": (False,),
    "suffix": ("",),
}
"""Values that leave the answer as it is, beside null, of fields that are not served."""

_Body = TypeVar("_Body", ChatBody, CompletionBody)
_AT = re.compile(r" - at `(?:key in )?\$(?:\.\.\.)?\.?([^`]*)`$")
_MISSING = re.compile(r"missing required field `([^`]+)`")


def parse(data: bytes, type_: type[_Body]) -> _Body:
    """Decode and check a request body. Raises ApiError (400) naming the field."""
    try:
        body = msgspec.json.decode(data, type=type_)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"The body is not valid JSON: {error}"[:300]) from error
    except RecursionError as error:
        raise bad_request("The body is not valid JSON: it is nested too deeply") from error
    _check_served(body)
    _check_generation(body)
    return body


def sampling_params(
    body: GenerationBody,
    *,
    max_tokens: int | None,
    num_prompt_tokens: int,
    max_model_len: int,
    seed: int,
    eos_token_ids: list[int],
    prompt_param: str,
) -> SamplingParams:
    """The engine's parameters for a prompt; `max_tokens` None means what is left of the context.

    Raises ApiError (400, context_length_exceeded) if prompt and answer do not fit.
    """
    room = max_model_len - num_prompt_tokens
    if room < 1 or (max_tokens or 0) > room:
        wanted = f" and {max_tokens} for the answer" if max_tokens else ""
        raise context_length_exceeded(
            f"This model's context is {max_model_len} tokens; the request has {num_prompt_tokens} tokens in "
            f"the {prompt_param}{wanted}.",
            prompt_param,
        )
    num_max = max_tokens or room
    if (body.min_tokens or 0) > num_max:
        raise bad_request(f"min_tokens must not exceed max_tokens ({num_max})", "min_tokens")
    return SamplingParams(
        max_tokens=num_max,
        min_tokens=body.min_tokens or 0,
        temperature=1.0 if body.temperature is None else body.temperature,
        # No probability mass at all leaves the likeliest token, and the engine wants more than nothing.
        top_p=1.0 if body.top_p is None else max(body.top_p, 1e-9),
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        seed=seed,
        ignore_eos=bool(body.ignore_eos),
        eos_token_ids=eos_token_ids,
        stop_token_ids=list(body.stop_token_ids or []),
    )


def template_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates want them: text joined, developer = system. Raises ApiError (400)."""
    return [_template_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def prompts_of(prompt: str | list[Any], vocab_size: int) -> list[str | list[int]]:
    """The prompts of a completion: one or many, text or ids. Raises ApiError (400) for anything else."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise bad_request("prompt must not be empty", "prompt")
    if all(isinstance(item, str) for item in prompt):
        return list(prompt)
    if all(type(item) is int for item in prompt):
        return [_checked_ids(prompt, "prompt", vocab_size)]
    if all(isinstance(item, list) for item in prompt):
        return [_checked_ids(item, f"prompt[{i}]", vocab_size) for i, item in enumerate(prompt)]
    raise bad_request("prompt must be a string, a list of strings, of ids, or of lists of ids", "prompt")


def _template_message(message: ChatMessage, at: str) -> dict[str, Any]:
    if message.role == "tool" or message.tool_calls:
        raise bad_request("tool calls are not served", f"{at}.tool_calls" if message.tool_calls else f"{at}.role")
    if message.content is None:
        raise bad_request(f"{at}.content is required", f"{at}.content")
    content = message.content
    text = content if isinstance(content, str) else _joined_parts(content, f"{at}.content")
    role = "system" if message.role == "developer" else message.role
    named = {"name": message.name} if message.name is not None else {}
    return {"role": role, "content": text, **named}


def _joined_parts(parts: list[dict[str, Any]], at: str) -> str:
    if not parts:
        raise bad_request(f"{at} must not be an empty list", at)
    for i, part in enumerate(parts):
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            message = f'{at}[{i}] must be {{"type": "text", "text": string}}: the model reads text only'
            raise bad_request(message, f"{at}[{i}]")
    return "".join(part["text"] for part in parts)


def _checked_ids(ids: list[Any], at: str, vocab_size: int) -> list[int]:
    if not ids:
        raise bad_request(f"{at} must not be empty", "prompt")
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise bad_request(
                f"{at} must hold token ids from 0 to {vocab_size - 1}, not {repr(token_id)[:40]}", "prompt"
            )
    return ids


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
    for name, neutral in _NEUTRAL.items():
        value = getattr(body, name, None)
        # `0` of an int field and `False` of a bool field are different things and equal in Python.
        same = any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)
        if value is not None and not same:
            raise bad_request(f"{name} is not served (given {repr(value)[:60]})", name)
    if isinstance(body, CompletionBody) and body.best_of not in (None, body.num_samples):
        raise bad_request("best_of other than n is not served", "best_of")


def _check_generation(body: GenerationBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream: true", "stream_options")
    if len(body.stops) > _MAX_STOPS:
        raise bad_request(f"stop must have at most {_MAX_STOPS} strings", "stop")
    if any(not 1 <= len(stop) <= _MAX_STOP_CHARS for stop in body.stops):
        raise bad_request(f"stop strings must have 1 to {_MAX_STOP_CHARS} characters", "stop")
