"""Hold a TCP connection to every instance: a dead one is known as soon as its kernel closes the socket."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from planner.core.effects import InstanceReached
from planner.protocol import InstanceLost

CONNECT_TIMEOUT_S: Final = 2.0
PROBE_TIMEOUT_S: Final = 0.2
"""Long for a living host (its kernel answers), short for a dead one."""
LATE_READ_S: Final = 0.1
"""If this process was the one that slept, the bytes are there already."""

T = TypeVar("T")
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Liveness:
    """Calls `report` with InstanceReached, and once with InstanceLost when an instance is gone."""

    def __init__(self, report: Callable[[InstanceReached | InstanceLost], None], heartbeat_timeout_s: float) -> None:
        self._report = report
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._watches: dict[str, tuple[str, asyncio.Task[None]]] = {}
        self._probes: set[asyncio.Task[None]] = set()

    def watch(self, instance: str, address: str) -> None:
        """Begin to watch; nothing to do if this address is watched already."""
        watched = self._watches.get(instance)
        if watched is not None:
            if watched[0] == address and not watched[1].done():
                return
            watched[1].cancel()
        task = asyncio.create_task(self._watch(instance, address), name=f"watch {instance}")
        self._watches[instance] = (address, task)

    def forget(self, instance: str) -> None:
        _, task = self._watches.pop(instance, ("", None))
        if task is not None:
            task.cancel()

    def probe(self, instances: list[str]) -> None:
        """Try a second connection to each now; report those that refuse."""
        for instance in instances:
            if instance in self._watches:
                task = asyncio.create_task(self._probe(instance, self._watches[instance][0]))
                self._probes.add(task)
                task.add_done_callback(self._probes.discard)

    async def close(self) -> None:
        tasks = [task for _, task in self._watches.values()] + list(self._probes)
        self._watches.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, instance: str, address: str) -> None:
        try:
            connection = await _connect(address, CONNECT_TIMEOUT_S)
            self._report(InstanceReached(instance=instance))
            while True:
                reason = await self._listen(connection)
                if reason:
                    break
                connection = await _connect(address, PROBE_TIMEOUT_S)
        except (OSError, TimeoutError, ValueError) as error:
            reason = f"no connection to {address}: {str(error) or 'timed out'}"
        self._lost(instance, reason)

    async def _listen(self, connection: Connection) -> str:
        """Until it ends: why the instance is lost, or an empty string if the connection broke and may be renewed."""
        reader, writer = connection
        try:
            while await self._read(reader):
                pass
            return ""
        except TimeoutError:
            return f"silent for {self._heartbeat_timeout_s:g} s"
        except OSError:
            return ""
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        with contextlib.suppress(TimeoutError):
            return await _within(self._heartbeat_timeout_s, reader.read(4096))
        return await _within(LATE_READ_S, reader.read(4096))

    async def _probe(self, instance: str, address: str) -> None:
        try:
            _, writer = await _connect(address, PROBE_TIMEOUT_S)
            writer.close()
        except (OSError, TimeoutError, ValueError) as error:
            self._lost(instance, f"probe of {address} failed: {str(error) or 'timed out'}")

    def _lost(self, instance: str, reason: str) -> None:
        self._report(InstanceLost(instance=instance, reason=reason, detected_at_s=time.time()))


async def _within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    async with asyncio.timeout(seconds):
        return await work


async def _connect(address: str, timeout_s: float) -> Connection:
    """Raises OSError, TimeoutError, and ValueError if `address` is not `host:port`."""
    host, _, port = address.rpartition(":")
    return await _within(timeout_s, asyncio.open_connection(host.strip("[]"), int(port)))
