"""How many instances of which market the fleet should have (the second half of SpotServe's Algorithm 1).

When instances are short, spot and on-demand are asked for at once: whichever comes first serves. On-demand is given
back first, as soon as ready spot instances suffice. A few spot instances more than needed are kept as candidates that
take over at once. The answer depends on the present fleet and load alone, so it can be asked for at any time; a fleet
between what is needed and what would be needed with a margin stays as it is, so it does not flap.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Self

import msgspec

from planner.core.config_optimizer import Supply, Targets, choose_layout
from planner.core.cost_model import CostModel
from planner.core.layout import Layout, Scorer
from planner.core.situation import CALM_S
from planner.protocol import DesiredCapacity, InstanceState, InstanceStatus, Market, Plan

RELEASE_MARGIN: Final = 0.25
"""Instances are given back only if the rest would also serve so many more arrivals."""
HISTORY_S: Final = 3600.0
"""Older events say nothing of the present market."""

LIVING: Final = (InstanceState.REQUESTED, InstanceState.STARTING, InstanceState.READY)


def expected_calm_s(event_times_s: Sequence[float], now_s: float, *, since_s: float) -> float:
    """Expected time to the next capacity event, from those seen since `since_s` (at most HISTORY_S ago).

    The mean of an exponential whose rate has a Gamma prior worth one event in CALM_S.
    """
    watched_s = min(max(0.0, now_s - since_s), HISTORY_S)
    num_events = sum(now_s - watched_s <= at_s <= now_s for at_s in event_times_s)
    return (CALM_S + watched_s) / (1 + num_events)


class CapacityLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator allows. Raises ValueError, which names the field."""

    min_spot: int = 0
    max_spot: int = 8
    min_on_demand: int = 0
    max_on_demand: int = 0
    candidate_pool: int = 2
    """Spot instances beyond those that are needed."""
    max_usd_per_h: float | None = None
    """Of the whole fleet; None: no limit."""
    spot_usd_per_h: float = 0.0
    """Of one instance; 0: not known."""
    on_demand_usd_per_h: float = 0.0

    def __post_init__(self) -> None:
        for low, high in (("min_spot", "max_spot"), ("min_on_demand", "max_on_demand")):
            if not 0 <= getattr(self, low) <= getattr(self, high):
                raise ValueError(f"{low}: {getattr(self, low)} is not between 0 and {high} ({getattr(self, high)})")
        for name in ("candidate_pool", "spot_usd_per_h", "on_demand_usd_per_h"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)} is not a number from 0 up")
        if self.max_usd_per_h is not None:
            if not self.spot_usd_per_h > 0 or not self.on_demand_usd_per_h > 0:
                raise ValueError("max_usd_per_h: a price limit needs both prices")
            least = self.usd_per_h(self.min_spot, self.min_on_demand)
            if not least <= self.max_usd_per_h:
                raise ValueError(f"max_usd_per_h: {self.max_usd_per_h} does not pay for the floors ({least:.2f})")

    def usd_per_h(self, spot: int, on_demand: int) -> float:
        """Price of so many instances."""
        return spot * self.spot_usd_per_h + on_demand * self.on_demand_usd_per_h

    def allows(self, spot: int, on_demand: int) -> bool:
        """The price limit does."""
        return self.max_usd_per_h is None or self.usd_per_h(spot, on_demand) <= self.max_usd_per_h + 1e-9

    @property
    def max_instances(self) -> int:
        """As many as limits and price allow, the cheaper market first."""
        spot, on_demand = self.min_spot, self.min_on_demand
        while spot < self.max_spot and self.allows(spot + 1, on_demand):
            spot += 1
        while on_demand < self.max_on_demand and self.allows(spot, on_demand + 1):
            on_demand += 1
        return spot + on_demand


class FleetCount(msgspec.Struct, frozen=True, kw_only=True):
    """Instances that live, or will; those under notice are not counted."""

    ready_spot: int = 0
    ready_on_demand: int = 0
    starting_spot: int = 0
    """Requested or starting."""
    starting_on_demand: int = 0

    @classmethod
    def of(cls, statuses: Iterable[InstanceStatus]) -> Self:
        numbers = Counter((s.state is InstanceState.READY, s.market) for s in statuses if s.state in LIVING)
        return cls(
            ready_spot=numbers[True, Market.SPOT],
            ready_on_demand=numbers[True, Market.ON_DEMAND],
            starting_spot=numbers[False, Market.SPOT],
            starting_on_demand=numbers[False, Market.ON_DEMAND],
        )

    @property
    def ready(self) -> int:
        return self.ready_spot + self.ready_on_demand

    @property
    def spot(self) -> int:
        return self.ready_spot + self.starting_spot

    @property
    def on_demand(self) -> int:
        return self.ready_on_demand + self.starting_on_demand


