"""Ours in a market: what the planner wants is rented, spot and on-demand, as `spotserve up --autoscale` does.

`spotserve` rents every instance that a trace offers and no other; this one rents what the load needs, on-demand where
spot is short, in the market of `replicas` and with its rules.
"""

from __future__ import annotations

from loadtest.simulator.policies.base import OnProgress
from loadtest.simulator.policies.spotserve import Fleet, SpotServeOptions
from loadtest.simulator.policies.step_times import fleet_sizes
from loadtest.simulator.result import Result
from loadtest.simulator.scenario import Scenario
from planner.core.capacity import CapacityLimits
from planner.protocol import Market


class SpotServeMixed:
    """`max_usd_per_h`: the fleet costs no more; None: than the trace's largest
    spot fleet would on demand.
    """

    def __init__(self, max_usd_per_h: float | None = None, name: str = "spotserve-mixed") -> None:
        self.name = name
        self._max_usd_per_h = max_usd_per_h

    def run(self, scenario: Scenario, on_progress: OnProgress) -> Result:
        limits = market_limits(scenario, self._max_usd_per_h)
        return Fleet(scenario, SpotServeOptions(), on_progress, limits).run(self.name)


def market_limits(scenario: Scenario, max_usd_per_h: float | None = None) -> CapacityLimits:
    """As many instances of each market as the trace has spot ones at most, within the money."""
    most = max(1, fleet_sizes(scenario.trace, {Market.SPOT})[-1])
    return CapacityLimits(
        max_spot=most,
        max_on_demand=most,
        max_usd_per_h=most * scenario.prices.on_demand_per_h if max_usd_per_h is None else max_usd_per_h,
        spot_usd_per_h=scenario.prices.spot_per_h,
        on_demand_usd_per_h=scenario.prices.on_demand_per_h,
    )
