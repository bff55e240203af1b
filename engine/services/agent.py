"""The agent of an instance: starts and watches its ranks, reports what they hold, shows that the instance lives.

No torch here: the agent must answer also while its ranks compute.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections import deque
from typing import Final

from engine.errors import EngineError, SettingError
from engine.protocol import RankReport
from engine.services.bus import Bus
from engine.settings import PREFIX, EngineSettings
from planner.protocol import InstanceInventory, Phase, RankProgress

logger = logging.getLogger(__name__)

HEARTBEAT_S: Final = 0.5
_INVENTORY_PERIOD_S: Final = 2.0
_MAX_CRASHES: Final = 3
_CRASH_WINDOW_S: Final = 60.0
_STOP_TIMEOUT_S: Final = 8.0
RANK_VARIABLE: Final = PREFIX + "RANK_INDEX"


class RanksKeepCrashing(EngineError):
    """A rank crashed again and again; its log says why."""


class Agent:
    """One instance. `run` returns when it is told to stop."""

    def __init__(self, settings: EngineSettings, bus: Bus) -> None:
        self._settings = settings
        self._bus = bus
        self._reports: dict[str, RankReport] = {}
        self._last_report: RankReport | None = None
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._crashes_s: deque[float] = deque()
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._liveness_address = ""

    async def run(self) -> None:
        """Serve until `stop`.

        Raises:
            RanksKeepCrashing: a rank cannot be kept alive.
            SettingError: `host` is not an address of this machine.

        """
        settings = self._settings
        try:
            server = await asyncio.start_server(self._show_life, settings.host, 0)
        except OSError as error:
            raise SettingError(PREFIX + "HOST", f"cannot listen on {settings.host!r}: {error.strerror}") from error
        self._liveness_address = f"{settings.host}:{server.sockets[0].getsockname()[1]}"
        for index in range(settings.num_ranks):
            rank = settings.rank_id(index)
            await self._bus.subscribe(self._bus.engine.report(rank), RankReport, self._on_report)
        tasks: list[asyncio.Task[object]] = [
            asyncio.create_task(self._keep_rank(index)) for index in range(settings.num_ranks)
        ]
        tasks += [asyncio.create_task(self._publish_inventory()), asyncio.create_task(self._stopping.wait())]
        logger.info("agent ready instance=%s ranks=%d", settings.instance, settings.num_ranks)
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._stop_ranks()
            server.close()

    def stop(self) -> None:
        self._stopping.set()

    async def _show_life(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A byte now and then, until the peer or this instance goes away."""
        with contextlib.suppress(OSError):
            while not self._stopping.is_set() and not reader.at_eof():
                writer.write(b".")
                await writer.drain()
                await asyncio.sleep(HEARTBEAT_S)
        writer.close()

    # --- ranks ------------------------------------------------------------------------------------------------

    async def _keep_rank(self, index: int) -> None:
        rank = self._settings.rank_id(index)
        while True:
            # A rank ends when its standard input does, so none outlives its agent.
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "engine",
                stdin=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, RANK_VARIABLE: str(index)},
            )
            self._processes[index] = process
            assert process.stderr is not None
            last_words = await _forward(process.stderr)
            code = await process.wait()
            logger.error("rank=%s event=exited code=%d", rank, code)
            await self._report_crash(rank, code, last_words)

    async def _report_crash(self, rank: str, code: int, last_words: str) -> None:
        report = self._reports.pop(rank, None)
        self._changed.set()
        if report is not None and report.inventory.pipeline is not None:
            progress = RankProgress(
                rank=rank,
                epoch=report.epoch,
                pipeline=report.inventory.pipeline,
                phase=Phase.BROKEN,
                at_s=time.time(),
                detail=f"the rank's process ended with {code}",
            )
            await self._bus.publish(self._bus.planner.progress(report.epoch), progress)
        now_s = time.monotonic()
        self._crashes_s.append(now_s)
        while now_s - self._crashes_s[0] > _CRASH_WINDOW_S:
            self._crashes_s.popleft()
        if report is None or len(self._crashes_s) > _MAX_CRASHES:
            # It never came up, or does not stay up: the instance is of no use.
            raise RanksKeepCrashing(f"rank {rank} ended with {code}: {last_words or 'it said nothing'}")

    async def _stop_ranks(self) -> None:
        running = [p for p in self._processes.values() if p.returncode is None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        if not running:
            return
        ends = [asyncio.create_task(process.wait()) for process in running]
        await asyncio.wait(ends, timeout=_STOP_TIMEOUT_S)
        for process in running:
            if process.returncode is None:
                logger.warning("pid=%d event=rank_does_not_stop", process.pid)
                process.kill()
        await asyncio.gather(*ends)

    # --- inventory --------------------------------------------------------------------------------------------

    async def _on_report(self, report: RankReport, _headers: dict[str, str]) -> None:
        before = self._reports.get(report.inventory.rank)
        self._reports[report.inventory.rank] = self._last_report = report
        if before != report:
            self._changed.set()

    async def _publish_inventory(self) -> None:
        while True:
            self._changed.clear()
            if self._last_report is not None:
                inventory = self._inventory(self._last_report)
                await self._bus.publish(self._bus.planner.inventory(self._settings.instance), inventory)
                await self._bus.put_inventory(self._settings.instance, inventory)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_INVENTORY_PERIOD_S):
                    await self._changed.wait()

    def _inventory(self, last: RankReport) -> InstanceInventory:
        """What the ranks hold that are there; a rank that has died is not named, also if it was the only one."""
        reports = [self._reports[rank] for rank in sorted(self._reports)]
        return InstanceInventory(
            instance=self._settings.instance,
            market=self._settings.market,
            liveness_address=self._liveness_address,
            model=last.model,
            ranks=[report.inventory for report in reports],
            profile=last.profile,
            # What holds of every rank: the planner concludes from it which pipelines have stopped.
            epoch=min((report.epoch for report in reports), default=0),
        )


async def _forward(lines: asyncio.StreamReader) -> str:
    """Pass a rank's messages on to our own standard error; returns its last words, without the program's name."""
    last = ""
    while line := await lines.readline():
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
        last = line.decode(errors="replace").strip() or last
    return last.removeprefix("engine: ")
