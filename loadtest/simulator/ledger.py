"""What a run costs and what became of the fleet: instances by rent, samples of the fleet, changes."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from loadtest.simulator.clock import Clock
from loadtest.simulator.pipelines import Change
from loadtest.simulator.result import FleetSample, Pause, Result
from loadtest.simulator.scenario import Scenario
from loadtest.simulator.service import Service
from planner.protocol import Market


class _Rent(msgspec.Struct):
    market: Market
    from_s: float
    until_s: float | None = None
    is_usable: bool = False


class Ledger:
    """Times outside 0 .. `end_s` of the trace are not paid for."""

    def __init__(self, clock: Clock, scenario: Scenario) -> None:
        self._clock = clock
        self._scenario = scenario
        self._rents: dict[str, _Rent] = {}
        self._samples: list[FleetSample] = []
        self._changes: list[Change] = []

    def rent(self, instance: str, market: Market, from_s: float | None = None) -> None:
        """It is paid for from now on, or from `from_s`; an id is rented once."""
        assert instance not in self._rents, f"{instance} is rented twice"
        self._rents[instance] = _Rent(market, self._clock.now_s if from_s is None else from_s)

    def usable(self, instance: str) -> None:
        self._rents[instance].is_usable = True

    def end(self, instance: str) -> None:
        """Gone or given back."""
        rent = self._rents[instance]
        assert rent.until_s is None, f"{instance} ends twice"
        rent.until_s, rent.is_usable = self._clock.now_s, False

    def change(self, cause: str) -> Change:
        self._changes.append(Change(self._clock.now_s, cause))
        return self._changes[-1]

    def sample(self, shapes: Iterable[tuple[int, int]]) -> None:
        """(pipeline, tensor) of each pipeline that serves from now on."""
        shapes = tuple(shapes)
        usable = [rent.market for rent in self._rents.values() if rent.is_usable]
        sample = FleetSample(
            at_s=max(0.0, self._clock.now_s),
            num_spot=usable.count(Market.SPOT),
            num_on_demand=usable.count(Market.ON_DEMAND),
            shapes=shapes,
            num_ranks_used=sum(pipeline * tensor for pipeline, tensor in shapes),
        )
        if self._samples and self._samples[-1].at_s == sample.at_s:
            self._samples.pop()
        if not self._samples or msgspec.structs.replace(sample, at_s=self._samples[-1].at_s) != self._samples[-1]:
            self._samples.append(sample)

    def result(self, policy: str, service: Service) -> Result:
        """At the end of the run; pauses are the changes that stopped a sequence or moved bytes."""
        end_s = self._clock.now_s
        hours = {market: sum(self._hours(r) for r in self._rents.values() if r.market is market) for market in Market}
        return Result(
            policy=policy,
            scenario=self._scenario.name,
            outcomes=service.outcomes(end_s),
            fleet=tuple(self._samples),
            pauses=tuple(_pause(c) for c in self._changes if c.pause_s or c.moved_bytes or c.tokens_recomputed),
            cost_usd=sum(hours[market] * self._scenario.prices.per_h(market) for market in Market),
            instance_hours_spot=hours[Market.SPOT],
            instance_hours_on_demand=hours[Market.ON_DEMAND],
            end_s=end_s,
        )

    def _hours(self, rent: _Rent) -> float:
        end_s = self._scenario.trace.end_s
        until_s = end_s if rent.until_s is None else min(rent.until_s, end_s)
        return max(0.0, until_s - max(0.0, rent.from_s)) / 3600


def _pause(change: Change) -> Pause:
    return Pause(
        at_s=max(0.0, change.at_s),
        cause=change.cause,
        pause_s=change.pause_s,
        moved_bytes=change.moved_bytes,
        tokens_recomputed=change.tokens_recomputed,
    )
