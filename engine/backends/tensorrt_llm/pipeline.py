"""One rank's part of a pipeline that TensorRT-LLM runs: the leader keeps the engine and the token log, members wait.

Everything runs on the rank's event loop; the engine is a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import dataclass
from typing import Final

from engine.backends.base import PipelineEvents
from engine.backends.tensorrt_llm import gpus
from engine.backends.tensorrt_llm.engine_process import EngineProcess
from engine.backends.tensorrt_llm.members import LeaderLink
from engine.backends.tensorrt_llm.processes import pipeline_of
from engine.backends.tensorrt_llm.wire import EngineSpec, Over, Ready
from engine.core.roles import Position
from engine.errors import EngineUnavailable, PipelineBroken
from engine.settings import EngineSettings

logger = logging.getLogger(__name__)

_TICK_S: Final = 0.05
_CENSUS_S: Final = 0.5
_STEP_S: Final = 0.05
"""Assumed, where the last steps before a deadline are counted; the margin is many of them."""


@dataclass(slots=True)
class EngineParts:
    """What a position needs to run; made while it is prepared."""

    position: Position
    rank: str
    device: int
    """The GPU of this rank."""
    spec: EngineSpec
    process: EngineProcess | None
    """Of the leader alone; it has imported TensorRT-LLM."""


class Part:
    """Common life of leader and member: it runs until its task ends, and then tells how."""

    def __init__(self, parts: EngineParts, events: PipelineEvents, settings: EngineSettings) -> None:
        self.parts = parts
        self.id = parts.position.pipeline.id
        self._events = events
        self._settings = settings
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """The cause; empty: as it was told to."""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._main())

    def abort(self, cause: str) -> None:
        """Give up at once."""
        self._end(cause)

    async def join(self) -> None:
        """Until it is over."""
        if self._task is not None:
            await asyncio.wait({self._task})

    def _end(self, cause: str) -> None:
        if not self._ended.done():
            self._ended.set_result(cause)

    async def _main(self) -> None:
        try:
            cause = await self._run()
        except EngineUnavailable as error:
            self._events.on_start_failed(self.id, str(error))
            return
        except PipelineBroken as error:
            cause = error.cause
        except Exception as error:  # A bug: the pipeline is broken, the rank goes on.
            logger.exception("pipeline=%s event=failed", self.id)
            cause = f"{type(error).__name__}: {error}"
        if cause:
            self._events.on_broken(self.id, cause)
        else:
            self._events.on_stopped(self.id, 0)

    async def _run(self) -> str:
        raise NotImplementedError

    async def _wait_before(self, devices: list[str]) -> None:
        """Raises EngineUnavailable if an engine that ended has not given them back; our own process may be there."""
        busy = await gpus.wait_until_free(
            devices, self._settings.gpu_free_timeout_s, lambda pid: pipeline_of(pid) not in (None, self.id)
        )
        if busy is not None:
            raise EngineUnavailable(f"{busy}: an engine that ended has not given it back")

    async def _wait_after(self, devices: list[str]) -> str | None:
        """Until ours is gone; the next one may have come already."""
        return await gpus.wait_until_free(
            devices, self._settings.gpu_free_timeout_s, lambda pid: pipeline_of(pid) == self.id
        )


class MemberPart(Part):
    """Its device belongs to the leader's engine for as long as the leader's connection stands."""

    async def _run(self) -> str:
        position = self.parts.position
        device = gpus.names([self.parts.device], os.environ)
        await self._wait_before(device)
        address = position.addresses[position.pipeline.leader].store_address
        try:
            link = await LeaderLink.join(address, self.id, self.parts.rank)
        except (OSError, TimeoutError) as error:
            return f"the leader {position.pipeline.leader} does not answer at {address}: {error}"
        hearing = asyncio.create_task(self._hear(link))
        try:
            cause = await self._ended
        finally:
            hearing.cancel()
            link.close()
        await self._wait_after(device)
        return cause

    async def _hear(self, link: LeaderLink) -> None:
        while not self._ended.done():
            message = await link.hear()
            if isinstance(message, Ready):
                self._events.on_ready(self.id)
            elif isinstance(message, Over):
                self._end(message.cause)


def discard(parts: EngineParts) -> None:
    """Forget what was prepared."""
    if parts.process is not None:
        with contextlib.suppress(OSError):
            parts.process.kill_now()
