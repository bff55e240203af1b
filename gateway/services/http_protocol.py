"""How the gateway reads HTTP: llhttp's parser, with a bound on what a client may send before its body.

The C parser, against uvicorn's other one (h11, in Python), saves about a sixth of the CPU time of a streamed token.
Granian was not taken: it has no hook at the start of a shutdown, which draining needs.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES: Final = 64 * 1024
"""Request line and headers."""
BODY_WRITER: Final = "spotserve.body_writer"
"""Name of an extension in a request's scope: its `BodyWriter`."""


class BodyWriter:
    """Writes parts of the body of one answer that has begun, outside of ASGI: it need not be awaited.

    The end of the body, and what comes while it is not `ready`, goes through ASGI's `send`.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def ready(self) -> bool:
        cycle = self._cycle
        return bool(
            cycle.chunked_encoding
            and not (cycle.flow.write_paused or cycle.disconnected or cycle.response_complete)
            and not cycle.transport.is_closing()
        )

    def write(self, data: bytes) -> None:
        """`data` must not be empty."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class BoundedHttp(HttpToolsProtocol):
    """Refuses a head that does not end: the parser itself would keep it all."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._num_head_bytes: int | None = 0
        """Of the head that has not ended; None within a body, and in what was received together with the end of one."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # uvicorn's own signature
        super().connection_made(transport)
        # uvloop would write at the end of its round, when all streams of a frame have been worked on: an event is to
        # leave when it is made. Nothing is held for a slow reader beside what the socket takes. (Not under TLS:
        # there such a bound stops the answer for good.)
        if transport.get_extra_info("sslcontext") is None:
            transport.set_write_buffer_limits(high=0)

    def data_received(self, data: bytes) -> None:
        if self._num_head_bytes is None and self.cycle is not None and not self.cycle.more_body:
            self._num_head_bytes = 0
        super().data_received(data)
        if self._num_head_bytes is not None:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(f"The request line and headers exceed {MAX_HEAD_BYTES} bytes")

    def on_headers_complete(self) -> None:
        self._num_head_bytes = None
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:
            self.scope["extensions"] = {BODY_WRITER: cast("Any", BodyWriter(self.cycle))}
