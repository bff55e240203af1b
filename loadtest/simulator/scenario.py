"""What a simulation is given: model, fleet over time, requests, prices. Times are in seconds since the trace began."""

from __future__ import annotations

import math
from typing import Final

import msgspec

from planner.core.links import Links
from planner.core.profile import Profile
from planner.protocol import Market, ModelShape


class Request(msgspec.Struct, frozen=True, kw_only=True):
    id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int


class CapacityEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Instances become usable (`added`) or are gone (`removed`) at `at_s`; a notice precedes a removal."""

    at_s: float
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    market: Market = Market.SPOT
    """Of `added`."""
    required_per_s: float | None = None
    """The artifact's scripted throughput target, from now on."""


class CapacityTrace(msgspec.Struct, frozen=True, kw_only=True):
    """Events ascending in time; checked when it was read."""

    name: str
    events: tuple[CapacityEvent, ...]
    end_s: float


class Lifetime(msgspec.Struct, frozen=True, kw_only=True):
    """One instance of a trace."""

    instance: str
    market: Market
    usable_s: float
    gone_s: float | None
    """None: it outlives the trace."""

    def rented_s(self, acquisition_s: float) -> float:
        """Since when it is paid for: those that are there at the start were acquired before."""
        return max(0.0, self.usable_s - acquisition_s)


def lifetimes(trace: CapacityTrace) -> list[Lifetime]:
    """In the order in which they become usable."""
    gone_s = {name: event.at_s for event in trace.events for name in event.removed}
    return [
        Lifetime(instance=name, market=event.market, usable_s=event.at_s, gone_s=gone_s.get(name))
        for event in trace.events
        for name in event.added
    ]


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """US dollars an hour of one instance."""

    spot_per_h: float
    on_demand_per_h: float

    def per_h(self, market: Market) -> float:
        return self.spot_per_h if market is Market.SPOT else self.on_demand_per_h


PAPER_PRICES: Final = Prices(spot_per_h=1.9046, on_demand_per_h=3.912)
"""g4dn.12xlarge, in the artifact's plot script."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    model: ModelShape
    profile: Profile
    trace: CapacityTrace
    requests: tuple[Request, ...]
    """Ascending in arrival; those after the end of the trace are not sent."""
    ranks_per_instance: int
    memory_bytes: int
    """Of each rank, for weights, KV, activations and migration buffers together."""
    links: Links
    prices: Prices = PAPER_PRICES
    required_per_s: float = 0.0
    """The artifact's constant throughput target; our planner measures the arrivals instead."""
    min_ranks: int = 1
    """The artifact's least number of ranks that hold the model; our planner computes it."""
    max_batch: int = 8
    notice_s: float = 30.0
    acquisition_s: float = 120.0
    """From the request of an instance until it is usable. Traces give the time at which it is usable."""
    seed: int = 0
    drain_s: float = math.inf
    """How long after the end of the trace the last requests may still finish, on the fleet of its end; 0: cut at
    once. Whatever has not finished then counts as unfinished."""
