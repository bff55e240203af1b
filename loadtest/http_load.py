"""Load on one HTTP endpoint from a process of its own: raw bytes, so that it is never the bottleneck.

    python -m loadtest.http_load '{"port": 8000, "path": "/v1/chat/completions", "body": "{...}", "num_connections": 8}'

Each line on its standard input is answered with a `Snapshot` line; it ends with its input. What happened between two
moments is the difference of two snapshots.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import subprocess
import sys
import time
from collections import deque
from types import TracebackType
from typing import Any, Final

import msgspec

from deploy.process import LAUNCHER
from loadtest.errors import BenchError
from loadtest.scripted_engine import run_until_stopped

HOST: Final = "127.0.0.1"
MAX_KEPT_ERRORS: Final = 5
CARRY_BYTES: Final = 11
"""One less than the shortest match of `TEXT`: kept of each piece for a match that is cut in two."""
TEXT: Final = re.compile(rb'"content": ?"[^"]')
"""An event with text, however the server spaces its JSON."""
COUNTER: Final = "########"
"""In the body: becomes the number of the request, so that no two are the same."""
ERROR: Final = re.compile(rb'data: \{"error"')
ID: Final = re.compile(rb'"id": ?"([^"]+)"')
LENGTH: Final = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    port: int
    path: str
    body: str
    num_connections: int = 1
    """Each sends its next request as soon as the last one is answered ..."""
    requests_per_s: float = 0.0
    """... unless this is given: then requests come at random moments, this many a second."""
    only_once: bool = False
    """Each connection sends one request."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What has happened since the start; times are Unix seconds."""

    at_s: float
    num_requests: int
    """Answered in full."""
    num_texts: int
    """Events that brought text."""
    num_texts_of_ended: int
    """Of these, of the streams that have ended."""
    errors: list[str]
    """The first few."""
    num_errors: int
    texts_by_connection: list[int]
    first_text_s: dict[str, float]
    """Of each streamed answer, by its id: seconds from the request to the first piece of text."""


class Counts:
    """What all connections have seen together."""

    def __init__(self) -> None:
        self.num_requests = self.num_texts = self.num_texts_of_ended = self.num_errors = 0
        self.numbers = itertools.count()
        """Of the requests."""
        self.errors: list[str] = []
        self.first_text_s: dict[str, float] = {}

    def fail(self, problem: str) -> None:
        self.num_errors += 1
        if len(self.errors) < MAX_KEPT_ERRORS:
            self.errors.append(problem)


class Connection(asyncio.Protocol):
    """One connection with one request at a time."""

    def __init__(self, port: int, request: bytes, counts: Counts) -> None:
        self._port = port
        self._request = request
        self._counts = counts
        self._transport: asyncio.Transport | None = None
        self._busy: asyncio.Future[None] | None = None
        self.num_texts = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment] # uvloop's own class

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._busy is not None and not self._busy.done():
            self._counts.fail(f"connection lost: {error}")
            self._busy.set_result(None)

    async def ask(self) -> None:
        """Send the request and wait for the whole answer; failures are counted."""
        if self._transport is None:
            await asyncio.get_running_loop().create_connection(lambda: self, HOST, self._port)
        assert self._transport is not None
        self._busy = asyncio.get_running_loop().create_future()
        self._head, self._carry, self._num_new, self._left_bytes = b"", b"", 0, -1
        self._has_failed = False
        number = b"%0*d" % (len(COUNTER), next(self._counts.numbers))
        request = self._request.replace(COUNTER.encode(), number)
        self._sent_s = time.perf_counter()
        self._transport.write(request)
        await self._busy

    def close(self) -> None:
        if self._transport is not None:
            self._busy = None
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        if self._busy is None or self._busy.done():
            return
        if self._left_bytes < 0 and not self._begins(data):
            return
        data = self._head or data
        self._head = b""
        self._count(data, now_s)
        if self._left_bytes:
            self._left_bytes -= len(data)
            ends = self._left_bytes <= 0
        else:
            ends = (self._carry + data).endswith(b"0\r\n\r\n")
        self._carry = data[-CARRY_BYTES:]
        if ends:
            self._end()

    def _begins(self, data: bytes) -> bool:
        """Read the head of the answer; False while it is not whole. Leaves all bytes in `_head`."""
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = self._head[:end]
        length = LENGTH.search(head)
        self._left_bytes = end + 4 + int(length[1]) if length else 0
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            self._has_failed = True
            self._counts.fail(self._head[:300].decode("utf-8", "replace"))
        return True

    def _count(self, data: bytes, now_s: float) -> None:
        num_texts = len(TEXT.findall(self._carry + data))
        if num_texts and not self._num_new and not self._left_bytes:
            name = ID.search(data)
            if name is not None:
                self._counts.first_text_s[name[1].decode()] = now_s - self._sent_s
        self._num_new += num_texts
        self.num_texts += num_texts
        self._counts.num_texts += num_texts
        if ERROR.search(data):
            self._has_failed = True
            self._counts.fail(data[-300:].decode("utf-8", "replace"))

    def _end(self) -> None:
        assert self._busy is not None
        if not self._has_failed:
            self._counts.num_requests += 1
            self._counts.num_texts_of_ended += self._num_new
        self._busy.set_result(None)


