"""Messages and prompts of clients, as the model's template and tokenizer want them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gateway.core.tools.definitions import arguments_value
from gateway.core.tools.formats import ToolFormat
from gateway.errors import bad_request
from gateway.openai import MAX_CHOICES, ChatMessage, ToolCall


def template_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates want them: text joined, developer = system. Raises ApiError (400)."""
    return [_template_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def prompts_of(prompt: str | list[Any], vocab_size: int) -> list[str | list[int]]:
    """The prompts of a completion: one or many, text or ids. Raises ApiError (400) for anything else."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise bad_request("prompt must not be empty", "prompt")
    if all(type(item) is int for item in prompt):
        return [checked_ids(prompt, "prompt", vocab_size)]
    if len(prompt) > MAX_CHOICES:
        raise bad_request(f"prompt must be at most {MAX_CHOICES} prompts, not {len(prompt)}", "prompt")
    if all(isinstance(item, str) for item in prompt):
        return list(prompt)
    if all(isinstance(item, list) for item in prompt):
        return [checked_ids(item, f"prompt[{i}]", vocab_size) for i, item in enumerate(prompt)]
    raise bad_request("prompt must be a string, a list of strings, of ids, or of lists of ids", "prompt")


def without_tools(
    messages: Sequence[Mapping[str, Any]], form: ToolFormat, tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """The same conversation for a template that does not know tools: all of them as plain text."""
    plain = [_plain_message(message, form) for message in messages]
    if not tools:
        return plain
    preamble = form.preamble(tools)
    if plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{preamble}"}, *plain[1:]]
    return [{"role": "system", "content": preamble}, *plain]


def _plain_message(message: Mapping[str, Any], form: ToolFormat) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    text = form.render_calls([call["function"] for call in calls])
    return {"role": message["role"], "content": f"{message['content']}\n{text}".lstrip()}


def _template_message(message: ChatMessage, at: str) -> dict[str, Any]:
    content = message.content
    if content is None and not message.tool_calls:
        raise bad_request(f"{at}.content is required", f"{at}.content")
    if message.tool_calls and message.role != "assistant":
        raise bad_request(f"{at}.tool_calls: only the assistant calls tools", f"{at}.tool_calls")
    if message.role == "tool" and message.tool_call_id is None:
        raise bad_request(f"{at}.tool_call_id is required", f"{at}.tool_call_id")
    text = _joined_parts(content, f"{at}.content") if isinstance(content, list) else content or ""
    given: dict[str, Any] = {
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning_content,
    }
    if message.tool_calls:
        given["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": text, **{key: value for key, value in given.items() if value is not None}}


def _template_call(call: ToolCall) -> dict[str, Any]:
    arguments = arguments_value(call.function.arguments)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _joined_parts(parts: list[dict[str, Any]], at: str) -> str:
    if not parts:
        raise bad_request(f"{at} must not be an empty list", at)
    for i, part in enumerate(parts):
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            message = f'{at}[{i}] must be {{"type": "text", "text": string}}: the model reads text only'
            raise bad_request(message, f"{at}[{i}]")
    return "".join(part["text"] for part in parts)


def checked_ids(ids: list[Any], at: str, vocab_size: int) -> list[int]:
    """`ids`, if they are token ids. Raises ApiError (400) naming the field that `at` begins with."""
    param = at.partition("[")[0]
    if not ids:
        raise bad_request(f"{at} must not be empty", param)
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise bad_request(f"{at} must hold token ids from 0 to {vocab_size - 1}, not {repr(token_id)[:40]}", param)
    return ids
