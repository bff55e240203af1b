"""Whole replicas, as SkyServe runs them (SpotHedge, arXiv 2411.01438, section 4).

A replica is a fixed number of instances with the shape that is best for them. As many replicas as the arrivals of the
last 30 s need are wanted (fewer only if that has been enough for 20 minutes), and `num_extra` spot replicas more. While
fewer spot replicas are ready, on-demand replicas stand in: min(wanted, wanted + extra - ready). Once spot is back they
finish their requests and are given back. A lost instance ends its replica; its requests begin again elsewhere, and its
other instances wait for a new one.

Stronger than SkyServe: continuous batching with the best shape; it scales up at once; the router avoids replicas under
notice, and their replacement begins at the notice; surviving instances are kept; requests are sent again at once.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

import msgspec

from loadtest.simulator.policies.base import OnProgress
from loadtest.simulator.policies.cloud import START_S, schedule_offers
from loadtest.simulator.policies.fixed_shape import FixedShapeRun
from loadtest.simulator.policies.step_times import best_config, cost_model, does_not_fit, fleet_sizes
from loadtest.simulator.result import Result
from loadtest.simulator.scenario import Lifetime, Scenario
from planner.protocol import Market, ParallelConfig

TARGET_LOAD: Final = 0.8
"""Of the replicas that are wanted, so that they can keep up with more than what is measured."""
SCALE_S: Final = 20.0
"""How often the load is looked at: SkyServe's default."""
SCALE_DOWN_S: Final = 1200.0
"""So long fewer replicas must have been enough: SkyServe's default."""


class Replicas:
    name = "replicas"

    def __init__(self, num_extra: int = 1) -> None:
        self._num_extra = num_extra

    def run(self, scenario: Scenario, on_progress: OnProgress) -> Result:
        return _Run(scenario, size_replicas(scenario), self._num_extra, on_progress).result(self.name)


class Sizing(msgspec.Struct, frozen=True, kw_only=True):
    instances: int
    """Of one replica."""
    config: ParallelConfig
    """Inside one replica: `data` pipelines."""
    num_wanted: int
    """For the mean of the arrivals."""
    most_wanted: int
    """Whatever the arrivals are: what the largest spot fleet of the trace could hold."""
    throughput_per_s: float
    """Of one replica."""


