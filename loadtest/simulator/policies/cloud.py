"""Where the instances of our fleet come from: a trace as it is, or a market in which the fleet rents what it wants."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from loadtest.simulator.clock import Clock
from loadtest.simulator.scenario import Lifetime, Scenario, lifetimes
from planner.protocol import DesiredCapacity, Market

START_S: Final = -1.0
"""The fleet of the trace's beginning has joined and serves before time 0."""
ON_DEMAND_START_S: Final = -0.5
"""The fleet of the beginning has on-demand instances only for what its spot instances lack."""
RELEASE_NOTICE_S: Final = 10.0
"""An instance that is given back is told so long before, as `spotserve up --autoscale` does."""


class Tenant(Protocol):
    """Who has the instances."""

    def launch(self, instance: str, market: Market) -> None: ...

    def join(self, instance: str, market: Market) -> None: ...

    def notice(self, instance: str, deadline_s: float) -> None: ...

    def lose(self, instance: str, reason: str) -> None:
        """Also of an instance that was launched and has not joined."""

    def observe_market(self, num_spot: int) -> None:
        """So many spot instances can be had, those that are rented included."""


class Cloud(Protocol):
    def begin(self) -> None:
        """Before the clock runs."""

    def follow(self, desired: DesiredCapacity) -> None:
        """What the planner wants from now on."""


def schedule_offers(
    scenario: Scenario,
    clock: Clock,
    *,
    offer: Callable[[Lifetime], None],
    withdraw: Callable[[str, float], None],
    end: Callable[[str], None],
) -> None:
    """A market of the trace's spot instances: each is offered so early that it can be usable as in the trace, withdrawn
    (with the second it ends at) by its notice, and ended.
    """
    for life in lifetimes(scenario.trace):
        if life.market is Market.SPOT and life.usable_s <= scenario.trace.end_s:
            clock.at(START_S if life.usable_s <= 0 else life.rented_s(scenario.acquisition_s), partial(offer, life))
            if life.gone_s is not None and life.gone_s <= scenario.trace.end_s:
                notice_s = max(0.0, life.gone_s - scenario.notice_s)
                clock.at(notice_s, partial(withdraw, life.instance, life.gone_s))
                clock.at(life.gone_s, partial(end, life.instance))


class TraceCloud:
    """Every instance of the trace is rented for as long as the trace has it."""

    def __init__(self, scenario: Scenario, clock: Clock, tenant: Tenant) -> None:
        self._scenario = scenario
        self._clock = clock
        self._tenant = tenant

    def begin(self) -> None:
        for life in lifetimes(self._scenario.trace):
            if life.usable_s <= self._scenario.trace.end_s:
                self._schedule(life)

    def follow(self, desired: DesiredCapacity) -> None:
        pass

    def _schedule(self, life: Lifetime) -> None:
        clock, tenant, name = self._clock, self._tenant, life.instance
        is_initial = life.usable_s <= 0
        rented_s = life.rented_s(self._scenario.acquisition_s)
        clock.at(START_S if is_initial else rented_s, lambda: tenant.launch(name, life.market))
        clock.at(START_S if is_initial else life.usable_s, lambda: tenant.join(name, life.market))
        if life.gone_s is not None and life.gone_s <= self._scenario.trace.end_s:
            deadline_s = life.gone_s
            if self._scenario.notice_s > 0:
                notice_s = max(life.usable_s, deadline_s - self._scenario.notice_s)
                clock.at(notice_s, lambda: tenant.notice(name, deadline_s))
            clock.at(deadline_s, lambda: tenant.lose(name, "preempted"))


class _Rented:
    def __init__(self, market: Market, offer: Lifetime | None) -> None:
        self.market = market
        self.offer = offer
        """Of a spot instance."""
        self.has_joined = False
        self.is_leaving = False
        """Under notice, or given back."""