def desired_capacity(
    costs: CostModel,
    targets: Targets,
    num_ranks_per_instance: int,
    fleet: FleetCount,
    limits: CapacityLimits,
    *,
    peak_per_s: float = 0.0,
) -> DesiredCapacity:
    """What the fleet should have for the workload of `costs`, within `limits`.

    `peak_per_s`: arrivals that were seen lately; what they need is asked for no more, and not given back yet.
    """
    arrivals_per_s = costs.workload.arrivals_per_s
    most = limits.max_instances
    needed, layout = _needed_instances(costs, targets, num_ranks_per_instance, most, arrivals_per_s)
    if layout is None:
        return DesiredCapacity(
            spot=_clamp(fleet.spot, limits.min_spot, limits.max_spot),
            on_demand=_clamp(fleet.on_demand, limits.min_on_demand, limits.max_on_demand),
            reason=f"the model does not fit on {most} instances of {num_ranks_per_instance} ranks, the most allowed",
        )
    with_margin, _ = _needed_instances(
        costs, targets, num_ranks_per_instance, most, max(arrivals_per_s * (1 + RELEASE_MARGIN), peak_per_s)
    )
    with_margin = max(needed, with_margin)
    beside = limits.candidate_pool - limits.min_on_demand
    spot = _clamp(fleet.spot, needed + beside, with_margin + beside)
    on_demand = _clamp(fleet.on_demand, needed - fleet.ready_spot, with_margin - fleet.ready_spot)
    wanted = (
        _clamp(spot, limits.min_spot, limits.max_spot),
        _clamp(on_demand, limits.min_on_demand, limits.max_on_demand),
    )
    spot, on_demand = _within_price(*wanted, needed, fleet, limits)
    reason = f"{needed} instances for {arrivals_per_s:.2f} requests/s ({layout})"
    if with_margin > needed:
        reason += f", up to {with_margin} kept"
    if fleet.ready < needed:
        reason += f"; {needed - fleet.ready} short: spot and on-demand asked for at once"
    if (spot, on_demand) != wanted:
        reason += f"; {limits.max_usd_per_h:.2f} USD/h do not pay for {wanted[0]} spot and {wanted[1]} on-demand"
    return DesiredCapacity(spot=spot, on_demand=on_demand, reason=reason)


def instances_to_release(
    desired: DesiredCapacity, statuses: Iterable[InstanceStatus], plan: Plan | None, kv_tokens: Mapping[str, int]
) -> list[str]:
    """What the fleet has beyond `desired`, in the order of release; `kv_tokens` by instance."""
    surplus = Counter({Market.SPOT: -desired.spot, Market.ON_DEMAND: -desired.on_demand})
    ordered = release_order(statuses, plan, kv_tokens)
    surplus.update(status.market for status in ordered)
    released = []
    for status in ordered:
        if surplus[status.market] > 0:
            surplus[status.market] -= 1
            released.append(status.id)
    return released


def release_order(
    statuses: Iterable[InstanceStatus], plan: Plan | None, kv_tokens: Mapping[str, int]
) -> list[InstanceStatus]:
    """Living instances, the one to give back first first: on-demand, then those that serve least."""
    pipelines = plan.pipelines if plan is not None else []
    num_positions = Counter(shard.instance for p in pipelines for stage in p.stages for shard in stage.shards)
    return sorted(
        (status for status in statuses if status.state in LIVING),
        key=lambda s: (s.market is not Market.ON_DEMAND, num_positions[s.id], kv_tokens.get(s.id, 0), s.id),
    )


def _needed_instances(
    costs: CostModel, targets: Targets, num_ranks_per_instance: int, most: int, arrivals_per_s: float
) -> tuple[int, Layout | None]:
    """Instances of the layout that Algorithm 1 would choose if it could have `most`, the cheapest of near-ties."""
    supply = Supply(
        num_ranks=most * num_ranks_per_instance,
        num_ranks_per_instance=num_ranks_per_instance,
        num_paid_instances=0,
    )
    best = choose_layout(costs, supply, targets, scorer=Scorer(costs, arrivals_per_s)).best
    return (supply.num_instances(best.layout), best.layout) if best is not None else (0, None)


def _within_price(spot: int, on_demand: int, needed: int, fleet: FleetCount, limits: CapacityLimits) -> tuple[int, int]:
    """Fewer, until the price limit allows it: candidates go first, instances that are ready and needed last."""
    ready_on_demand = min(fleet.ready_on_demand, max(0, needed - fleet.ready_spot))
    steps = (
        (max(limits.min_spot, needed), on_demand),
        (max(limits.min_spot, needed), max(limits.min_on_demand, ready_on_demand)),
        (max(limits.min_spot, fleet.ready_spot), max(limits.min_on_demand, ready_on_demand)),
        (max(limits.min_spot, fleet.ready_spot), limits.min_on_demand),
        (limits.min_spot, limits.min_on_demand),
    )
    for least_spot, least_on_demand in steps:
        while not limits.allows(spot, on_demand) and on_demand > least_on_demand:
            on_demand -= 1
        while not limits.allows(spot, on_demand) and spot > least_spot:
            spot -= 1
    return spot, on_demand


def _clamp(value: int, low: int, high: int) -> int:
    """Within the bounds; `high` counts if they cross."""
    return min(max(value, low), high)
