"""What a rank has to do about a plan. Pure: the rank's service carries the decision out."""

from __future__ import annotations

from dataclasses import dataclass

from planner.protocol import ModelShape, Pipeline, Plan, RankAddress, Transfer

Unit = tuple[int, int]
"""(layer, head group)."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a rank stands in a pipeline, and what it needs there."""

    pipeline: Pipeline
    stage: int
    shard: int
    epoch: int
    addresses: dict[str, RankAddress]

    @property
    def first_layer(self) -> int:
        return self.pipeline.stages[self.stage].first_layer

    @property
    def last_layer(self) -> int:
        return self.pipeline.stages[self.stage].last_layer

    @property
    def first_group(self) -> int:
        return self.pipeline.stages[self.stage].shards[self.shard].first_group

    @property
    def last_group(self) -> int:
        return self.pipeline.stages[self.stage].shards[self.shard].last_group

    @property
    def index(self) -> int:
        """Number of the rank in its pipeline, stage by stage, shard by shard; the leader is 0."""
        return self.stage * self.pipeline.tensor + self.shard

    @property
    def leads(self) -> bool:
        return self.index == 0

    def units(self, model: ModelShape) -> set[Unit]:
        """The weight units that this position needs."""
        return {
            (layer, group)
            for layer in model.layers_of_stage(self.first_layer, self.last_layer)
            for group in range(self.first_group, self.last_group + 1)
        }


def position_of(plan: Plan, rank: str) -> Position | None:
    """The position of `rank` in `plan`, or None if it has none."""
    for pipeline in plan.pipelines:
        for stage_index, stage in enumerate(pipeline.stages):
            for shard_index, shard in enumerate(stage.shards):
                if shard.rank == rank:
                    return Position(pipeline, stage_index, shard_index, plan.epoch, plan.addresses)
    return None


@dataclass(frozen=True, slots=True)
class RoleChange:
    """What to do about a new plan, in this order."""

    abort: str | None = None
    """The running pipeline to give up at once: broken, or no longer in any plan (this rank was fenced off)."""
    discard: tuple[str, ...] = ()
    """Prepared pipelines (or ones being prepared) that are not wanted any more."""
    prepare: Position | None = None


def change_role(
    plan: Plan,
    rank: str,
    running: str | None,
    prepared: frozenset[str],
    ended: frozenset[str] = frozenset(),
) -> RoleChange:
    """Compare `plan` with what the rank runs and has prepared (or is preparing).

    Pipelines that have `ended` here, or could not be prepared, are not tried again: the next plan has another id.
    """
    position = position_of(plan, rank)
    wanted = position.pipeline.id if position else None
    retiring = {entry.pipeline.id: entry for entry in plan.retiring}
    abort = None
    if running is not None and running not in {p.id for p in plan.pipelines}:
        entry = retiring.get(running)
        if entry is None or entry.broken:
            abort = running
    known = prepared | ended | {running}
    return RoleChange(
        abort=abort,
        discard=tuple(sorted(prepared - {wanted})),
        prepare=position if wanted not in known else None,
    )


def transfers_by_unit(transfers: list[Transfer]) -> dict[Unit, list[str]]:
    """Named sources of each unit, best first."""
    return {unit: transfer.sources for transfer in transfers for unit in transfer.units.units()}
