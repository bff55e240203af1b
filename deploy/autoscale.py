"""Follows the planner's desired capacity: launches local instances, and gives back those that are not needed."""

from __future__ import annotations

import asyncio
import contextlib

from deploy.cloud import LocalCloud
from deploy.default_model import Say
from deploy.errors import CommandError
from planner.protocol import DesiredCapacity, Market

RECONCILE_S = 5.0
"""The fleet is compared again so often: instances end although what is wanted stays the same."""
RELEASE_NOTICE_S = 10.0
"""A release is a preemption that we ask for ourselves: streams have so long to move."""


class Autoscaler:
    """Brings the instances of `cloud` to what was wanted last."""

    def __init__(self, cloud: LocalCloud, say: Say) -> None:
        self._cloud = cloud
        self._say = say
        self._desired: DesiredCapacity | None = None
        self._changed = asyncio.Event()

    async def follow(self, desired: DesiredCapacity) -> None:
        """From now on this many."""
        self._desired = desired
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            if self._desired is not None:
                await self._reconcile(self._desired)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECONCILE_S):
                    await self._changed.wait()
            self._changed.clear()

    async def _reconcile(self, desired: DesiredCapacity) -> None:
        for market, wanted in ((Market.SPOT, desired.spot), (Market.ON_DEMAND, desired.on_demand)):
            missing = wanted - self._num_staying(market)
            if missing > 0:
                self._say(f"autoscale: {missing} more {market} ({desired.reason})")
            for _ in range(missing):
                with contextlib.suppress(CommandError):  # it has been said, and is tried again
                    await self._cloud.add(market)
        for name in desired.release:
            await self._release(name, desired)

    def _num_staying(self, market: Market) -> int:
        return sum(one.market is market and one.deadline_s is None for one in self._cloud.instances.values())

    async def _release(self, name: str, desired: DesiredCapacity) -> None:
        instance = self._cloud.instances.get(name)
        wanted = {Market.SPOT: desired.spot, Market.ON_DEMAND: desired.on_demand}
        if instance is None or instance.deadline_s is not None:
            return
        if self._num_staying(instance.market) > wanted[instance.market]:
            self._say(f"autoscale: {name} is given back ({desired.reason})")
            with contextlib.suppress(CommandError):  # NATS is away: it goes at its deadline all the same
                await self._cloud.preempt(name, RELEASE_NOTICE_S)