def size_replicas(scenario: Scenario) -> Sizing:
    """The size with the least latency when the smallest spot fleet of the trace is cut into replicas of that size (the
    smallest that fits, if that fleet does not hold one), and how many of them the load needs.

    Raises SimulationError if the model does not fit into the largest spot fleet.
    """
    costs = cost_model(scenario)
    rate_per_s = costs.workload.arrivals_per_s
    sizes = fleet_sizes(scenario.trace, {Market.SPOT})
    best: tuple[tuple[float, float, int], Sizing] | None = None
    for size in range(1, max(1, sizes[-1]) + 1):
        if best is not None and size > sizes[0]:
            break
        num_replicas = max(1, sizes[0] // size)
        config = best_config(scenario, size * scenario.ranks_per_instance, rate_per_s / num_replicas)
        if config is None:
            continue
        estimate = costs.estimate(num_replicas * config.data, config.pipeline, config.tensor)
        assert estimate is not None, "best_config found that it fits"
        per_replica = estimate.throughput_per_s / num_replicas
        num_wanted = max(1, math.ceil(rate_per_s / (TARGET_LOAD * per_replica)))
        key = (estimate.latency_s, -estimate.throughput_per_s, size)
        if best is None or key < best[0]:
            best = (
                key,
                Sizing(
                    instances=size,
                    config=config,
                    num_wanted=num_wanted,
                    most_wanted=max(num_wanted, sizes[-1] // size),
                    throughput_per_s=per_replica,
                ),
            )
    if best is None:
        raise does_not_fit(scenario, sizes[-1])
    return best[1]


class _Instance(msgspec.Struct, eq=False):
    id: str
    market: Market
    is_ready: bool = False
    deadline_s: float = math.inf
    replica: str | None = None


class _Replica(msgspec.Struct, eq=False):
    id: str
    market: Market
    members: list[_Instance]
    serves: bool = False
    is_draining: bool = False


class _Run:
    def __init__(self, scenario: Scenario, sizing: Sizing, num_extra: int, on_progress: OnProgress) -> None:
        config = sizing.config
        self._fleet = FixedShapeRun(scenario, (config.pipeline, config.tensor), on_progress)
        self._scenario = scenario
        self._sizing = sizing
        self._num_extra = num_extra
        self._offered: dict[str, Lifetime] = {}
        """Spot instances that the market has and that are not rented."""
        self._instances: dict[str, _Instance] = {}
        """Those that are rented."""
        self._replicas: dict[str, _Replica] = {}
        self._num_made = 0
        self._num_wanted = sizing.num_wanted
        self._needs: deque[tuple[float, int]] = deque([(START_S, sizing.num_wanted)])
        """What was needed when, within SCALE_DOWN_S."""
        weights = sum(self._fleet.position_bytes()) * config.data / sizing.instances
        self._load_s = weights / scenario.links.disk_bytes_per_s

    def result(self, policy: str) -> Result:
        schedule_offers(self._scenario, self._fleet.clock, offer=self._offer, withdraw=self._notice, end=self._lose)
        self._fleet.clock.at(START_S, self._reconcile)
        self._fleet.clock.at(SCALE_S, self._scale)
        self._fleet.run()
        return self._fleet.ledger.result(policy, self._fleet.service)

    # --- The market ---

    def _offer(self, life: Lifetime) -> None:
        self._offered[life.instance] = life
        if self._fleet.clock.now_s > START_S:
            self._reconcile()

    def _notice(self, name: str, deadline_s: float) -> None:
        self._offered.pop(name, None)
        instance = self._instances.get(name)
        if instance is None:
            return
        instance.deadline_s = deadline_s
        if instance.replica is not None:
            for pipeline in self._pipelines(instance.replica):
                self._fleet.service.set_deadline(pipeline, deadline_s)
        self._reconcile()

    def _lose(self, name: str) -> None:
        self._offered.pop(name, None)
        instance = self._instances.pop(name, None)
        if instance is None:
            return
        self._fleet.ledger.end(name)
        if instance.replica is not None:
            replica = self._replicas.pop(instance.replica)
            for member in replica.members:
                member.replica = None
            self._fleet.fail(self._pipelines(replica.id), f"{name} lost")
        self._fleet.sample()
        self._reconcile()

    def _rent(self, name: str, market: Market, ready_s: float) -> None:
        instance = self._instances[name] = _Instance(name, market)
        self._fleet.ledger.rent(name, market)

        def get_ready() -> None:
            if self._instances.get(name) is instance:
                instance.is_ready = True
                self._fleet.ledger.usable(name)
                self._fleet.sample()
                self._reconcile()

        if ready_s <= self._fleet.clock.now_s:  # there at the start
            instance.is_ready = True
            self._fleet.ledger.usable(name)
        else:
            self._fleet.clock.at(ready_s, get_ready)

    # --- What is wanted ---

    def _scale(self) -> None:
        now_s = self._fleet.clock.now_s
        self._fleet.clock.at(now_s + SCALE_S, self._scale)
        arrivals_per_s = self._fleet.service.load().arrivals_per_s
        num_needed = math.ceil(arrivals_per_s / (TARGET_LOAD * self._sizing.throughput_per_s))
        self._needs.append((now_s, min(max(1, num_needed), self._sizing.most_wanted)))
        while self._needs[0][0] < now_s - SCALE_DOWN_S:
            self._needs.popleft()
        self._num_wanted = max(num for _, num in self._needs)
        self._reconcile()

    def _reconcile(self) -> None:
        """After everything that happens."""
        num_wanted, size = self._num_wanted, self._sizing.instances
        self._fill(Market.SPOT, num_wanted + self._num_extra, size)
        is_start = self._fleet.clock.now_s <= START_S
        serving = [r for r in self._replicas.values() if r.market is Market.SPOT and (r.serves or is_start)]
        num_ready = sum(self._lasts(replica) for replica in serving)
        num_on_demand = min(num_wanted, max(0, num_wanted + self._num_extra - num_ready))
        self._fill(Market.ON_DEMAND, num_on_demand, size)
        self._shrink(num_on_demand)

    def _lasts(self, replica: _Replica) -> bool:
        return not replica.is_draining and all(m.deadline_s == math.inf for m in replica.members)

    def _fill(self, market: Market, num_replicas: int, size: int) -> None:
        """Make replicas of the instances that are ready, and rent what is still missing, as far as there is any."""
        lasting = [r for r in self._replicas.values() if r.market is market and self._lasts(r)]
        draining = [r for r in self._replicas.values() if r.market is market and r.is_draining]
        while len(lasting) < num_replicas and draining:  # it was to go, and is needed after all
            draining[-1].is_draining = False
            self._set_taking(draining[-1], takes=True)
            lasting.append(draining.pop())
        num_missing = num_replicas - len(lasting)
        num_free = sum(self._is_free(i, market) for i in self._instances.values())
        for _ in range(num_missing * size - num_free):
            if not self._rent_one(market):
                break
        for _ in range(num_missing):
            ready = [i for i in self._instances.values() if self._is_free(i, market) and i.is_ready]
            if len(ready) < size:
                return
            self._make(market, ready[:size])

    def _is_free(self, instance: _Instance, market: Market) -> bool:
        return instance.market is market and instance.replica is None and instance.deadline_s == math.inf

    def _rent_one(self, market: Market) -> bool:
        now_s, acquisition_s = self._fleet.clock.now_s, self._scenario.acquisition_s
        ready_s = now_s if now_s <= START_S else now_s + acquisition_s
        if market is Market.ON_DEMAND:
            self._num_made += 1
            self._rent(f"on-demand-{self._num_made}", market, ready_s)
            return True
        if not self._offered:
            return False
        # The one that lives longest is not known: the one that was offered first.
        self._rent(self._offered.pop(next(iter(self._offered))).instance, market, ready_s)
        return True

    def _shrink(self, num_on_demand: int) -> None:
        """Too many on-demand replicas: the newest finish their requests and go."""
        kept = [r for r in self._replicas.values() if r.market is Market.ON_DEMAND and not r.is_draining]
        for replica in reversed(kept[num_on_demand:]):
            replica.is_draining = True
            self._set_taking(replica, takes=False)
            self._release_idle(replica.id)
        num_missing = max(0, num_on_demand - len(kept)) * self._sizing.instances
        spare = [i for i in self._instances.values() if self._is_free(i, Market.ON_DEMAND)]
        for instance in spare[num_missing:]:
            self._give_back(instance)

    def _set_taking(self, replica: _Replica, *, takes: bool) -> None:
        for name in self._pipelines(replica.id):
            if name in self._fleet.service.pipelines:
                self._fleet.service.pipelines[name].takes_requests = takes

    def _release_idle(self, name: str) -> None:
        replica = self._replicas.get(name)
        if replica is None or not replica.is_draining:
            return
        pipelines = [self._fleet.service.pipelines.get(p) for p in self._pipelines(name)]
        if any(p is not None and (p.running or p.waiting) for p in pipelines):
            return
        del self._replicas[name]
        for pipeline in pipelines:
            if pipeline is not None:
                pipeline.kill()
                self._fleet.service.remove(pipeline.id)
        for member in replica.members:
            self._give_back(member)
        self._fleet.sample()

    def _give_back(self, instance: _Instance) -> None:
        del self._instances[instance.id]
        self._fleet.ledger.end(instance.id)

    # --- Replicas ---

    def _make(self, market: Market, members: list[_Instance]) -> None:
        self._num_made += 1
        replica = _Replica(f"r{self._num_made}", market, members)
        self._replicas[replica.id] = replica
        for member in members:
            member.replica = replica.id
        now_s = self._fleet.clock.now_s
        self._fleet.clock.at(now_s if now_s <= START_S else now_s + self._load_s, lambda: self._start(replica))

    def _start(self, replica: _Replica) -> None:
        if self._replicas.get(replica.id) is not replica:
            return
        replica.serves = True
        deadline_s = min(member.deadline_s for member in replica.members)
        for name in self._pipelines(replica.id):
            self._fleet.serve(name, deadline_s, lambda: self._release_idle(replica.id))
        self._set_taking(replica, takes=not replica.is_draining)
        self._reconcile()

    def _pipelines(self, replica: str) -> list[str]:
        return [f"{replica}-{index}" for index in range(self._sizing.config.data)]
