"""Rerouting (SpotServe, section 6.1), made as strong as the idea allows.

One shape for good: the best for the smallest fleet of the trace, so that there is always a pipeline; only their number
varies. A lost instance ends every pipeline that it is part of, whose requests begin again on the others. Ranks that
survive keep their weights and wait until they are enough for a new pipeline; what a rank lacks comes from its
instance's disk. Unlike the paper's: continuous batching; the router avoids pipelines under notice.
"""

from __future__ import annotations

import math
from collections import defaultdict

import msgspec

from loadtest.simulator.clock import Timer
from loadtest.simulator.policies.base import OnProgress
from loadtest.simulator.policies.cloud import START_S
from loadtest.simulator.policies.fixed_shape import FixedShapeRun
from loadtest.simulator.policies.step_times import best_shape_of_smallest_fleet
from loadtest.simulator.result import Result
from loadtest.simulator.scenario import Lifetime, Scenario, lifetimes


class ReroutingStrong:
    name = "rerouting-strong"

    def run(self, scenario: Scenario, on_progress: OnProgress) -> Result:
        return _Run(scenario, best_shape_of_smallest_fleet(scenario), on_progress).result(self.name)


class _Rank(msgspec.Struct, eq=False):
    instance: str
    position: int | None = None
    """Whose weights it holds, or is loading."""
    is_loading: bool = False
    pipeline: str | None = None


class _Run:
    def __init__(self, scenario: Scenario, shape: tuple[int, int], on_progress: OnProgress) -> None:
        self._fleet = FixedShapeRun(scenario, shape, on_progress)
        self._scenario = scenario
        self._position_bytes = self._fleet.position_bytes()
        self._ranks: list[_Rank] = []
        self._deadlines_s: dict[str, float] = {}
        self._starts: dict[str, Timer] = {}
        self._num_formed = 0

    def result(self, policy: str) -> Result:
        for life in lifetimes(self._scenario.trace):
            self._schedule(life)
        self._fleet.run()
        return self._fleet.ledger.result(policy, self._fleet.service)

    def _schedule(self, life: Lifetime) -> None:
        clock, end_s, name = self._fleet.clock, self._scenario.trace.end_s, life.instance
        if life.usable_s > end_s:
            return
        rented_s = life.rented_s(self._scenario.acquisition_s)
        is_initial = life.usable_s <= 0
        clock.at(START_S if is_initial else rented_s, lambda: self._fleet.ledger.rent(name, life.market))
        clock.at(START_S if is_initial else life.usable_s, lambda: self._join(name))
        if life.gone_s is not None and life.gone_s <= end_s:
            gone_s = life.gone_s
            notice_s = max(gone_s - self._scenario.notice_s, 0.0 if is_initial else life.usable_s)
            clock.at(notice_s, lambda: self._notice(name, gone_s))
            clock.at(gone_s, lambda: self._lose(name))

    def _join(self, instance: str) -> None:
        self._fleet.ledger.usable(instance)
        self._ranks += [_Rank(instance) for _ in range(self._scenario.ranks_per_instance)]
        self._fleet.sample()
        # Instances that join at the same time form pipelines together.
        self._fleet.clock.at(self._fleet.clock.now_s, self._form)

    def _notice(self, instance: str, deadline_s: float) -> None:
        self._deadlines_s[instance] = deadline_s
        for pipeline in {r.pipeline for r in self._ranks if r.instance == instance and r.pipeline is not None}:
            self._fleet.service.set_deadline(pipeline, deadline_s)

    def _lose(self, instance: str) -> None:
        self._fleet.ledger.end(instance)
        broken = {r.pipeline for r in self._ranks if r.instance == instance and r.pipeline is not None}
        self._ranks = [rank for rank in self._ranks if rank.instance != instance]
        for rank in self._ranks:
            if rank.pipeline in broken:
                if rank.is_loading:
                    rank.position, rank.is_loading = None, False
                rank.pipeline = None
        for pipeline in broken & self._starts.keys():
            self._starts.pop(pipeline).cancel()
        self._fleet.fail(sorted(broken), f"{instance} lost")
        self._fleet.clock.at(self._fleet.clock.now_s, self._form)

    def _form(self) -> None:
        """As many new pipelines as there are free ranks for."""
        while (ranks := self._pick()) is not None:
            self._num_formed += 1
            name = f"p{self._num_formed}"
            load_s = self._load(ranks)
            for rank in ranks:
                rank.pipeline = name
            start_s = self._fleet.clock.now_s + (0.0 if self._fleet.clock.now_s < 0 else load_s)
            self._starts[name] = self._fleet.clock.at(start_s, lambda name=name: self._start(name))  # type: ignore[misc]  # mypy does not infer a lambda with a default

    def _pick(self) -> list[_Rank] | None:
        """A free rank for each position, if possible one that holds its weights."""
        free = [r for r in self._ranks if r.pipeline is None and r.instance not in self._deadlines_s]
        if len(free) < len(self._position_bytes):
            return None
        chosen: dict[int, _Rank] = {}
        for rank in free:
            if rank.position is not None:
                chosen.setdefault(rank.position, rank)
        others = iter([rank for rank in free if rank not in chosen.values()])
        return [chosen.get(index) or next(others) for index in range(len(self._position_bytes))]

    def _load(self, ranks: list[_Rank]) -> float:
        """Seconds until all have their weights; the ranks of an instance share its disk."""
        num_bytes: dict[str, int] = defaultdict(int)
        for position, rank in enumerate(ranks):
            if rank.position != position:
                num_bytes[rank.instance] += self._position_bytes[position]
                rank.position, rank.is_loading = position, True
        return max(num_bytes.values(), default=0) / self._scenario.links.disk_bytes_per_s

    def _start(self, name: str) -> None:
        self._starts.pop(name)
        members = [rank for rank in self._ranks if rank.pipeline == name]
        for rank in members:
            rank.is_loading = False
        deadline_s = min((self._deadlines_s.get(rank.instance, math.inf) for rank in members), default=math.inf)
        self._fleet.serve(name, deadline_s)
