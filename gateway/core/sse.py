"""Server-sent events, framed as OpenAI's clients expect: `data: `, one line of JSON, an empty line. Pure."""

from __future__ import annotations

from typing import Any

import orjson

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def event(payload: dict[str, Any]) -> bytes:
    """One event; orjson writes no line breaks."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"
