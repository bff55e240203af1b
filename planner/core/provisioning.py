"""Keeps asking how many instances the fleet should have, and says so when the answer changes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import msgspec

from planner.core.capacity import CapacityLimits, FleetCount, desired_capacity, instances_to_release
from planner.core.config_optimizer import Targets
from planner.core.cost_model import CostModel
from planner.core.fleet import Fleet
from planner.protocol import DesiredCapacity, Market, Plan

REVIEW_S: Final = 5.0
"""A change of load alone is looked at no more often."""


class Provisioning:
    def __init__(self, limits: CapacityLimits) -> None:
        self.limits = limits
        self.desired: DesiredCapacity | None = None
        """The answer that was published last."""
        self.is_due = True
        self._answered_at_s = -math.inf

    @property
    def num_paid(self) -> int:
        """Instances that are kept whether they serve or not: candidates may as well serve."""
        return self.desired.spot + self.desired.on_demand if self.desired is not None else 0

    def note_change(self) -> None:
        """Of the fleet or its plan."""
        self.is_due = True

    def note_load(self, now_s: float) -> None:
        self.is_due = self.is_due or now_s >= self._answered_at_s + REVIEW_S

    def usd_per_rank_h(self, markets: Iterable[tuple[Market, int]]) -> float:
        """Mean price of a rank; `markets` has the number of ranks of each living instance. 0: not known."""
        prices = {Market.SPOT: self.limits.spot_usd_per_h, Market.ON_DEMAND: self.limits.on_demand_usd_per_h}
        known = [(prices[market], num_ranks) for market, num_ranks in markets]
        return sum(price for price, _ in known) / max(1, sum(num_ranks for _, num_ranks in known))

    def answer(
        self,
        costs: CostModel | None,
        targets: Targets,
        fleet: Fleet,
        plan: Plan | None,
        peak_per_s: float,
        now_s: float,
        *,
        may_release: bool,
    ) -> DesiredCapacity | None:
        """What the fleet should have, if that has changed.

        `costs` is None until an instance has shown the model. `peak_per_s`: arrivals that were seen lately; without
        `may_release` they have not been watched for long enough to give anything back.
        """
        self.is_due, self._answered_at_s = False, now_s
        statuses = fleet.statuses()
        count = FleetCount.of(statuses)
        if costs is None:
            desired = self._first(count)
        else:
            num_ranks = fleet.num_ranks_per_instance()
            desired = desired_capacity(costs, targets, num_ranks, count, self.limits, peak_per_s=peak_per_s)
            if not may_release:
                spot, on_demand = max(desired.spot, count.spot), max(desired.on_demand, count.on_demand)
                desired = msgspec.structs.replace(desired, spot=spot, on_demand=on_demand)
            release = instances_to_release(desired, statuses, plan, fleet.kv_tokens())
            desired = msgspec.structs.replace(desired, release=release)
        if self.desired is not None and _numbers(desired) == _numbers(self.desired):
            return None
        self.desired = msgspec.structs.replace(desired, decided_at_s=now_s)
        return self.desired

    def _first(self, count: FleetCount) -> DesiredCapacity:
        limits = self.limits
        spot, on_demand = max(limits.min_spot, count.spot), max(limits.min_on_demand, count.on_demand)
        if spot + on_demand == 0:
            spot, on_demand = (1, 0) if limits.max_spot else (0, min(1, limits.max_on_demand))
        return DesiredCapacity(spot=spot, on_demand=on_demand, reason="no instance has joined yet and shown the model")


def _numbers(desired: DesiredCapacity) -> tuple[int, int, list[str]]:
    return desired.spot, desired.on_demand, desired.release
