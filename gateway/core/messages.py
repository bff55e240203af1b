"""Messages and prompts of clients, as the model's template and tokenizer want them. Pure."""

from __future__ import annotations

from typing import Any

from gateway.errors import bad_request
from gateway.openai import ChatMessage


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
        return [checked_ids(prompt, "prompt", vocab_size)]
    if all(isinstance(item, list) for item in prompt):
        return [checked_ids(item, f"prompt[{i}]", vocab_size) for i, item in enumerate(prompt)]
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


def checked_ids(ids: list[Any], at: str, vocab_size: int) -> list[int]:
    """`ids`, if they are token ids. Raises ApiError (400) naming the field that `at` begins with."""
    param = at.partition("[")[0]
    if not ids:
        raise bad_request(f"{at} must not be empty", param)
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise bad_request(f"{at} must hold token ids from 0 to {vocab_size - 1}, not {repr(token_id)[:40]}", param)
    return ids
