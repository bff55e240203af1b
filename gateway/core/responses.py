"""OpenAI's Responses API: its body, and the fold's deltas as items and events. Pure.

A response is a list of output items (reasoning, message, function calls). `ResponseFold` builds it from the deltas of
the one choice, and tells each step as an event; the whole body is what the last event carries.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Final, Literal

import msgspec

from gateway.core.fold import Delta
from gateway.core.response_format import Usage
from gateway.errors import ApiError

MAX_INPUT_ITEMS: Final = 4096


class ResponseBody(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/responses."""

    model: Annotated[str, msgspec.Meta(min_length=1)]
    input: str | Annotated[list[dict[str, Any]], msgspec.Meta(max_length=MAX_INPUT_ITEMS)] = []
    instructions: str | None = None
    max_output_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    tools: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=0)] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    include: list[str] | None = None
    priority: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    # Known, and refused.
    conversation: Any = None
    prompt: Any = None

    @property
    def is_stored(self) -> bool:
        return self.store is not False


class ResponseFold:
    """Deltas in, events out; `response` is the object so far."""

    def __init__(self, response_id: str, created_s: int, body: ResponseBody) -> None:
        self.id = response_id
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._calls: dict[int, dict[str, Any]] = {}
        self._num_events = 0
        self.response: dict[str, Any] = {
            "id": response_id,
            "object": "response",
            "created_at": created_s,
            "status": "in_progress",
            "background": bool(body.background),
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": self._items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": body.is_stored,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    def start(self) -> list[dict[str, Any]]:
        """The events before the first token."""
        return [
            self._event("response.created", response=self._snapshot()),
            self._event("response.in_progress", response=self._snapshot()),
        ]

    def push(self, delta: Delta) -> list[dict[str, Any]]:
        """The events of one delta; not the last ones: see `finish`."""
        events: list[dict[str, Any]] = []
        if delta.reasoning:
            events += self._say("reasoning", delta.reasoning)
        if delta.text:
            events += self._say("message", delta.text)
        for call in delta.tool_calls:
            if call.id is not None:
                events += self._close_item()
                events += self._open_item(
                    {
                        "type": "function_call",
                        "id": self._item_id("fc"),
                        "call_id": call.id,
                        "name": call.name,
                        "arguments": "",
                        "status": "in_progress",
                    }
                )
                assert self._open is not None, "it was opened just now"
                self._calls[call.index] = self._open
            if call.arguments:
                item = self._calls[call.index]
                item["arguments"] += call.arguments
                events.append(self._item_event("function_call_arguments.delta", item, delta=call.arguments))
        return events

    def finish(self, finish_reason: str | None, usage: Usage) -> list[dict[str, Any]]:
        """The last events: all items are closed, the response is whole."""
        cut = finish_reason == "length"
        events = self._close_item("incomplete" if cut else "completed")
        self.response["status"] = "incomplete" if cut else "completed"
        self.response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        self.response["usage"] = self._usage(usage)
        return [*events, self._event(f"response.{self.response['status']}", response=self._snapshot())]

    def fail(self, error: ApiError, usage: Usage) -> list[dict[str, Any]]:
        """The last event of a response that cannot be finished."""
        self._close_item("incomplete")
        self.response["status"] = "failed"
        self.response["error"] = {"code": error.code or "server_error", "message": error.message}
        self.response["usage"] = self._usage(usage)
        return [self._event("response.failed", response=self._snapshot())]

    def cancel(self) -> None:
        """It was cancelled: what there is stays."""
        self._close_item("incomplete")
        self.response["status"] = "cancelled"

    def _say(self, kind: str, text: str) -> list[dict[str, Any]]:
        """`text` goes to the open item of `kind`, or to a new one."""
        events: list[dict[str, Any]] = []
        if self._open is None or self._open["type"] != kind:
            events += self._close_item()
            events += self._open_item(self._message_item() if kind == "message" else self._reasoning_item())
        assert self._open is not None, "it was opened just now"
        item = self._open
        if not item["content"]:
            part = _part(kind)
            item["content"].append(part)
            events.append(self._item_event("content_part.added", item, content_index=0, part=dict(part)))
        item["content"][0]["text"] += text
        extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        events.append(self._item_event(f"{_text_kind(kind)}.delta", item, content_index=0, delta=text, **extra))
        return events

    def _open_item(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        self._items.append(item)
        self._open = item
        return [self._event("response.output_item.added", output_index=len(self._items) - 1, item=_copied(item))]

    def _close_item(self, status: str = "completed") -> list[dict[str, Any]]:
        item, self._open = self._open, None
        if item is None:
            return []
        events: list[dict[str, Any]] = []
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self._item_event("function_call_arguments.done", item, **done))
        elif item["content"]:
            part, kind = item["content"][0], _text_kind(item["type"])
            extra: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            events.append(self._item_event(f"{kind}.done", item, content_index=0, text=part["text"], **extra))
            events.append(self._item_event("content_part.done", item, content_index=0, part=dict(part)))
        item["status"] = status
        events.append(self._event("response.output_item.done", output_index=self._index(item), item=_copied(item)))
        return events

    def _message_item(self) -> dict[str, Any]:
        return {
            "type": "message",
            "id": self._item_id("msg"),
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }

    def _reasoning_item(self) -> dict[str, Any]:
        return {"type": "reasoning", "id": self._item_id("rs"), "summary": [], "content": [], "status": "in_progress"}

    def _item_id(self, prefix: str) -> str:
        return f"{prefix}_" + hashlib.sha256(f"{self.id}/{len(self._items)}".encode()).hexdigest()[:24]

    def _item_event(self, kind: str, item: dict[str, Any], **fields: Any) -> dict[str, Any]:
        return self._event(f"response.{kind}", item_id=item["id"], output_index=self._index(item), **fields)

    def _index(self, item: dict[str, Any]) -> int:
        return next(i for i, known in enumerate(self._items) if known is item)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        number, self._num_events = self._num_events, self._num_events + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _snapshot(self) -> dict[str, Any]:
        return {**self.response, "output": [_copied(item) for item in self._items]}

    @staticmethod
    def _usage(usage: Usage) -> dict[str, Any]:
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


def _part(kind: str) -> dict[str, Any]:
    if kind == "message":
        return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {"type": "reasoning_text", "text": ""}


def _text_kind(kind: str) -> str:
    return "output_text" if kind == "message" else "reasoning_text"


def _copied(item: dict[str, Any]) -> dict[str, Any]:
    """An event tells of the item as it was then."""
    return {**item, "content": [dict(part) for part in item["content"]]} if "content" in item else dict(item)
