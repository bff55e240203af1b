"""A layout on real ranks: which pipelines stay, who takes each new position, what ends, and what the change costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from planner.core.config_optimizer import Choice, Supply
from planner.core.cost_model import CostModel
from planner.core.device_mapper import Position, SlotShape, map_devices, positions_of, share_inheritance
from planner.core.fleet import Rank
from planner.core.hysteresis import Move
from planner.core.layout import Layout, Shape, size_of
from planner.core.migration_planner import Migration, kv_migration_s, plan_migration
from planner.core.retirement import retiring_pipelines
from planner.core.situation import Situation, number_of, shape_of
from planner.protocol import Pipeline, Retiring, Shard, Stage


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """What the optimizer says of one set of ranks."""

    costs: CostModel
    supply: Supply
    choice: Choice
    pool: list[Rank]
    present: list[Pipeline]
    """Intact pipelines on `pool`, most KV first, without conflicts."""
    intact: list[Pipeline]
    """The same with conflicts: a pipeline that is not built yet, and an earlier one that it would replace."""
    notes: list[str]


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """A plan's content before it is one."""

    kept: list[Pipeline]
    new: list[Pipeline]
    retiring: list[Retiring]
    migration: Migration
    move: Move
    spares: list[str]
    """Ranks without a position."""

    @property
    def pipelines(self) -> list[Pipeline]:
        return [*self.kept, *self.new]


def draft(situation: Situation, fit: Fit, layout: Layout) -> Draft:
    """`layout` on the ranks of `fit`: pipelines of its shapes stay, the rest goes where most context is."""
    kept = _kept(fit, layout)
    taken = {name for pipeline in kept for name in pipeline.ranks()}
    retiring = retiring_pipelines(situation, {p.id for p in kept}, str(layout))
    pool = [rank for rank in fit.pool if rank.id not in taken]
    shapes = layout.missing_from(Layout.of(shape_of(pipeline) for pipeline in kept)).shapes()
    trusted = [rank for rank in pool if rank.id not in situation.suspects]
    if len(trusted) >= sum(size_of(shape) for shape in shapes):
        pool = trusted
    new = _new_pipelines(situation, fit.costs, pool, shapes, retiring)
    return finish_draft(situation, kept, new, retiring, fit)


def pauses(situation: Situation, fit: Fit, layouts: Iterable[Layout]) -> dict[Layout, float]:
    """How long the pipelines that each of `layouts` stops would stand still, as `draft` says in `Draft.move`."""
    links = situation.find_links()
    pause_s = {
        p.id: kv_migration_s(situation.model, p, situation.ranks, links) + _rebuild_s(situation, p) for p in fit.present
    }
    found = {}
    for layout in layouts:
        kept = {pipeline.id for pipeline in _kept(fit, layout)}
        found[layout] = max((pause_s[p.id] for p in fit.present if p.id not in kept), default=0.0)
    return found


def finish_draft(
    situation: Situation, kept: list[Pipeline], new: list[Pipeline], retiring: list[Retiring], fit: Fit
) -> Draft:
    """Work out the transfers, and what the change costs."""
    unsettled = [p for p in [*kept, *new] if p.id not in situation.settled]
    migration = plan_migration(
        situation.model,
        unsettled,
        situation.ranks,
        situation.find_links(),
        u_max_bytes=situation.buffer_bytes or None,
        retiring=[r.pipeline for r in retiring if not r.broken],
    )
    taken = {name for pipeline in [*kept, *new] for name in pipeline.ranks()}
    return Draft(
        kept=kept,
        new=new,
        retiring=retiring,
        migration=migration,
        move=_move(situation, fit, kept, migration),
        spares=[rank.id for rank in fit.pool if rank.id not in taken],
    )


def _kept(fit: Fit, layout: Layout) -> list[Pipeline]:
    wanted = Counter(dict(layout.counts))
    kept: list[Pipeline] = []
    taken = set[str]()
    for pipeline in fit.intact:
        if wanted[shape_of(pipeline)] > 0 and taken.isdisjoint(pipeline.ranks()):
            wanted[shape_of(pipeline)] -= 1
            taken.update(pipeline.ranks())
            kept.append(pipeline)
    return sorted(kept, key=number_of)


def _new_pipelines(
    situation: Situation, costs: CostModel, pool: list[Rank], shapes: list[Shape], retiring: list[Retiring]
) -> list[Pipeline]:
    if not shapes:
        return []
    heirless = [r.pipeline for r in retiring if not r.broken]
    kv_tokens = {p.id: situation.kv_tokens(p) for p in heirless}
    # Those that find no room go back to the queue with their log.
    room = [costs.num_kv_blocks(*shape) * situation.model.kv_block_tokens for shape in shapes]
    inherits = share_inheritance(heirless, kv_tokens, len(shapes), room)
    slots = [SlotShape(tuple(costs.stages(pipeline)), tensor) for pipeline, tensor in shapes]
    ranks = map_devices(situation.model, pool, slots, heirless, inherits)
    stages = _stages(positions_of(slots, situation.model.num_head_groups), ranks, len(slots))
    first_number = situation.last.next_pipeline_number if situation.last is not None else 1
    return [
        Pipeline(
            id=f"p{first_number + slot}",
            stages=stages[slot],
            max_batch=costs.batch(*shape),
            num_kv_blocks=costs.num_kv_blocks(*shape),
            inherits=inherits[slot],
        )
        for slot, shape in enumerate(shapes)
    ]


def _stages(positions: Sequence[Position], ranks: Sequence[Rank], num_slots: int) -> list[list[Stage]]:
    """By slot; positions come slot by slot, stage by stage, shard by shard."""
    stages: list[list[Stage]] = [[] for _ in range(num_slots)]
    for position, rank in zip(positions, ranks, strict=True):
        if position.shard == 0:
            stages[position.slot].append(
                Stage(first_layer=position.first_layer, last_layer=position.last_layer, shards=[])
            )
        stages[position.slot][position.stage].shards.append(
            Shard(
                rank=rank.id,
                instance=rank.instance,
                first_group=position.first_group,
                last_group=position.last_group,
            )
        )
    return stages


def _rebuild_s(situation: Situation, pipeline: Pipeline) -> float:
    """An engine that owns its ranks is built anew on their devices, once the old one is gone."""
    ranks = [situation.ranks[name] for name in pipeline.ranks() if name in situation.ranks]
    return max((rank.inventory.rebuild_s for rank in ranks), default=0.0)


def _move(situation: Situation, fit: Fit, kept: list[Pipeline], migration: Migration) -> Move:
    kept_ids = {pipeline.id for pipeline in kept}
    stopped = [pipeline for pipeline in fit.present if pipeline.id not in kept_ids]
    throughput = {p.id: fit.costs.throughput_per_s(*shape_of(p)) for p in fit.present}
    mean_tokens = situation.workload.prompt_tokens + situation.workload.output_tokens / 2
    return Move(
        pause_s=max((migration.kv_seconds.get(p.id, 0.0) + _rebuild_s(situation, p) for p in stopped), default=0.0),
        prepare_s=migration.seconds,
        bytes_moved=migration.moved_bytes,
        num_sequences=sum(situation.kv_tokens(p) for p in stopped) / max(1.0, mean_tokens),
        stopped_share=sum(throughput[p.id] for p in stopped) / max(sum(throughput.values()), 1e-9),
    )
