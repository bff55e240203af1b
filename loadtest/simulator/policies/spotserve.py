"""Ours: the planner's own state machine, unchanged, decides for a fleet in virtual time.

This is the fleet's part of the protocol: instances come, are under notice and go; ranks pull weights over the links
while the old pipelines serve, stop when the engine's arranger says, and start what they have prepared; interrupted
sequences go on elsewhere, with their KV where pulling it is sooner than computing it again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from typing import Final

import msgspec

from loadtest.errors import SimulationError
from loadtest.simulator.clock import Clock, Timer
from loadtest.simulator.context import (
    holds,
    instances_of,
    kv_flows,
    position_units,
    pull_everything,
    weight_flows,
)
from loadtest.simulator.ledger import Ledger
from loadtest.simulator.network import Flow, Network, Place
from loadtest.simulator.pipelines import Change, Interruption, Limits, Pipeline, Sequence
from loadtest.simulator.policies.base import OnProgress
from loadtest.simulator.policies.cloud import START_S, Cloud, RentingCloud, TraceCloud
from loadtest.simulator.policies.members import Instance, Preparation, Rank, inventory_of
from loadtest.simulator.policies.step_times import ShapeTimes, best_shape_of_smallest_fleet, cost_model
from loadtest.simulator.result import Result
from loadtest.simulator.scenario import Scenario
from loadtest.simulator.service import Service
from planner.core.capacity import CapacityLimits
from planner.core.config_optimizer import Targets
from planner.core.effects import (
    Effect,
    Event,
    InstanceReached,
    PublishArrange,
    PublishDesired,
    PublishPlan,
    Report,
    Severity,
    Tick,
    WatchInstance,
)
from planner.core.load import PEAK_S
from planner.core.state_machine import PlannerState
from planner.protocol import (
    Arrange,
    InstanceInventory,
    InstanceLost,
    InstanceStarting,
    Market,
    Phase,
    Plan,
    PreemptionNotice,
    RankProgress,
    Transfer,
)
from planner.protocol import Pipeline as PlannedPipeline

ARRANGE_MARGIN_S: Final = 2.0
"""The engine's default."""
PARKED_KV_S: Final = 60.0
"""The engine's default: so long the KV of interrupted sequences is kept."""
TICK_S: Final = 0.01
LOAD_REPORT_S: Final = 1.0
INVENTORY_S: Final = 10.0
STALLED_S: Final = 900.0
"""After the end of the trace: nothing has been served for so long, so nothing will be."""


class SpotServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Parts that an ablation switches off."""

    controller: bool = True
    """Off: the shape that is best for the trace's smallest fleet, for good; only the number of pipelines varies."""
    migration_planner: bool = True
    """Off: pipelines that must end stop first, and then weights move; nothing is prepared beside them."""
    arranger: bool = True
    """Off: they stop at once, and interrupted sequences are computed again from their tokens: no KV moves."""
    device_mapper: bool = True
    """Off: positions are taken without regard to what a rank holds, so new pipelines pull all their weights."""


class SpotServe:
    def __init__(self, options: SpotServeOptions | None = None, name: str = "spotserve") -> None:
        self.name = name
        self.options = options or SpotServeOptions()

    def run(self, scenario: Scenario, on_progress: OnProgress) -> Result:
        return Fleet(scenario, self.options, on_progress).run(self.name)


class ParkedKv:
    """KV of one sequence in the ranks of a pipeline that has stopped."""

    def __init__(self, fleet: Fleet, planned: PlannedPipeline, sequence: Sequence, num_tokens: int) -> None:
        self._fleet = fleet
        self._planned = planned
        self._sequence = sequence
        self.num_tokens = num_tokens
        self._until_s = fleet.clock.now_s + PARKED_KV_S
        self.instances = frozenset(instances_of(planned))

    def start(self, target: str, num_tokens: int, now_s: float) -> float | None:
        """The engine's rule: pull if that is sooner than to compute, and done before the holders go."""
        if now_s > self._until_s or not self._fleet.are_alive(self.instances):
            return None
        return self._fleet.pull_kv(self._planned, target, self._sequence, num_tokens)


