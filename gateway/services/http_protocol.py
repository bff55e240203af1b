"""How the gateway reads HTTP: llhttp's parser, with a bound on what a client may send before its body.

The C parser, against uvicorn's other one (h11, in Python), saves about a sixth of the CPU time of a streamed token.
Granian was not taken: it has no hook at the start of a shutdown, which draining needs.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES: Final = 64 * 1024
"""Request line and headers."""
_HELD_BYTES: Final = 512
"""So much may wait for what follows: the head of an answer leaves together with the start of its body."""
_EXCHANGE: Final = "spotserve.exchange"
"""Name of an extension in a request's scope."""


class Exchange:
    """One request and its answer, beside ASGI: what it would take a task for, or a switch to one, for each event."""

    def __init__(self, protocol: BoundedHttp, cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        # The cycle holds the scope, which holds this: with a plain reference only the collector would find all of it.
        self._cycle: RequestResponseCycle = weakref.proxy(cycle)

    @staticmethod
    def of(scope: Mapping[str, Any]) -> Exchange:
        """The exchange of an ASGI scope."""
        found: Exchange = scope["extensions"][_EXCHANGE]
        return found

    @property
    def gone(self) -> bool:
        """Whether the client has disconnected."""
        return self._cycle.disconnected

    def watch(self, on_gone: Callable[[str | None], None]) -> None:
        """Call `on_gone` when the connection ends, until `unwatch`; with the cause if it was not the client's will."""
        self._protocol.watchers[self] = on_gone

    def unwatch(self) -> None:
        self._protocol.watchers.pop(self, None)

    @property
    def ready(self) -> bool:
        """Whether `write` may be called: the body has begun, and the client takes it."""
        cycle = self._cycle
        return bool(
            cycle.chunked_encoding
            and not (cycle.flow.write_paused or cycle.disconnected or cycle.response_complete)
            and not cycle.transport.is_closing()
        )

    def write(self, data: bytes) -> None:
        """Send a part of the body, not empty; its end goes through ASGI, and what comes while this is not `ready`."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        if not self._protocol.holds_nothing:
            self._protocol.hold_nothing()


class BoundedHttp(HttpToolsProtocol):
    """Refuses a head that does not end: the parser itself would keep it all."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._is_plain = True
        self.holds_nothing = False
        self.watchers: dict[Exchange, Callable[[str | None], None]] = {}
        self._num_head_bytes: int | None = 0
        """Of the head that has not ended; None within a body, and in what was received together with the end of one."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # uvicorn's own signature
        super().connection_made(transport)
        # Under TLS such a bound stops the answer for good.
        self._is_plain = transport.get_extra_info("sslcontext") is None
        if self._is_plain:
            transport.set_write_buffer_limits(high=_HELD_BYTES)

    def hold_nothing(self) -> None:
        """What is written of this answer leaves at once.

        uvloop would write at the end of its round, when other streams have been worked on. And nothing is held for a
        slow reader beside what the socket takes.
        """
        self.holds_nothing = True
        if self._is_plain:
            self.transport.set_write_buffer_limits(high=0)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # Little had been sent, so that nothing had to wait here: it was the kernel that saw that nobody reads it.
        cause = "the client has not taken what was sent to it" if isinstance(exc, TimeoutError) else None
        for on_gone in list(self.watchers.values()):
            on_gone(cause)

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
            self.scope["extensions"] = {_EXCHANGE: cast("Any", Exchange(self, self.cycle))}

    def on_response_complete(self) -> None:
        if self.holds_nothing and self._is_plain and not self.transport.is_closing():
            self.transport.set_write_buffer_limits(high=_HELD_BYTES)
        self.holds_nothing = False
        super().on_response_complete()
