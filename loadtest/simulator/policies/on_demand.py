"""A constant fleet of on-demand instances, with our engine and our choice of configuration: nothing ever happens."""

from __future__ import annotations

import msgspec

from loadtest.errors import SimulationError
from loadtest.simulator.policies.base import OnProgress
from loadtest.simulator.policies.spotserve import SpotServe
from loadtest.simulator.result import Result
from loadtest.simulator.scenario import CapacityEvent, CapacityTrace, Scenario, lifetimes
from planner.protocol import Market


class OnDemand:
    """`num_instances`; None: as many as the trace of the scenario has at its beginning."""

    def __init__(self, num_instances: int | None = None, name: str | None = None) -> None:
        if num_instances is not None and num_instances < 1:
            raise ValueError(f"num_instances: {num_instances} is not positive")
        self.name = name or ("on-demand" if num_instances is None else f"on-demand-{num_instances}")
        self._num_instances = num_instances

    def run(self, scenario: Scenario, on_progress: OnProgress) -> Result:
        num = self._num_instances or sum(life.usable_s <= 0 for life in lifetimes(scenario.trace))
        if num == 0:
            raise SimulationError(f"{scenario.name}: its trace begins without instances: say how many on-demand ones")
        names = tuple(f"on-demand-{index}" for index in range(num))
        event = CapacityEvent(at_s=0.0, added=names, market=Market.ON_DEMAND)
        trace = CapacityTrace(name=self.name, events=(event,), end_s=scenario.trace.end_s)
        return SpotServe(name=self.name).run(msgspec.structs.replace(scenario, trace=trace), on_progress)
