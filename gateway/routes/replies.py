"""ASGI replies, and reading requests: bytes in and out, and the watch for clients that go away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any, TypeVar

import orjson
from litestar import Request
from litestar.types import Receive, Scope, Send

from gateway.errors import ApiError, bad_request

_T = TypeVar("_T")

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


_log = logging.getLogger(__name__)


class ClientGone(Exception):  # not an error: nobody is left to be told
    """The client has closed the connection."""


class BytesReply:
    """A whole answer."""

    def __init__(
        self, body: bytes, content_type: str, status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None
    ) -> None:
        self._body = body
        self._content_type = content_type
        self._status = int(status)
        self._headers = dict(headers or {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {
            "content-type": self._content_type,
            "content-length": str(len(self._body)),
            **self._headers,
        }
        await send(
            {
                "type": "http.response.start",
                "status": self._status,
                "headers": [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()],
            }
        )
        await send({"type": "http.response.body", "body": self._body, "more_body": False})


class JsonReply(BytesReply):
    """A whole answer in JSON."""

    def __init__(self, payload: object, status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(orjson.dumps(payload), "application/json", status, headers)


class NoReply:
    """For a client that has gone: the server drops it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await JsonReply({}, 499)(scope, receive, send)


class StreamReply:
    """Server-sent events; `close` is called however it ends, also when the client goes away.

    A client that does not read is cut off after the setting `slow_reader_timeout_s`. Until then the server holds one
    socket buffer of text for it and its token ids, at most max_tokens.
    """

    def __init__(self, first: bytes, rest: AsyncIterator[bytes], close: Callable[..., None]) -> None:
        self._first = first
        self._rest = rest
        self._close = close
        self._sending = 0
        """Number of the event that is being sent; 0: none."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        front = scope["litestar_app"].state.front
        watch = asyncio.ensure_future(self._stall(front.settings.slow_reader_timeout_s))
        cause: tuple[str, ...] = ()
        try:
            await unless_gone(receive, self._send(send), watch)
        except ClientGone:
            if watch.done() and not watch.cancelled():
                cause = (watch.result(),)
                front.dispatcher.accounts.metrics.stalled()
                _log.warning("stream cut: %s", *cause)
        finally:
            watch.cancel()
            self._close(*cause)

    async def _stall(self, timeout_s: float) -> str:
        """Returns the cause when one event has been waiting to be sent for `timeout_s`, within a tenth."""
        since, seen = 0, -1
        while True:
            await asyncio.sleep(timeout_s / 10)
            since = since + 1 if self._sending and self._sending == seen else 0
            seen = self._sending
            if since >= 10:
                return f"the client has not read for {timeout_s:g} s"

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        number = 1
        async for data in self._rest:
            number += 1
            self._sending = number
            await send({"type": "http.response.body", "body": data, "more_body": True})
            self._sending = 0
        self._sending = number + 1
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _T], *until: asyncio.Future[Any]) -> _T:
    """The result of `work`; raises ClientGone, and stops it, if the client disconnects or `until` is done before."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, watching, *until}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def next_bytes(events: AsyncIterator[bytes]) -> bytes:
    """The next ones; a coroutine, as `unless_gone` wants it."""
    return await anext(events)


async def json_body(request: Request[Any, Any, Any]) -> bytes:
    """The body of a JSON request. Raises ApiError: 415 for another content type, 400 for an empty one."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"Content-Type must be application/json, not {content_type[:80] or 'missing'}",
        )
    body = await request.body()
    if not body:
        raise bad_request("The body is empty; a JSON object is required")
    return body


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