class Load:
    """All connections of one process."""

    def __init__(self, options: LoadOptions) -> None:
        self._options = options
        self.counts = Counts()
        self._request = http_request(options.port, options.path, options.body)
        self._connections = [self._connection() for _ in range(options.num_connections)]

    async def run(self) -> None:
        if self._options.requests_per_s:
            await self._at_random_moments()
        else:
            async with asyncio.TaskGroup() as tasks:
                for connection in self._connections:
                    tasks.create_task(self._again_and_again(connection))

    def snapshot(self) -> Snapshot:
        counts = self.counts
        return Snapshot(
            at_s=time.time(),
            num_requests=counts.num_requests,
            num_texts=counts.num_texts,
            num_texts_of_ended=counts.num_texts_of_ended,
            errors=counts.errors,
            num_errors=counts.num_errors,
            texts_by_connection=[connection.num_texts for connection in self._connections],
            first_text_s=counts.first_text_s,
        )

    def _connection(self) -> Connection:
        return Connection(self._options.port, self._request, self.counts)

    async def _again_and_again(self, connection: Connection) -> None:
        while True:
            try:
                await connection.ask()
            except OSError as error:
                self.counts.fail(f"cannot connect: {error}")
                await asyncio.sleep(0.1)
            if self._options.only_once:
                return

    async def _at_random_moments(self) -> None:
        draw, idle = random.Random(0), deque(self._connections)
        running: set[asyncio.Task[None]] = set()

        async def ask() -> None:
            connection = idle.popleft() if idle else self._connection()
            await connection.ask()
            idle.append(connection)

        next_s = time.monotonic()
        while True:
            next_s += draw.expovariate(self._options.requests_per_s)
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            task = asyncio.create_task(ask())
            running.add(task)
            task.add_done_callback(running.discard)


def http_request(port: int, path: str, body: str) -> bytes:
    """A POST as it goes over the wire."""
    data = body.encode()
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {HOST}:{port}",
        "Content-Type: application/json",
        "Authorization: Bearer none",
        f"Content-Length: {len(data)}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


class LoadProcess:
    """`with LoadProcess(options) as load:` runs it; `load.snapshot()` asks how far it is."""

    def __init__(self, options: LoadOptions) -> None:
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LoadProcess:
        launcher = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid())]
        command = [sys.executable, "-m", "loadtest.http_load", msgspec.json.encode(self._options).decode()]
        self._process = subprocess.Popen([*launcher, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()

    def snapshot(self) -> Snapshot:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
            return msgspec.json.decode(self._process.stdout.readline(), type=Snapshot)
        except (OSError, msgspec.DecodeError) as error:
            raise BenchError(f"the load client has ended: {error}") from error


async def serve(options: LoadOptions) -> None:
    """Run the load and answer questions until the input ends."""
    load = Load(options)
    running = asyncio.ensure_future(load.run())
    reader: Any = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.readline():
        sys.stdout.buffer.write(msgspec.json.encode(load.snapshot()) + b"\n")
        sys.stdout.buffer.flush()
    running.cancel()


if __name__ == "__main__":
    load_options = msgspec.json.decode(sys.argv[1], type=LoadOptions)
    run_until_stopped(lambda: serve(load_options))
