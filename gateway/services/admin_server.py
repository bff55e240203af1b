"""A second HTTP port for operators: plain HTTP, without keys, on the loopback address unless told otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from litestar import Litestar


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the main server's."""
        yield


class AdminServer:
    """Serves `app` on `listener` between `start` and `stop`."""

    def __init__(self, app: Litestar, listener: socket.socket) -> None:
        config = uvicorn.Config(
            app, lifespan="off", access_log=False, log_config=None, server_header=False, timeout_graceful_shutdown=1
        )
        self._server = _Server(config)
        self._listener = listener
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def start(self) -> None:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._listener]))

    async def stop(self) -> None:
        self._server.should_exit = True
        if self._task is not None:
            await self._task
