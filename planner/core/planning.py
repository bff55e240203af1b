"""Make the next plan: choose the configuration, keep what can stay, map the rest to ranks, plan the transfers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from planner.core.config_optimizer import Choice, Targets, choose_config
from planner.core.cost_model import CostModel, Workload
from planner.core.device_mapper import Position, SlotShape, map_devices, positions_of, share_inheritance
from planner.core.fleet import Rank
from planner.core.migration_planner import (
    kv_migration_s,
    needed_units,
    plan_transfers,
    transfer_bytes,
    weight_migration_s,
)
from planner.protocol import (
    Explanation,
    ModelShape,
    ParallelConfig,
    Pipeline,
    Plan,
    RankAddress,
    Retiring,
    Shard,
    Stage,
    StepProfile,
)

Shape = tuple[int, int]
"""(pipeline degree, tensor degree)"""


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """All that a decision depends on."""

    model: ModelShape
    profile: StepProfile | None
    ranks: Mapping[str, Rank]
    """Of all living instances, those under notice included."""
    targets: Targets
    workload: Workload
    last: Plan | None
    cause: str
    cause_at_s: float
    excluded_ranks: frozenset[str] = frozenset()
    """Get no position for now: they failed to prepare too often."""
    ruined: frozenset[str] = frozenset()
    """Pipelines of the last plan that must be built anew although their ranks live."""
    settled: frozenset[str] = frozenset()
    """Pipelines of the last plan whose ranks are all prepared, or run."""
    untouched: frozenset[str] = frozenset()
    """Pipelines of the last plan for which no rank has prepared yet: nothing to retire."""
    open_retirements: tuple[Retiring, ...] = ()
    """Pipelines that earlier plans retire and that have not stopped yet."""
    revivable: frozenset[str] = frozenset()
    """Those of `open_retirements` that nobody has asked to stop yet."""

    @property
    def bytes_per_s(self) -> float:
        return CostModel(self.model, self.profile, 0, self.workload, 1).profile.transfer_bytes_per_s

    def is_intact(self, pipeline: Pipeline) -> bool:
        """All its ranks live, and are the processes that they were when it was planned."""
        return pipeline.id not in self.ruined and all(self._is_same(rank) for rank in pipeline.ranks())

    def _is_same(self, name: str) -> bool:
        rank = self.ranks.get(name)
        known = self.last.addresses.get(name) if self.last is not None else None
        return rank is not None and known is not None and known.context_address == rank.inventory.context_address


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """What shall run: the pipelines that stay, and the shape and ranks of the new ones."""

    choice: Choice
    config: ParallelConfig | None
    kept: list[Pipeline]
    num_new: int
    pool: list[Rank]
    """Ranks for the new pipelines."""
    num_kv_blocks: int
    stages: list[tuple[int, int]]
    notes: list[str]


def make_plan(situation: Situation, now_s: float) -> Plan | None:
    """The next plan; None if nothing that the fleet must know of changes."""
    last = situation.last
    layout = _lay_out(situation)
    retiring = _retiring(situation, layout)
    number = last.next_pipeline_number if last is not None else 1
    new = _new_pipelines(situation, layout, [r.pipeline for r in retiring if not r.broken], number)
    pipelines = [*layout.kept, *new]
    deadlines = _deadlines(pipelines, situation.ranks)
    if last is not None and not _is_news(last, pipelines, retiring, deadlines):
        return None
    unsettled = [p for p in pipelines if p.id not in situation.settled]
    transfers = plan_transfers(situation.model, unsettled, situation.ranks)
    plan = Plan(
        epoch=last.epoch + 1 if last is not None else 1,
        model=situation.model,
        pipelines=pipelines,
        retiring=retiring,
        transfers=transfers,
        addresses={},
        explanation=_explanation(situation, layout, now_s),
        next_pipeline_number=number + len(new),
        deadlines=deadlines,
    )
    return _with_measures(plan, unsettled, situation)


def retirement_kv_s(situation: Situation, retiring: Retiring) -> float:
    """Seconds that must stay free before the deadline of a retiring pipeline for its KV to leave."""
    return kv_migration_s(situation.model, retiring.pipeline, situation.ranks, situation.bytes_per_s)


# --- What shall run ---


def _lay_out(situation: Situation) -> Layout:
    intact = _intact_pipelines(situation)
    candidates = [rank for rank in situation.ranks.values() if rank.id not in situation.excluded_ranks]
    ready = [rank for rank in candidates if rank.deadline_s is None]
    layout = _fit_largest(situation, ready, intact, [])
    if layout.config is not None:
        return layout
    kept = _without_conflicts(p for p in intact if not situation.excluded_ranks & set(p.ranks()))
    if kept:
        note = "no other ranks are left: pipelines on instances under notice serve until the deadline"
        config = ParallelConfig(
            data=len(kept),
            pipeline=len(kept[0].stages),
            tensor=kept[0].tensor,
            max_batch=kept[0].max_batch,
        )
        return msgspec.structs.replace(layout, config=config, kept=kept, notes=[note])
    if len(candidates) > len(ready):
        return _fit_largest(situation, candidates, intact, ["no other ranks are left: ranks under notice are used"])
    return layout


def _fit_largest(situation: Situation, pool: list[Rank], intact: list[Pipeline], notes: list[str]) -> Layout:
    """On all of `pool` if the model fits in the smallest memory of them, else without the smallest ones."""
    smallest = _fit(situation, pool, intact, notes)
    if smallest.config is not None:
        return smallest
    for memory_bytes in sorted({rank.inventory.memory_bytes for rank in pool})[1:]:
        larger = [rank for rank in pool if rank.inventory.memory_bytes >= memory_bytes]
        note = f"{len(pool) - len(larger)} ranks are left out: they have less than {memory_bytes / 1e6:.0f} MB"
        layout = _fit(situation, larger, intact, [*notes, note])
        if layout.config is not None:
            return layout
    return smallest


def _fit(situation: Situation, pool: list[Rank], intact: list[Pipeline], notes: list[str]) -> Layout:
    memory_bytes = min((rank.inventory.memory_bytes for rank in pool), default=0)
    costs = CostModel(situation.model, situation.profile, memory_bytes, situation.workload, situation.targets.max_batch)
    choice = choose_config(costs, len(pool), situation.targets, _present_shape(situation, intact))
    config = choice.config
    if config is None:
        why = "there are no ranks" if not pool else f"the model does not fit on {len(pool)} ranks"
        notes = [*notes, f"no pipeline: {why}; requests wait"]
        return Layout(choice=choice, config=None, kept=[], num_new=0, pool=[], num_kv_blocks=0, stages=[], notes=notes)
    usable = {rank.id for rank in pool}
    fitting = [p for p in intact if _shape(p) == (config.pipeline, config.tensor) and usable.issuperset(p.ranks())]
    kept = sorted(_without_conflicts(fitting)[: config.data], key=lambda p: _number(p.id))
    taken = {name for pipeline in kept for name in pipeline.ranks()}
    return Layout(
        choice=choice,
        config=config,
        kept=kept,
        num_new=config.data - len(kept),
        pool=[rank for rank in pool if rank.id not in taken],
        num_kv_blocks=costs.num_kv_blocks(config.pipeline, config.tensor),
        stages=costs.stages(config.pipeline),
        notes=notes,
    )


def _intact_pipelines(situation: Situation) -> list[Pipeline]:
    """Those of the last plan with most KV first, then those that it retires and that nobody has stopped."""

    def by_kv(pipeline: Pipeline) -> tuple[int, int]:
        return -_kv_tokens(pipeline, situation.ranks), _number(pipeline.id)

    current = sorted(situation.last.pipelines, key=by_kv) if situation.last is not None else []
    revivable = [r.pipeline for r in situation.open_retirements if r.pipeline.id in situation.revivable]
    return [p for p in [*current, *sorted(revivable, key=by_kv)] if situation.is_intact(p)]


def _without_conflicts(pipelines: Iterable[Pipeline]) -> list[Pipeline]:
    """Drop a pipeline that wants a rank of an earlier one."""
    chosen, taken = [], set[str]()
    for pipeline in pipelines:
        if taken.isdisjoint(pipeline.ranks()):
            chosen.append(pipeline)
            taken.update(pipeline.ranks())
    return chosen


def _new_pipelines(situation: Situation, layout: Layout, retiring: list[Pipeline], first_number: int) -> list[Pipeline]:
    if layout.config is None or layout.num_new == 0:
        return []
    kv_tokens = {p.id: _kv_tokens(p, situation.ranks) for p in retiring}
    inherits = share_inheritance(retiring, kv_tokens, layout.num_new)
    slots = [SlotShape(tuple(layout.stages), layout.config.tensor)] * layout.num_new
    positions = positions_of(slots, situation.model.num_head_groups)
    ranks = map_devices(situation.model, layout.pool, slots, retiring, inherits)
    return [
        Pipeline(
            id=f"p{first_number + slot}",
            stages=_stages(slot, positions, ranks),
            max_batch=layout.config.max_batch,
            num_kv_blocks=layout.num_kv_blocks,
            inherits=inherits[slot],
        )
        for slot in range(layout.num_new)
    ]


def _stages(slot: int, positions: list[Position], ranks: list[Rank]) -> list[Stage]:
    stages: dict[int, Stage] = {}
    for position, rank in zip(positions, ranks, strict=True):
        if position.slot == slot:
            stage = stages.setdefault(
                position.stage,
                Stage(first_layer=position.first_layer, last_layer=position.last_layer, shards=[]),
            )
            stage.shards.append(
                Shard(
                    rank=rank.id,
                    instance=rank.instance,
                    first_group=position.first_group,
                    last_group=position.last_group,
                )
            )
    return [stages[index] for index in sorted(stages)]


# --- What ends ---


def _retiring(situation: Situation, layout: Layout) -> list[Retiring]:
    if situation.last is None:
        return []
    kept = {pipeline.id for pipeline in layout.kept}
    ended = [Retiring(pipeline=p, reason="") for p in situation.last.pipelines if p.id not in situation.untouched]
    ended += [r for r in situation.open_retirements if r.pipeline.id not in {e.pipeline.id for e in ended}]
    return [_retire(situation, layout, r.pipeline, r.reason) for r in ended if r.pipeline.id not in kept]


def _retire(situation: Situation, layout: Layout, pipeline: Pipeline, reason: str) -> Retiring:
    """`reason` is that of an earlier plan, empty if this is the first one that ends `pipeline`."""
    broken = not situation.is_intact(pipeline)
    deadlines = _deadlines([pipeline], situation.ranks)
    if broken:
        gone = sorted(name for name in pipeline.ranks() if name not in situation.ranks)
        reason = f"lost {', '.join(gone)}" if gone else "its group failed, or a rank was restarted"
    elif deadlines:
        reason = f"{', '.join(sorted(deadlines))} will be preempted"
    elif not reason and layout.config is not None:
        reason = f"the fleet now serves with {_describe(layout.config)}"
    return Retiring(
        pipeline=pipeline,
        reason=reason or "its ranks are not used any more",
        broken=broken,
        deadline_s=None if broken else min(deadlines.values(), default=None),
    )


def _is_news(last: Plan, pipelines: list[Pipeline], retiring: list[Retiring], deadlines: dict[str, float]) -> bool:
    if [p.id for p in pipelines] != [p.id for p in last.pipelines] or deadlines != last.deadlines:
        return True
    known = {(r.pipeline.id, r.broken, r.deadline_s) for r in last.retiring}
    return any((r.pipeline.id, r.broken, r.deadline_s) not in known for r in retiring)


def _deadlines(pipelines: Iterable[Pipeline], ranks: Mapping[str, Rank]) -> dict[str, float]:
    members = [ranks[name] for pipeline in pipelines for name in pipeline.ranks() if name in ranks]
    return {rank.instance: rank.deadline_s for rank in members if rank.deadline_s is not None}


# --- Why ---


def _explanation(situation: Situation, layout: Layout, now_s: float) -> Explanation:
    notes = list(layout.notes)
    if layout.kept:
        notes.append(f"unchanged: {', '.join(p.id for p in layout.kept)}")
    num_idle = len(layout.pool) - layout.num_new * (
        layout.config.pipeline * layout.config.tensor if layout.config else 0
    )
    if num_idle > 0:
        notes.append(f"{num_idle} ranks without a position")
    if situation.excluded_ranks:
        notes.append(f"excluded after failing to prepare: {', '.join(sorted(situation.excluded_ranks))}")
    return Explanation(
        cause=situation.cause,
        cause_at_s=situation.cause_at_s,
        decided_at_s=now_s,
        arrivals_per_s=situation.workload.arrivals_per_s,
        num_ranks=len(situation.ranks),
        chosen=layout.config,
        alternatives=layout.choice.alternatives,
        notes=notes,
    )


def _with_measures(plan: Plan, unsettled: list[Pipeline], situation: Situation) -> Plan:
    """Add the addresses of all that it names, and the figures of its migration."""
    model = plan.model
    needed_bytes = sum(
        model.unit_bytes(layer)
        for pipeline in unsettled
        for stage in pipeline.stages
        for shard in stage.shards
        for layer, _ in needed_units(model, stage, shard)
    )
    moved_bytes = sum(transfer_bytes(model, transfers) for transfers in plan.transfers.values())
    kv_s = [retirement_kv_s(situation, r) for r in plan.retiring if not r.broken]
    weights_s = weight_migration_s(model, plan.transfers, situation.bytes_per_s)
    explanation = msgspec.structs.replace(
        plan.explanation,
        bytes_reused=needed_bytes - moved_bytes,
        bytes_moved=moved_bytes,
        migration_s=round(max([weights_s, *kv_s]), 3),
    )
    return msgspec.structs.replace(plan, explanation=explanation, addresses=_addresses(plan, situation))


def _addresses(plan: Plan, situation: Situation) -> dict[str, RankAddress]:
    names = {name for p in plan.pipelines for name in p.ranks()}
    names |= {name for r in plan.retiring for name in r.pipeline.ranks()}
    names |= {name for planned in plan.transfers.values() for transfer in planned for name in transfer.sources}
    known = dict(situation.last.addresses) if situation.last is not None else {}
    known |= {
        rank.id: RankAddress(
            instance=rank.instance,
            context_address=rank.inventory.context_address,
            store_address=rank.inventory.store_address,
        )
        for rank in situation.ranks.values()
    }
    return {name: known[name] for name in sorted(names)}


# --- Pipelines ---


def _kv_tokens(pipeline: Pipeline, ranks: Mapping[str, Rank]) -> int:
    leader = ranks.get(pipeline.leader)
    return leader.inventory.kv_tokens if leader is not None else 0


def _present_shape(situation: Situation, intact: list[Pipeline]) -> Shape | None:
    serving = intact or (situation.last.pipelines if situation.last is not None else [])
    return _shape(serving[0]) if serving else None


def _shape(pipeline: Pipeline) -> Shape:
    return len(pipeline.stages), pipeline.tensor


def _describe(config: ParallelConfig) -> str:
    return f"{config.data} pipelines of {config.pipeline} stages x {config.tensor} shards"


def _number(pipeline_id: str) -> int:
    return int(pipeline_id.removeprefix("p"))