class Fleet:
    """One run. `limits`: the fleet rents what the planner wants within them; None: all that the trace has."""

    def __init__(
        self,
        scenario: Scenario,
        options: SpotServeOptions,
        on_progress: OnProgress,
        limits: CapacityLimits | None = None,
    ) -> None:
        self.scenario = scenario
        self.options = options
        self.clock = Clock(START_S)
        self.service = Service(self.clock, scenario.requests, scenario.model.max_model_len)
        self.ledger = Ledger(self.clock, scenario)
        self.planner = PlannerState(
            _targets(scenario, options), profile=scenario.profile, links=scenario.links, limits=limits
        )
        self._limits = limits
        self._cloud: Cloud = (TraceCloud if limits is None else RentingCloud)(scenario, self.clock, self)
        self._on_progress = on_progress
        self._network = Network(scenario.links)
        self._instances: dict[str, Instance] = {}
        self._ranks: dict[str, Rank] = {}
        self._plan: Plan | None = None
        self._preparing: dict[str, Preparation] = {}
        self._planned: dict[str, PlannedPipeline] = {}
        """Pipelines that run, or that have stopped and whose KV may be pulled."""
        self._changes: dict[str, Change] = {}
        """By retiring pipeline: the change that ends it."""
        self._change: Change | None = None
        """The newest plan's."""
        self._tick: Timer | None = None
        self._costs = cost_model(scenario)

    def run(self, policy: str) -> Result:
        self._cloud.begin()
        self.clock.at(START_S, self._begin_planner)
        self.clock.at(-LOAD_REPORT_S, self._report_load)
        self.clock.at(0.0, self._refresh_forever)
        limit_s = self.scenario.trace.end_s + self.scenario.drain_s
        self.clock.run(limit_s, self._goes_on)
        if self.clock.now_s < self.scenario.trace.end_s:
            self.clock.now_s = self.scenario.trace.end_s
        return self.ledger.result(policy, self.service)

    def _goes_on(self) -> bool:
        end_s = self.scenario.trace.end_s
        if self.clock.now_s < end_s:
            return True
        is_stalled = not self.service.pipelines and self.clock.now_s > end_s + STALLED_S
        return self.service.num_open > 0 and not is_stalled

    # --- The cloud ---

    def launch(self, name: str, market: Market) -> None:
        self.ledger.rent(name, market)
        self._send(InstanceStarting(instance=name, market=market))

    def join(self, name: str, market: Market) -> None:
        instance = Instance(name, market, self.scenario.ranks_per_instance)
        self._instances[name] = instance
        self._ranks.update({rank.place.rank: rank for rank in instance.ranks})
        self.ledger.usable(name)
        self._sample()
        self._refresh()

    def notice(self, name: str, deadline_s: float) -> None:
        self._instances[name].deadline_s = deadline_s
        for pipeline in self.service.pipelines:
            if name in instances_of(self._planned[pipeline]):
                self.service.set_deadline(pipeline, deadline_s)
        self._refresh()
        self._send(PreemptionNotice(instance=name, deadline_s=deadline_s))

    def lose(self, name: str, reason: str) -> None:
        self.ledger.end(name)
        if name in self._instances:
            self._drop_instance(name)
        self._send(InstanceLost(instance=name, reason=reason))

    def observe_market(self, num_spot: int) -> None:
        assert self._limits is not None, "only a market is observed"
        self.planner.set_limits(msgspec.structs.replace(self._limits, max_spot=min(num_spot, self._limits.max_spot)))
        self._send(Tick())

    def _drop_instance(self, name: str) -> None:
        for rank in self._instances.pop(name).ranks:
            del self._ranks[rank.place.rank]
        change = self.ledger.change(f"{name} lost")
        for pipeline in list(self.service.pipelines.values()):
            pipeline.fail_pulls(name)
            if name in instances_of(self._planned[pipeline.id]):
                self._free(pipeline.id)
                self.service.break_off(pipeline, self._changes.get(pipeline.id, change), from_scratch=False)
        for preparation in list(self._preparing.values()):
            if name in instances_of(preparation.planned):
                self._drop(preparation)
            elif name in preparation.sources:
                self._pull_again(preparation)
        self._sample()
        self._refresh()

    # --- To the planner ---

    def _begin_planner(self) -> None:
        """It has watched the load for long enough to know what is usual, as the service ran before the trace began."""
        self._carry_out(self.planner.handle(Tick(), START_S - PEAK_S))
        self._send(self.service.load())

    def _send(self, event: Event) -> None:
        """Answers to its effects follow as events of their own, at the same time."""
        self._carry_out(self.planner.handle(event, self.clock.now_s))

    def _carry_out(self, effects: Items[Effect]) -> None:
        for effect in effects:
            match effect:
                case PublishPlan(plan=plan):
                    self._take_plan(plan)
                case PublishArrange(arrange=arrange):
                    self._take_arrange(arrange)
                case PublishDesired(desired=desired):
                    self._cloud.follow(desired)
                case WatchInstance(instance=name):
                    self._later(InstanceReached(instance=name))
                case Report(severity=Severity.ERROR):
                    told = ", ".join(f"{name}: {value}" for name, value in effect.fields.items())
                    raise SimulationError(f"{self.scenario.name}, {self.clock.now_s:.1f} s: {effect.event}: {told}")
                case _:
                    pass  # what a trace has decided already, and what is only told
        if self._tick is not None:
            self._tick.cancel()
        wakeup_s = self.planner.next_wakeup_s(self.clock.now_s)
        if wakeup_s <= self.clock.now_s:  # as a live planner's loop, which takes time
            wakeup_s = self.clock.now_s + TICK_S
        self._tick = self.clock.at(wakeup_s, lambda: self._send(Tick())) if wakeup_s < math.inf else None

    def _later(self, event: Event) -> None:
        self.clock.at(self.clock.now_s, lambda: self._send(event))

    def _progress(self, rank: str, pipeline: str, phase: Phase) -> None:
        epoch = self._plan.epoch if self._plan is not None else 0
        self._later(RankProgress(rank=rank, epoch=epoch, pipeline=pipeline, phase=phase, at_s=self.clock.now_s))

    def _report_load(self) -> None:
        self.clock.at(self.clock.now_s + LOAD_REPORT_S, self._report_load)
        self._on_progress(max(0.0, self.clock.now_s))
        self._send(self.service.load())

    def _refresh_forever(self) -> None:
        self.clock.at(self.clock.now_s + INVENTORY_S, self._refresh_forever)
        self._refresh()

    def _refresh(self) -> None:
        """Inventories of all instances. Agents send them every 2 s; what they say is needed when decisions are made."""
        for instance in self._instances.values():
            self._send(self._inventory(instance))

    def _inventory(self, instance: Instance) -> InstanceInventory:
        epoch = self._plan.epoch if self._plan is not None else 0
        kv_tokens = {name: pipeline.kv_tokens() for name, pipeline in self.service.pipelines.items()}
        return inventory_of(instance, self.scenario, epoch, kv_tokens)

    # --- A plan: prepare ---

    def _take_plan(self, plan: Plan) -> None:
        self._plan = plan
        self.service.observe_plan(plan)
        change = self._change = self.ledger.change(plan.explanation.cause)
        for retiring in plan.retiring:
            self._changes.setdefault(retiring.pipeline.id, change)
            pipeline = self.service.pipelines.get(retiring.pipeline.id)
            if pipeline is not None and retiring.deadline_s is not None:
                self.service.set_deadline(pipeline.id, retiring.deadline_s)
            if pipeline is not None and retiring.broken:
                self._free(pipeline.id)
                self.service.break_off(pipeline, self._changes[pipeline.id], from_scratch=False)
            elif pipeline is not None and not self.options.migration_planner:
                self._arrange(pipeline, None, 0.0)
        names = {p.id for p in plan.pipelines}
        for preparation in [p for p in self._preparing.values() if p.planned.id not in names]:
            self._drop(preparation)
        new = [p for p in plan.pipelines if p.id not in self._preparing and p.id not in self.service.pipelines]
        self._prepare([p for p in new if self.are_alive(instances_of(p))], plan.transfers)

    def _prepare(self, new: Items[PlannedPipeline], transfers: dict[str, list[Transfer]]) -> None:
        """All ranks of `new` pull what they lack."""
        places = self._places()
        flows: dict[Place, list[Flow]] = {}
        pulls: dict[str, list[Transfer]] = {}
        for planned in new:
            self._preparing[planned.id] = Preparation(planned)
            for rank in planned.ranks():
                pulls[rank] = transfers.get(rank, []) if self.options.device_mapper else self._pull_all(planned, rank)
                flows[places[rank]] = weight_flows(self.scenario.model, pulls[rank], places)
        done_s = self._network.move(flows, self.clock.now_s)
        num_bytes = sum(flow.num_bytes for queue in flows.values() for flow in queue)
        is_warm = self.clock.now_s < 0  # the service ran before the trace began
        if self._change is not None and not is_warm:
            self._change.moved_bytes += num_bytes
        for planned in new:
            for rank in planned.ranks():
                self._await(
                    self._preparing[planned.id], rank, self.clock.now_s if is_warm else done_s[self._ranks[rank].place]
                )
            sources = {t.sources[0] for rank in planned.ranks() for t in pulls[rank] if t.sources}
            self._preparing[planned.id].sources = {self._ranks[s].place.instance for s in sources if s in self._ranks}

    def _places(self) -> dict[str, Place]:
        return {name: rank.place for name, rank in self._ranks.items()}

    def _pull_all(self, planned: PlannedPipeline, rank: str) -> list[Transfer]:
        held = {state.place: state.units for state in self._ranks.values()}
        return pull_everything(self.scenario.model, planned, rank, held)

    def _await(self, preparation: Preparation, rank: str, at_s: float) -> None:
        preparation.timers[rank] = self.clock.at(at_s, lambda: self._prepared(preparation, rank))

    def _prepared(self, preparation: Preparation, rank: str) -> None:
        del preparation.timers[rank]
        state, planned = self._ranks[rank], preparation.planned
        state.units = list(dict.fromkeys([*state.units, *position_units(self.scenario.model, planned, rank)]))
        state.prepared.append(planned.id)
        self._progress(rank, planned.id, Phase.PREPARED)
        self._start_ready()

    def _pull_again(self, preparation: Preparation) -> None:
        """A source has gone: whoever still pulls takes everything from those that are left."""
        waiting = sorted(preparation.timers)
        pulls = {rank: self._pull_missing(preparation.planned, rank) for rank in waiting}
        places = self._places()
        flows = {places[rank]: weight_flows(self.scenario.model, pulls[rank], places) for rank in waiting}
        done_s = self._network.move(flows, self.clock.now_s)
        preparation.sources = {self._ranks[t.sources[0]].place.instance for p in pulls.values() for t in p if t.sources}
        for rank in waiting:
            preparation.timers[rank].cancel()
            self._await(preparation, rank, done_s[self._ranks[rank].place])

    def _pull_missing(self, planned: PlannedPipeline, rank: str) -> list[Transfer]:
        held = self._ranks[rank].units
        return [t for t in self._pull_all(planned, rank) if not holds(held, t.units.first_layer, t.units.first_group)]

    def _drop(self, preparation: Preparation) -> None:
        del self._preparing[preparation.planned.id]
        for timer in preparation.timers.values():
            timer.cancel()
        for rank in preparation.planned.ranks():
            if rank in self._ranks and preparation.planned.id in self._ranks[rank].prepared:
                self._ranks[rank].prepared.remove(preparation.planned.id)

    # --- A plan: arrange, start ---

    def _take_arrange(self, arrange: Arrange) -> None:
        for name in arrange.pipelines:
            pipeline = self.service.pipelines.get(name)
            if pipeline is not None:
                self._arrange(pipeline, arrange.deadline_s if self.options.arranger else None, arrange.migration_s)

    def _arrange(self, pipeline: Pipeline, deadline_s: float | None, migration_s: float) -> None:
        pipeline.stop(deadline_s, migration_s, ARRANGE_MARGIN_S, lambda left: self._stopped(pipeline, left))

    def _stopped(self, pipeline: Pipeline, sequences: list[Sequence]) -> None:
        planned = self._planned[pipeline.id]
        self.service.remove(pipeline.id)
        self._free(pipeline.id)
        change = self._changes.get(pipeline.id) or self.ledger.change(f"{pipeline.id} was stopped")
        interruption = Interruption(change, self.clock.now_s)
        for sequence in sequences:
            sequence.interrupt(interruption, heir_of=pipeline.id)
            if sequence.computed and self.options.arranger:
                sequence.pull = ParkedKv(self, planned, sequence, sequence.computed)
                sequence.computed = 0
            else:
                sequence.lose_kv()
        for rank in planned.ranks():
            self._progress(rank, pipeline.id, Phase.STOPPED)
        # Their heir, if it can start now, comes before others that have room, and they before others that wait.
        self.service.enqueue(sequences)
        self._start_ready()
        self.service.dispatch()
        self._sample()

    def _free(self, pipeline: str) -> None:
        for rank in self._planned[pipeline].ranks():
            if rank in self._ranks and self._ranks[rank].runs == pipeline:
                self._ranks[rank].runs = None

    def _start_ready(self) -> None:
        """Pipelines whose ranks are all prepared, and free."""
        for preparation in list(self._preparing.values()):
            ranks = [self._ranks[name] for name in preparation.planned.ranks()]
            name = preparation.planned.id
            if all(rank.runs is None and name in rank.prepared for rank in ranks):
                self._start(preparation)

    def _start(self, preparation: Preparation) -> None:
        planned = preparation.planned
        self._drop(preparation)
        self._planned[planned.id] = planned
        shape = (len(planned.stages), planned.tensor)
        limits = Limits(planned.max_batch, planned.num_kv_blocks, self.scenario.model.kv_block_tokens, shape[0])
        times = ShapeTimes(self._costs, *shape)
        deadline_s = min((self._instances[name].deadline_s for name in instances_of(planned)), default=math.inf)
        pipeline = Pipeline(self.clock, planned.id, times, limits, self.service.on_done, self.service.dispatch)
        self.service.add(pipeline, deadline_s if deadline_s < math.inf else None)
        for name in planned.ranks():
            rank = self._ranks[name]
            rank.runs, rank.units = planned.id, position_units(self.scenario.model, planned, name)
            self._progress(name, planned.id, Phase.STARTED)
        self.service.dispatch()
        self._sample()

    def _sample(self) -> None:
        running = [self._planned[name] for name in self.service.pipelines]
        assert all(self.are_alive(instances_of(p)) for p in running), "a pipeline runs on an instance that is gone"
        shapes = [(len(p.stages), p.tensor) for p in running]
        self.ledger.sample(shapes)

    # --- KV ---

    def are_alive(self, instances: frozenset[str] | set[str]) -> bool:
        return instances <= self._instances.keys()

    def pull_kv(self, source: PlannedPipeline, target: str, sequence: Sequence, num_tokens: int) -> float | None:
        """When the KV of `num_tokens` has come, from the ranks of `source` to those of `target`; None: not worth it."""
        now_s = self.clock.now_s
        flows = kv_flows(self.scenario.model, source, self._planned[target], num_tokens, self._places())
        shape = len(self._planned[target].stages), self._planned[target].tensor
        recompute_s = ShapeTimes(self._costs, *shape).prefill_s(num_tokens)
        deadline_s = min(self._instances[name].deadline_s for name in instances_of(source))
        by_s = min(now_s + recompute_s, deadline_s)
        done_s = max(self._network.move(flows, now_s, by_s=by_s).values(), default=now_s)
        if done_s > by_s:
            return None
        if sequence.interruption is not None:
            num_bytes = sum(flow.num_bytes for queue in flows.values() for flow in queue)
            sequence.interruption.change.moved_bytes += num_bytes
        return done_s


def _targets(scenario: Scenario, options: SpotServeOptions) -> Targets:
    if options.controller:
        return Targets(max_batch=scenario.max_batch)
    pipeline, tensor = best_shape_of_smallest_fleet(scenario)
    return Targets(max_batch=scenario.max_batch, pipeline=pipeline, tensor=tensor)