class RentingCloud:
    """A market that has the spot instances of the trace, each for as long as the trace has it, and on-demand instances
    without end; the fleet is brought to what the planner wants. The market of the policy `replicas`, with its rules: an
    instance is usable an acquisition after it was asked for, before time 0 at once, and paid for from the beginning.
    """

    def __init__(self, scenario: Scenario, clock: Clock, tenant: Tenant) -> None:
        self._scenario = scenario
        self._clock = clock
        self._tenant = tenant
        self._offered: dict[str, Lifetime] = {}
        """Spot instances that the market has and that are not rented."""
        self._rented: dict[str, _Rented] = {}
        self._names: dict[str, str] = {}
        """By spot instance of the trace: as what it is rented now."""
        self._num_rented = 0
        self._desired: DesiredCapacity | None = None
        self._is_due = False

    def begin(self) -> None:
        schedule_offers(
            self._scenario,
            self._clock,
            offer=self._offer,
            withdraw=self._withdraw,
            end=lambda instance: self._end(self._names.get(instance), "preempted"),
        )
        self._clock.at(ON_DEMAND_START_S, self._reconcile)

    def follow(self, desired: DesiredCapacity) -> None:
        self._desired = desired
        self._reconcile_soon()

    # --- The market ---

    def _offer(self, life: Lifetime) -> None:
        self._offered[life.instance] = life
        self._reconcile_soon()

    def _withdraw(self, instance: str, deadline_s: float) -> None:
        self._offered.pop(instance, None)
        name = self._names.get(instance)
        if name is not None and not self._rented[name].is_leaving:
            self._leave(name, deadline_s)

    def _leave(self, name: str, deadline_s: float) -> None:
        """It is under notice; what has not joined yet is not waited for."""
        if not self._rented[name].has_joined:
            self._end(name, "its end was told before it joined")
            return
        self._rented[name].is_leaving = True
        if deadline_s > self._clock.now_s:
            self._tenant.notice(name, deadline_s)
        self._reconcile_soon()

    def _end(self, name: str | None, reason: str) -> None:
        rented = self._rented.pop(name, None) if name is not None else None
        if rented is None or name is None:
            return
        if rented.offer is not None:
            del self._names[rented.offer.instance]
        self._tenant.lose(name, reason)
        self._reconcile_soon()

    # --- The fleet ---

    def _reconcile_soon(self) -> None:
        """When all that happens now has been heard."""
        if not self._is_due:
            self._is_due = True
            self._clock.at(self._clock.now_s, self._reconcile)

    def _reconcile(self) -> None:
        self._is_due = False
        self._tenant.observe_market(self._num_staying(Market.SPOT) + len(self._offered))
        desired = self._desired
        if desired is None:
            return
        num_on_demand = desired.on_demand if self._clock.now_s >= ON_DEMAND_START_S else 0
        for market, num_wanted in ((Market.SPOT, desired.spot), (Market.ON_DEMAND, num_on_demand)):
            while self._num_staying(market) < num_wanted and self._rent(market):
                pass
        for name in desired.release:
            rented = self._rented.get(name)
            if rented is None or rented.is_leaving:
                continue
            if self._num_staying(rented.market) > (desired.spot if rented.market is Market.SPOT else desired.on_demand):
                self._release(name, rented)

    def _num_staying(self, market: Market) -> int:
        return sum(one.market is market and not one.is_leaving for one in self._rented.values())

    def _rent(self, market: Market) -> bool:
        """One more; False if the market has none."""
        offer = None
        if market is Market.SPOT:
            if not self._offered:
                return False
            offer = self._offered.pop(next(iter(self._offered)))  # nobody knows which lives longest
        self._num_rented += 1
        name = f"{offer.instance if offer is not None else market}-{self._num_rented}"
        rented = self._rented[name] = _Rented(market, offer)
        if offer is not None:
            self._names[offer.instance] = name
        self._tenant.launch(name, market)
        now_s = self._clock.now_s
        self._clock.at(now_s if now_s < 0 else now_s + self._scenario.acquisition_s, lambda: self._join(name, rented))
        return True

    def _join(self, name: str, rented: _Rented) -> None:
        if self._rented.get(name) is rented:
            rented.has_joined = True
            self._tenant.join(name, rented.market)

    def _release(self, name: str, rented: _Rented) -> None:
        if not rented.has_joined:
            self._give_back(name, rented)
            return
        end_s = self._clock.now_s + RELEASE_NOTICE_S
        self._clock.at(end_s, lambda: self._give_back(name, rented))
        self._leave(name, end_s)

    def _give_back(self, name: str, rented: _Rented) -> None:
        """A spot instance may be rented again, unless its end has been told meanwhile."""
        if name not in self._rented:
            return
        self._end(name, "given back")
        life = rented.offer
        if life is not None and (life.gone_s is None or self._clock.now_s < life.gone_s - self._scenario.notice_s):
            self._offer(life)
