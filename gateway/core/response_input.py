"""What clients of the Responses API send, as a chat: input items as messages, fields as those of a chat. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.core.responses import ResponseBody
from gateway.errors import bad_request
from gateway.openai import CalledFunction, ChatBody, ChatMessage, ToolCall


def chat_body(body: ResponseBody, history: list[ChatMessage]) -> ChatBody:
    """The same as a chat request; `history` is the conversation of the previous response.

    Raises ApiError (400) naming the field.
    """
    if body.truncation == "auto":
        raise bad_request("truncation: auto is not served; nothing is cut silently", "truncation")
    for name in ("conversation", "prompt"):
        if getattr(body, name) is not None:
            raise bad_request(f"{name} is not served; input and previous_response_id are", name)
    if "message.output_text.logprobs" in (body.include or []):
        raise bad_request("include: logprobs of responses are not served", "include")
    messages = [*history, *input_messages(body.input)]
    if body.instructions:
        messages.insert(0, ChatMessage(role="system", content=body.instructions))
    if not messages:
        raise bad_request("input must not be empty", "input")
    return ChatBody(
        model=body.model,
        messages=messages,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        stream=body.stream,
        tools=[_chat_tool(tool, index) for index, tool in enumerate(body.tools or [])] or None,
        tool_choice=_chat_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_response_format(body.text),
        priority=body.priority,
    )


def own_param(param: str | None) -> str | None:
    """The field of a response for the field of a chat that an error names."""
    names = {"messages": "input", "response_format": "text.format", "max_tokens": "max_output_tokens"}
    return names.get(param, param) if param is not None else None


def input_messages(given: str | list[dict[str, Any]]) -> list[ChatMessage]:
    """Input items as messages. Raises ApiError (400) naming the item."""
    if isinstance(given, str):
        return [ChatMessage(role="user", content=given)]
    messages: list[ChatMessage] = []
    for index, item in enumerate(given):
        message = _message(item, f"input[{index}]")
        last = messages[-1] if messages else None
        # Calls of one turn come as items of their own.
        if message is not None and message.tool_calls and last is not None and last.role == "assistant":
            messages[-1] = msgspec.structs.replace(last, tool_calls=[*(last.tool_calls or []), *message.tool_calls])
        elif message is not None:
            messages.append(message)
    return messages


def answered_messages(output: list[dict[str, Any]]) -> list[ChatMessage]:
    """What the output items of a response add to the conversation."""
    return input_messages([item for item in output if item["type"] != "reasoning"])


def _message(item: dict[str, Any], at: str) -> ChatMessage | None:
    kind = item.get("type", "message")
    if kind == "message":
        if item.get("content") is None:
            raise bad_request(f"{at}.content is required", f"{at}.content")
        try:
            return msgspec.convert({**item, "content": _content(item.get("content"), at)}, ChatMessage)
        except msgspec.ValidationError as error:
            raise bad_request(f"Invalid {at}: {error}"[:300], at) from error
    if kind == "function_call":
        return ChatMessage(
            role="assistant",
            tool_calls=[
                ToolCall(
                    id=_text(item, "call_id", at),
                    function=CalledFunction(name=_text(item, "name", at), arguments=_text(item, "arguments", at)),
                )
            ],
        )
    if kind == "function_call_output":
        output = item.get("output")
        content = _content(output, at, "output") if isinstance(output, list) else _text(item, "output", at)
        return ChatMessage(role="tool", content=content, tool_call_id=_text(item, "call_id", at))
    if kind == "reasoning":
        return None
    raise bad_request(f"{at}.type: {str(kind)[:40]!r} items are not served", f"{at}.type")


def _content(content: Any, at: str, field: str = "content") -> Any:
    """Parts as chat messages have them."""
    if not isinstance(content, list):
        return content
    parts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text") or not isinstance(part.get("text"), str):
            name = f"{at}.{field}[{index}]"
            raise bad_request(f"{name}: the model reads text only", name)
        parts.append({"type": "text", "text": part["text"]})
    return parts


def _text(item: dict[str, Any], name: str, at: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise bad_request(f"{at}.{name} must be a string", f"{at}.{name}")
    return value


def _chat_tool(tool: dict[str, Any], index: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise bad_request(f"tools[{index}].type: only functions are served", f"tools[{index}].type")
    fields = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in fields if tool.get(name) is not None}}


def _chat_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(choice, dict) and "function" not in choice:
        return {"type": choice.get("type"), "function": {"name": choice.get("name")}}
    return choice


def _response_format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    given = (text or {}).get("format")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise bad_request("text.format must be an object", "text.format")
    if given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {k: v for k, v in given.items() if k != "type"}}
