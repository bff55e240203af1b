"""Before any handler: who asks, and how long the request may take. The body has not been read yet."""

from __future__ import annotations

import math
import time
from typing import Any

from litestar import Request

from gateway.core.keys import ANONYMOUS
from gateway.errors import bad_request
from gateway.services.caller import Caller, current_caller
from gateway.services.key_file import WatchedKeys

TIMEOUT_HEADER = "x-request-timeout-s"
_OPEN = frozenset({"/health", "/ready", "/metrics", "/version", "/openapi.json", "/docs", "/internal/requests"})
"""All other paths are for keys, however they are spelled."""


async def identify(request: Request[Any, Any, Any]) -> None:
    """Sets the current caller. Raises ApiError: 401 without a valid key if keys are asked for, 400 for a bad header."""
    keys: WatchedKeys | None = request.app.state.api_keys
    principal = ANONYMOUS
    if keys is not None and request.scope["path"] not in _OPEN:
        principal = keys.ring.authenticate(request.headers.get("authorization", ""), time.time())
    text = request.headers.get(TIMEOUT_HEADER)
    current_caller.set(Caller(principal, _seconds(text) if text is not None else None))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise bad_request(f"The header {TIMEOUT_HEADER} must be seconds above 0, not {text[:40]!r}", TIMEOUT_HEADER)
    return value
