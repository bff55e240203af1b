"""The parent's hold on an engine process: it is started, talked to, and ended with all that it started itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from engine.backends.tensorrt_llm.processes import kill_group, kill_marked
from engine.backends.tensorrt_llm.wire import (
    Build,
    Built,
    Closed,
    Failed,
    Imported,
    Message,
    Shutdown,
    encode,
    receive,
)
from engine.errors import EngineUnavailable

logger = logging.getLogger(__name__)

_LAST_LINES: Final = 20
_DEAD_WAIT_S: Final = 5.0
_LAST_WORDS_S: Final = 1.0


class EngineProcess:
    """One child. It is a process group of its own, and every process that it starts carries its mark."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._directory = Path(tempfile.mkdtemp(prefix="spotserve-engine-"))
        self._process: asyncio.subprocess.Process | None = None
        self._server: asyncio.Server | None = None
        self._connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
            asyncio.get_running_loop().create_future()
        )
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._pumping: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._forwarding: asyncio.Task[None] | None = None
        self.phases_s: dict[str, float] = {}
        """Seconds of each phase of its start."""

    @property
    def socket_path(self) -> str:
        return str(self._directory / "socket")

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self, command: list[str], environment: Mapping[str, str], timeout_s: float) -> Imported:
        """Start it, and wait until it has imported TensorRT-LLM.

        Raises:
            EngineUnavailable: it cannot be used here; says why.

        """
        started_s = time.perf_counter()
        self._server = await asyncio.start_unix_server(self._accept, self.socket_path)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=dict(environment),
                start_new_session=True,
            )
        except OSError as error:
            raise EngineUnavailable(f"{command[0]} cannot be started: {error.strerror}") from error
        self._forwarding = asyncio.create_task(self._forward())
        message = await self._first_message(timeout_s)
        if not isinstance(message, Imported):
            raise EngineUnavailable(self._cause(message))
        self.phases_s["spawn_s"] = max(0.0, time.perf_counter() - started_s - message.import_s)
        self.phases_s["import_s"] = message.import_s
        return message

    async def build(self, message: Build, timeout_s: float) -> None:
        """Have it build the engine. Raises EngineUnavailable, with the cause."""
        self.send(message)
        answer = await self._answer(timeout_s, "did not build the engine")
        if not isinstance(answer, Built):
            raise EngineUnavailable(self._cause(answer))
        self.phases_s |= answer.phases_s

    def send(self, message: Message) -> None:
        if self._writer is not None:
            self._writer.write(encode(message))

    async def hear(self) -> Message:
        """The next message; `Failed`, with the cause, once it is gone."""
        return await self._messages.get()

    async def stop(self, timeout_s: float) -> bool:
        """Shut it down in good order if it can; then, or after `timeout_s`, kill what is left. False if it had to."""
        is_clean = False
        if self._writer is not None:
            self.send(Shutdown())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    is_clean = await self._closed()
        await self.kill()
        return is_clean

    async def kill(self) -> None:
        """SIGKILL to all of its processes, and wait until it is gone."""
        process = self._process
        if process is not None:
            kill_group(process.pid)
            await asyncio.to_thread(kill_marked, self._mark)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DEAD_WAIT_S):
                    await process.wait()
        if self._forwarding is not None:  # To the end of its standard error: its pipe is closed then.
            await asyncio.wait({self._forwarding}, timeout=_LAST_WORDS_S)
        self._release()
        if self._writer is not None:
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    def kill_now(self) -> None:
        """The same without waiting: the event loop is ending."""
        if self._process is not None:
            kill_group(self._process.pid)
            kill_marked(self._mark)
        self._release()

    def _release(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._server is not None:
            self._server.close()
        for task in (self._forwarding, self._pumping):
            if task is not None:
                task.cancel()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._connected.done():
            self._connected.set_result((reader, writer))

    async def _first_message(self, timeout_s: float) -> Message:
        assert self._process is not None
        ended = asyncio.create_task(self._process.wait())
        try:
            waiting: list[asyncio.Future[Any]] = [self._connected, ended]
            await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        if not self._connected.done():
            if self._process.returncode is not None:
                return Failed(cause=await self._obituary())
            return Failed(cause=f"the engine process did not start within {timeout_s:g} s")
        reader, self._writer = self._connected.result()
        self._pumping = asyncio.create_task(self._pump(reader))
        return await self._answer(timeout_s, "did not import TensorRT-LLM")

    async def _pump(self, reader: asyncio.StreamReader) -> None:
        """One task reads, for whoever hears: one that is cancelled must not leave half a message behind."""
        try:
            while (message := await receive(reader)) is not None:
                self._messages.put_nowait(message)
        except (msgspec.MsgspecError, ValueError) as error:
            self._messages.put_nowait(Failed(cause=f"the engine process said something senseless: {error}"))
        else:
            self._messages.put_nowait(Failed(cause=await self._obituary()))

    async def _answer(self, timeout_s: float, problem: str) -> Message:
        try:
            async with asyncio.timeout(timeout_s):
                return await self.hear()
        except TimeoutError:
            return Failed(cause=f"the engine process {problem} within {timeout_s:g} s")

    async def _closed(self) -> bool:
        while True:
            message = await self.hear()
            if isinstance(message, Closed | Failed):
                return isinstance(message, Closed)

    def _cause(self, message: Message) -> str:
        return message.cause if isinstance(message, Failed) else f"the engine process said {message!r}"

    async def _obituary(self) -> str:
        """How it ended, and its last words."""
        assert self._process is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DEAD_WAIT_S):
                await self._process.wait()
        for _ in range(20):  # What it wrote last may still be on its way.
            if self._last_lines:
                break
            await asyncio.sleep(0.01)
        last = next((line for line in reversed(self._last_lines) if line.strip()), "it said nothing")
        return f"the engine process ended with {self._process.returncode}: {last.strip()}"

    async def _forward(self) -> None:
        """Its messages go to our own standard error."""
        assert self._process is not None
        assert self._process.stderr is not None
        while chunk := await self._process.stderr.read(1 << 16):
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), chunk)
            self._last_lines.extend(chunk.decode(errors="replace").splitlines())
