"""How the ranks of a pipeline know of each other: each member keeps a connection to the leader for as long as it runs.

A connection that ends is a rank that died or gave up; the engine is then gone as a unit.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Final

import msgspec

from engine.backends.tensorrt_llm.wire import Join, Message, Over, Ready, encode, receive

_CONNECT_TIMEOUT_S: Final = 5.0


class MemberGate:
    """Where the members of the pipelines that this rank leads report."""

    def __init__(self, host: str) -> None:
        self._socket = socket.create_server((host, 0))
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        self._server: asyncio.Server | None = None
        self._writers: dict[tuple[str, str], asyncio.StreamWriter] = {}
        self._changed = asyncio.Condition()
        self._on_lost: dict[str, Callable[[str], None]] = {}

    async def open(self) -> None:
        """Answer from now on; who came before has waited."""
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, sock=self._socket)

    async def wait_for(self, pipeline: str, ranks: set[str], on_lost: Callable[[str], None]) -> None:
        """Until all members have joined; from then on `on_lost` is told of each that leaves."""
        self._on_lost[pipeline] = on_lost
        async with self._changed:
            await self._changed.wait_for(lambda: all((pipeline, rank) in self._writers for rank in ranks))

    def tell(self, pipeline: str, message: Ready | Over) -> None:
        """All members; after `Over` they are forgotten."""
        for key in [key for key in self._writers if key[0] == pipeline]:
            self._writers[key].write(encode(message))
            if isinstance(message, Over):
                self._writers.pop(key).close()
        if isinstance(message, Over):
            self._on_lost.pop(pipeline, None)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
        if self._server is not None:
            self._server.close()
        self._socket.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(msgspec.MsgspecError, ValueError):
            join = await receive(reader)
            if isinstance(join, Join):
                key = (join.pipeline, join.rank)
                self._writers[key] = writer
                async with self._changed:
                    self._changed.notify_all()
                await receive(reader)  # Nothing more is said: this returns when the member is gone.
                if self._writers.get(key) is writer:
                    del self._writers[key]
                    on_lost = self._on_lost.get(join.pipeline)
                    if on_lost is not None:
                        on_lost(f"{join.rank} has left")
        writer.close()


class LeaderLink:
    """A member's connection to its leader."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def join(cls, address: str, pipeline: str, rank: str) -> LeaderLink:
        """Raises OSError or TimeoutError if the leader does not answer."""
        host, _, port = address.rpartition(":")
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(encode(Join(pipeline=pipeline, rank=rank)))
        return cls(reader, writer)

    async def hear(self) -> Message:
        """What the leader says next; that it is gone is an end too."""
        return await receive(self._reader) or Over(cause="the leader is gone")

    def close(self) -> None:
        self._writer.close()
