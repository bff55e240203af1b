"""A part that is started again whenever it ends by itself: NATS, planner, gateway."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from deploy.default_model import Say
from deploy.process import Child, describe_exit

MAX_RESTART_DELAY_S = 15.0
STEADY_S = 30.0
"""A part that ran this long has recovered: the next restart is quick again."""


class Service:
    """`start` starts its process; the readiness check of the first start is the caller's."""

    def __init__(self, name: str, start: Callable[[], Awaitable[Child]], restart_delay_s: float, say: Say) -> None:
        self.name = name
        self._start = start
        self._restart_delay_s = restart_delay_s
        self._say = say
        self._watcher: asyncio.Task[None] | None = None
        self._child: Child | None = None

    async def start(self) -> Child:
        self._child = await self._start()
        return self._child

    def keep_running(self) -> None:
        """Begin to watch it; call when it is ready for the first time."""
        self._watcher = asyncio.create_task(self._keep_running())

    async def let_go(self) -> None:
        """Do not start it again; call for all parts before the first one is stopped."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])

    async def stop(self, grace_s: float) -> None:
        if self._child is not None:
            await self._child.stop(grace_s)

    async def _keep_running(self) -> None:
        delay_s = self._restart_delay_s
        while True:
            assert self._child is not None
            started_s = time.monotonic()
            returncode = await self._child.wait()
            self._child.signal_kill()
            if time.monotonic() - started_s > STEADY_S:
                delay_s = self._restart_delay_s
            self._say(
                f"{self.name} {describe_exit(returncode)}: started again in {delay_s:g} s; its log: {self._child.log}"
            )
            await asyncio.sleep(delay_s)
            delay_s = max(self._restart_delay_s, min(2 * delay_s, MAX_RESTART_DELAY_S))
            await self.start()
            self._say(f"{self.name} is started again")
