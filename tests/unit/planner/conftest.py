"""Builders, and `World`: a fleet in virtual time that does what the effects of the state machine ask for."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from planner.core.config_optimizer import Targets
from planner.core.effects import (
    Event,
    InstanceReached,
    ProbeInstances,
    PublishAdvice,
    PublishArrange,
    PublishDesired,
    PublishPlan,
    Report,
    Tick,
    WatchInstance,
)
from planner.core.fleet import Rank
from planner.core.invariants import check_plan
from planner.core.migration_planner import needed_units
from planner.core.state_machine import PlannerState
from planner.protocol import (
    Arrange,
    DesiredCapacity,
    Explanation,
    InstanceInventory,
    InstanceLost,
    InstanceStarting,
    Market,
    MeasuredStep,
    ModelShape,
    NoticeCancelled,
    Phase,
    Pipeline,
    Plan,
    PreemptionNotice,
    RankInventory,
    RankProgress,
    Shard,
    Stage,
    StepProfile,
    UnitRange,
)


def build_model(**changes) -> ModelShape:
    """Roughly SmolLM2-135M in float32."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "num_layers": 30,
        "num_head_groups": 3,
        "decoder_unit_bytes": 4_700_000,
        "embedding_unit_bytes": 37_700_000,
        "head_unit_bytes": 768,
        "kv_unit_bytes_per_token": 512,
        "kv_block_tokens": 16,
        "max_model_len": 2048,
        "hidden_bytes_per_token": 2304,
        "tied_embeddings": True,
    }
    return ModelShape(**(fields | changes))


def build_profile(**changes) -> StepProfile:
    fields: dict[str, Any] = {
        "batch_sizes": [1, 4, 16],
        "decode_layer_ms": [0.8, 1.0, 2.0],
        "decode_head_ms": [6.0, 7.0, 12.0],
        "prefill_layer_ms_per_token": 0.05,
        "stage_hop_ms": 0.4,
        "all_reduce_ms": 1.2,
        "transfer_bytes_per_s": 1e9,
    }
    return StepProfile(**(fields | changes))


class Process:
    """One rank of the simulated fleet."""

    def __init__(self, name: str, memory_bytes: int, incarnation: int) -> None:
        self.name = name
        self.memory_bytes = memory_bytes
        self.address = f"host-{name}:{incarnation}"
        self.units: set[tuple[int, int]] = set()
        self.runs: str | None = None
        self.prepared: set[str] = set()
        self.kv_tokens = 0
        self.measured_step: MeasuredStep | None = None

    def inventory(self) -> RankInventory:
        return RankInventory(
            rank=self.name,
            device="cpu",
            memory_bytes=self.memory_bytes,
            context_address=self.address,
            store_address=f"store-{self.address}",
            units=[
                UnitRange(first_layer=layer, last_layer=layer, first_group=group, last_group=group)
                for layer, group in sorted(self.units)
            ],
            pipeline=self.runs,
            prepared=sorted(self.prepared),
            kv_tokens=self.kv_tokens,
            measured_step=self.measured_step,
        )


