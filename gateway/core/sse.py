"""Server-sent events, framed as OpenAI's clients expect: `data: `, one line of JSON, an empty line. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import orjson

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

UNICODE_LINE_BREAKS: Final = re.compile("\u0085|\u2028|\u2029".encode())
_MARK: Final = "\0text\0"
ESCAPED: Final = {"\u0085".encode(): b"\\u0085", "\u2028".encode(): b"\\u2028", "\u2029".encode(): b"\\u2029"}


def event(payload: dict[str, Any]) -> bytes:
    """One event, which is one line however a client splits lines.

    JSON leaves three line breaks of Unicode as they are, and clients that read by `str.splitlines` (httpx'
    `aiter_lines`, for one) would cut the event there: they are escaped.
    """
    return b"data: " + _one_line(orjson.dumps(payload)) + b"\n\n"


def named_event(payload: dict[str, Any]) -> bytes:
    """An event of the Responses API, named by its `type`."""
    return b"event: " + str(payload["type"]).encode() + b"\n" + event(payload)


class TextEvent:
    """Events that differ in one string: `encode(text)` gives the same bytes as `event(payload_of(text))`."""

    def __init__(self, payload_of: Callable[[str], dict[str, Any]]) -> None:
        self._before, _, self._after = event(payload_of(_MARK)).rpartition(orjson.dumps(_MARK))

    def encode(self, text: str) -> bytes:
        data = orjson.dumps(text)
        return self._before + (data if text.isascii() else _one_line(data)) + self._after


def _one_line(data: bytes) -> bytes:
    if UNICODE_LINE_BREAKS.search(data):
        data = UNICODE_LINE_BREAKS.sub(lambda found: ESCAPED[found[0]], data)
    return data
