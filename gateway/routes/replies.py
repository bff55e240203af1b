"""ASGI replies, and reading requests: bytes in and out, and the watch for clients that go away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from http import HTTPStatus
from types import TracebackType
from typing import Any

import orjson
from litestar import Request
from litestar.types import Receive, Scope, Send

from gateway.errors import ApiError, bad_request
from gateway.services.answer import EventStream
from gateway.services.http_protocol import Exchange

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

_log = logging.getLogger(__name__)


class ClientGone(Exception):  # not an error: nobody is left to be told
    """The client has closed the connection, or (with a cause) was cut off."""

    def __init__(self, cause: str | None = None) -> None:
        super().__init__(cause)
        self.cause = cause


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


class ClientWatch:
    """`async with ClientWatch(scope) as watch`: what runs inside ends with ClientGone when the client disconnects.

    The work stays in its own task, the only one of the request.
    """

    def __init__(self, scope: Scope) -> None:
        self._exchange = Exchange.of(scope)
        self._working: asyncio.Task[Any] | None = None
        self._gone: ClientGone | None = None

    async def __aenter__(self) -> ClientWatch:
        if self._exchange.gone:
            raise ClientGone
        self._working = asyncio.current_task()
        self._exchange.watch(self.end)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        assert self._working is not None
        self._exchange.unwatch()
        if self._gone is not None:
            self._working.uncancel()
            if kind is asyncio.CancelledError:
                raise self._gone

    def end(self, cause: str | None = None) -> None:
        """Stop the work now; `cause` goes into ClientGone."""
        if self._gone is None and self._working is not None:
            self._gone = ClientGone(cause)
            self._working.cancel()


class StreamReply:
    """Server-sent events; `close` is called however it ends, also when the client goes away.

    The answer begins with the first event: an ApiError before it is a plain one.
    A client that does not read is cut off after the setting `slow_reader_timeout_s`. Until then the server holds one
    socket buffer of text for it and its token ids, at most max_tokens.
    """

    def __init__(self, events: AsyncIterator[bytes], close: Callable[..., None]) -> None:
        self._events = events
        self._close = close
        self._sending = 0
        """Number of the event that is being sent; 0: none."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        front = scope["litestar_app"].state.front
        cause: tuple[str, ...] = ()
        stall = None
        try:
            async with ClientWatch(scope) as watch:
                first = await anext(self._events)
                stall = _Stall(self, front.settings.slow_reader_timeout_s, watch.end)
                await self._send(first, scope, send)
        except ClientGone as gone:
            if gone.cause is not None:
                cause = (gone.cause,)
                front.dispatcher.accounts.metrics.stalled()
                _log.warning("stream cut: %s", gone.cause)
        finally:
            if stall is not None:
                stall.cancel()
            self._close(*cause)

    @property
    def sending(self) -> int:
        return self._sending

    async def _send(self, first: bytes, scope: Scope, send: Send) -> None:
        exchange, events = Exchange.of(scope), self._events
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        if exchange.ready:
            exchange.write(first)
        else:
            await send({"type": "http.response.body", "body": first, "more_body": True})
        if isinstance(events, EventStream):
            events.write_to(exchange)
        number, more_body = 1, True
        async for data in events:
            number += 1
            self._sending = number
            more_body = not (isinstance(events, EventStream) and events.has_ended)
            await send({"type": "http.response.body", "body": data, "more_body": more_body})
            self._sending = 0
        if more_body:
            self._sending = number + 1
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Stall:
    """Calls `end` with the cause when one event of `reply` has waited to be sent for `timeout_s`, within a tenth."""

    def __init__(self, reply: StreamReply, timeout_s: float, end: Callable[[str], None]) -> None:
        self._reply, self._timeout_s, self._end = reply, timeout_s, end
        self._num_same, self._seen = 0, -1
        self._timer = asyncio.get_running_loop().call_later(timeout_s / 10, self._look)

    def cancel(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        sending = self._reply.sending
        self._num_same = self._num_same + 1 if sending and sending == self._seen else 0
        self._seen = sending
        if self._num_same >= 10:
            self._end(f"the client has not read for {self._timeout_s:g} s")
            return
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s / 10, self._look)


async def whole_reply(scope: Scope, work: Coroutine[Any, Any, object], close: Callable[[], None]) -> JsonReply:
    """The result of `work` in JSON; `close` is called however it ends, also when the client goes away."""
    try:
        async with ClientWatch(scope):
            return JsonReply(await work)
    except ClientGone:
        return JsonReply({}, 499)  # to nobody: the server drops it
    finally:
        work.close()
        close()


async def json_body(request: Request[Any, Any, Any]) -> bytes:
    """The body of a JSON request. Raises ApiError: 415 for another content type or encoding, 400 for an empty one."""
    headers = request.headers
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"Content-Type must be application/json, not {content_type[:80] or 'missing'}",
        )
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"Content-Encoding {encoding[:80]} is not read; send the body as it is"
        )
    body = await request.body()
    if not body:
        raise bad_request("The body is empty; a JSON object is required")
    return body