class World:
    def __init__(self, model: ModelShape, targets: Targets, memory_bytes: int = 2_000_000_000, **options: Any) -> None:
        """`options` are those of the state machine."""
        self.model = model
        self.targets = targets
        self.options = options
        self.profile = build_profile()
        self.memory_bytes = memory_bytes
        self.now_s = 1000.0
        self.state = PlannerState(targets, **options)
        self.alive: dict[str, list[Process]] = {}
        self.plans: list[Plan] = []
        self.arranges: list[Arrange] = []
        self.probes: list[str] = []
        self.stops: dict[str, float] = {}
        """Running pipelines that have been arranged: when they stop."""
        self.does_prepare = True
        self.hung: set[str] = set()
        """Ranks that never come to the end of a preparation."""
        self.refused: set[tuple[int, int]] = set()
        """Shapes that no rank can prepare."""
        self.faulty: set[str] = set()
        """Ranks that cannot prepare anything."""
        self.names_shape = False
        """Whether a rank says so where a shape is to blame."""
        self.held: list[RankProgress] | None = None
        """Progress messages that are on their way; None: they arrive at once."""
        self.reports: list[Report] = []
        self.advice: list[Explanation] = []
        self.desired: list[DesiredCapacity] = []
        self.num_started = 0
        self.numbers_seen: dict[str, object] = {}

    # --- what happens ---

    def join(self, *names: str, num_ranks: int = 1, settle: bool = True) -> None:
        for name in names:
            self.num_started += 1
            self.alive[name] = [
                Process(f"{name}-{index}", self.memory_bytes, self.num_started) for index in range(num_ranks)
            ]
            self.send(InstanceStarting(instance=name, market=Market.SPOT))
            self.announce(name)
        if settle:
            self.advance(1.0)

    def announce(self, name: str) -> None:
        self.send(self.inventory(name))

    def inventory(self, name: str) -> InstanceInventory:
        return InstanceInventory(
            instance=name,
            market=Market.SPOT,
            liveness_address=f"live-{self.alive[name][0].address}",
            model=self.model,
            ranks=[process.inventory() for process in self.alive[name]],
            profile=self.profile,
            epoch=self.plan.epoch if self.plans else 0,
        )

    def notice(self, name: str, notice_s: float) -> None:
        self.send(PreemptionNotice(instance=name, deadline_s=self.now_s + notice_s))

    def cancel(self, name: str) -> None:
        self.send(NoticeCancelled(instance=name))

    def kill(self, name: str) -> None:
        self.vanish(name)
        self.send(InstanceLost(instance=name, reason="connection reset", detected_at_s=self.now_s))

    def restart_ranks(self, name: str) -> None:
        """The agent starts them anew: other addresses, nothing held."""
        self.num_started += 1
        old = self.alive[name]
        self.alive[name] = [Process(process.name, self.memory_bytes, self.num_started) for process in old]
        self.drop_dead_pipelines()
        self.announce(name)

    def vanish(self, name: str) -> None:
        del self.alive[name]
        self.drop_dead_pipelines()

    def advance(self, duration_s: float) -> None:
        """Let virtual time pass: ticks when asked for, inventories every 2 s, ranks that stop and start."""
        end_s = self.now_s + duration_s
        while self.now_s < end_s:
            wakeup_s = min(self.state.next_wakeup_s(self.now_s), *self.stops.values(), end_s)
            self.now_s = max(self.now_s, min(wakeup_s, self.now_s + 2.0))
            self.stop_due()
            self.send(Tick())
            for name in list(self.alive):
                self.announce(name)

    def restart_planner(self, *, meanwhile: str | None = None) -> None:
        plan = self.plans[-1] if self.plans else None
        history = list(self.state.history)
        self.state = PlannerState(self.targets, **self.options)
        if meanwhile is not None:
            self.vanish(meanwhile)
        if plan is not None:
            gone = {meanwhile} if meanwhile is not None else set()
            self.carry_out(self.state.restore(plan, history, gone, self.now_s))
        for name in list(self.alive):
            self.announce(name)

    # --- the fleet's part ---

    def send(self, event: Event) -> None:
        self.carry_out(self.state.handle(event, self.now_s))
        self.check()

    def carry_out(self, effects: list) -> None:
        for effect in effects:
            if isinstance(effect, WatchInstance):
                name = effect.instance
                if name in self.alive:
                    self.send(InstanceReached(instance=name))
                else:
                    self.send(InstanceLost(instance=name, reason="refused"))
            elif isinstance(effect, PublishPlan):
                self.take_plan(effect.plan)
            elif isinstance(effect, PublishArrange):
                self.take_arrange(effect.arrange)
            elif isinstance(effect, ProbeInstances):
                self.probes += effect.instances
            elif isinstance(effect, Report):
                self.reports.append(effect)
            elif isinstance(effect, PublishAdvice):
                self.advice.append(effect.explanation)
            elif isinstance(effect, PublishDesired):
                self.desired.append(effect.desired)

    def take_plan(self, plan: Plan) -> None:
        check_plan(plan, self.plans[-1] if self.plans else None)
        for pipeline in plan.pipelines:
            same = self.numbers_seen.setdefault(pipeline.id, pipeline)
            assert same == pipeline, f"{pipeline.id} was used for another pipeline"
            assert self.state.fleet.ranks().keys() >= set(pipeline.ranks()), f"{pipeline.id} has lost ranks"
            self.stops.pop(pipeline.id, None)
        self.check_transfers(plan)
        self.plans.append(plan)
        names = {p.id for p in plan.pipelines}
        for process in self.processes().values():
            process.prepared &= names
            if process.runs not in names | {r.pipeline.id for r in plan.retiring if not r.broken}:
                process.runs, process.kv_tokens = None, 0
        if self.does_prepare:
            self.prepare()

    def check_transfers(self, plan: Plan) -> None:
        processes = self.processes()
        for pipeline in plan.pipelines:
            for stage in pipeline.stages:
                for shard in stage.shards:
                    needed = needed_units(plan.model, stage, shard)
                    pulled = [u for t in plan.transfers.get(shard.rank, []) for u in t.units.units()]
                    process = processes.get(shard.rank)
                    if process is None:
                        continue
                    if pipeline.id not in process.prepared and process.runs != pipeline.id:
                        assert needed <= process.units | set(pulled)
                    for transfer in plan.transfers.get(shard.rank, []):
                        for source in transfer.sources:
                            if source in processes:
                                assert transfer.units.units() <= processes[source].units

    def prepare(self) -> None:
        """All ranks of new pipelines pull and form their groups, or fail to."""
        for pipeline in self.plan.pipelines:
            for stage in pipeline.stages:
                for shard in stage.shards:
                    if pipeline.id in self.ids:  # what fails may bring the next plan at once
                        self.prepare_shard(pipeline, stage, shard)
        self.start_free()

    def prepare_shard(self, pipeline: Pipeline, stage: Stage, shard: Shard) -> None:
        process = self.processes().get(shard.rank)
        if process is None or process.runs == pipeline.id or process.name in self.hung:
            return
        if (len(pipeline.stages), pipeline.tensor) in self.refused:
            self.report(process.name, pipeline.id, Phase.PREPARE_FAILED, "too large", names_shape=self.names_shape)
        elif process.name in self.faulty:
            self.report(process.name, pipeline.id, Phase.PREPARE_FAILED, "bad device")
        else:
            process.units |= needed_units(self.model, stage, shard)
            process.prepared.add(pipeline.id)
            self.report(process.name, pipeline.id, Phase.PREPARED)

    def report(self, rank: str, pipeline: str, phase: Phase, detail: str = "", *, names_shape: bool = False) -> None:
        progress = RankProgress(
            rank=rank,
            epoch=self.plan.epoch,
            pipeline=pipeline,
            phase=phase,
            at_s=self.now_s,
            detail=detail,
            names_shape=names_shape,
        )
        if self.held is None:
            self.send(progress)
        else:
            self.held.append(progress)

    def take_arrange(self, arrange: Arrange) -> None:
        self.arranges.append(arrange)
        for name in arrange.pipelines:
            stop_s = self.now_s if arrange.deadline_s is None else arrange.deadline_s - arrange.migration_s
            self.stops[name] = max(self.now_s, stop_s)
        self.stop_due()

    def stop_due(self) -> None:
        for name, stop_s in list(self.stops.items()):
            if stop_s <= self.now_s:
                del self.stops[name]
                stopped = [process for process in self.processes().values() if process.runs == name]
                for process in stopped:
                    process.runs, process.kv_tokens = None, 0
                for process in stopped:
                    self.report(process.name, name, Phase.STOPPED)
        self.start_free()

    def start_free(self) -> None:
        processes = self.processes()
        for pipeline in self.plans[-1].pipelines if self.plans else []:
            members = [processes[rank] for rank in pipeline.ranks() if rank in processes]
            is_complete = len(members) == len(pipeline.ranks())
            if is_complete and all(p.runs is None and pipeline.id in p.prepared for p in members):
                for process in members:
                    process.runs, process.kv_tokens = pipeline.id, 100
                    process.prepared.discard(pipeline.id)
                for process in members:
                    self.report(process.name, pipeline.id, Phase.STARTED)

    def drop_dead_pipelines(self) -> None:
        """A collective without one of its ranks fails in all others."""
        known = {p.id: p for plan in self.plans for p in plan.pipelines}
        processes = self.processes()
        for process in processes.values():
            if process.runs is not None and not processes.keys() >= set(known[process.runs].ranks()):
                process.runs, process.kv_tokens = None, 0

    def check(self) -> None:
        assert self.state.next_wakeup_s(self.now_s) > self.now_s or self.stops, "a timer that is due was not run"

    # --- what is seen ---

    @property
    def plan(self) -> Plan:
        return self.plans[-1]

    @property
    def ids(self) -> list[str]:
        return [p.id for p in self.plan.pipelines]

    def shapes(self) -> list[tuple[int, int]]:
        return [(len(p.stages), p.tensor) for p in self.plan.pipelines]

    def processes(self) -> dict[str, Process]:
        return {process.name: process for ranks in self.alive.values() for process in ranks}

    def running(self) -> list[str]:
        """Pipelines whose ranks all run them."""
        processes = self.processes()
        return [
            p.id
            for p in self.plan.pipelines
            if all(rank in processes and processes[rank].runs == p.id for rank in p.ranks())
        ]


def build_rank(name: str, units: list[UnitRange] | None = None, **changes) -> Rank:
    inventory = Process(name, 2_000_000_000, 1).inventory()
    instance = changes.pop("instance", name.rpartition("-")[0])
    deadline_s = changes.pop("deadline_s", None)
    inventory = msgspec.structs.replace(inventory, units=units or [], **changes)
    return Rank(instance=instance, inventory=inventory, deadline_s=deadline_s)


@pytest.fixture
def make_model():
    return build_model


@pytest.fixture
def make_profile():
    return build_profile


@pytest.fixture
def make_rank():
    return build_rank


@pytest.fixture
def make_world():
    def make(
        model: ModelShape | None = None,
        memory_bytes: int = 2_000_000_000,
        options: dict[str, Any] | None = None,
        **targets: Any,
    ) -> World:
        return World(model or build_model(), Targets(**targets), memory_bytes, **(options or {}))

    return make
