"""What every plan must fulfil, checked before it is published and in tests after every event."""

from __future__ import annotations

from planner.core.migration_planner import needed_units
from planner.errors import PlanInvariantError
from planner.protocol import Pipeline, Plan


def check_plan(plan: Plan, previous: Plan | None = None) -> None:
    """Raises PlanInvariantError."""
    try:
        _check_pipelines(plan)
        _check_names(plan)
        if previous is not None:
            _check_succession(plan, previous)
    except AssertionError as error:
        raise PlanInvariantError(plan.epoch, str(error)) from error


def _check_pipelines(plan: Plan) -> None:
    taken = [rank for pipeline in plan.pipelines for rank in pipeline.ranks()]
    assert len(taken) == len(set(taken)), f"a rank has two positions: {taken}"
    ids = [pipeline.id for pipeline in plan.pipelines] + [r.pipeline.id for r in plan.retiring]
    assert len(ids) == len(set(ids)), f"a pipeline is named twice: {ids}"
    assert all(int(name.removeprefix("p")) < plan.next_pipeline_number for name in ids), "a number is free again"
    for pipeline in plan.pipelines:
        _check_coverage(pipeline, plan)


def _check_coverage(pipeline: Pipeline, plan: Plan) -> None:
    model = plan.model
    layers = [n for stage in pipeline.stages for n in range(stage.first_layer, stage.last_layer + 1)]
    assert layers == list(range(model.num_layers)), f"{pipeline.id} has layers {layers}"
    for stage in pipeline.stages:
        groups = [g for shard in stage.shards for g in range(shard.first_group, shard.last_group + 1)]
        assert groups == list(range(model.num_head_groups)), f"{pipeline.id} has head groups {groups}"
        for shard in stage.shards:
            if shard.rank not in plan.transfers:
                continue
            needed = needed_units(model, stage, shard)
            pulled = [unit for transfer in plan.transfers[shard.rank] for unit in transfer.units.units()]
            assert len(pulled) == len(set(pulled)), f"{shard.rank} pulls a unit twice"
            assert needed.issuperset(pulled), f"{shard.rank} pulls units that it does not need"
    assert pipeline.max_batch > 0, f"{pipeline.id} has max_batch {pipeline.max_batch}"
    assert pipeline.num_kv_blocks > 0, f"{pipeline.id} has no KV blocks"


def _check_names(plan: Plan) -> None:
    positions = {rank for pipeline in plan.pipelines for rank in pipeline.ranks()}
    assert positions.issuperset(plan.transfers), "a rank without a position pulls units"
    named = positions | {rank for r in plan.retiring for rank in r.pipeline.ranks()}
    named |= {name for planned in plan.transfers.values() for transfer in planned for name in transfer.sources}
    assert named == set(plan.addresses), f"addresses: {named ^ set(plan.addresses)}"
    for receiver, planned in plan.transfers.items():
        assert all(receiver not in transfer.sources for transfer in planned), f"{receiver} pulls from itself"


def _check_succession(plan: Plan, previous: Plan) -> None:
    assert plan.epoch > previous.epoch, f"epoch {plan.epoch} after {previous.epoch}"
    assert plan.next_pipeline_number >= previous.next_pipeline_number, "pipeline numbers go back"
    known = {p.id: p for p in [*previous.pipelines, *(r.pipeline for r in previous.retiring)]}
    ending = [r.pipeline.id for r in plan.retiring if not r.broken]
    handed_on = [name for p in plan.pipelines if p.id not in known for name in p.inherits]
    assert len(handed_on) == len(set(handed_on)), f"a pipeline has two heirs: {handed_on}"
    assert set(ending).issuperset(handed_on), f"what does not end is handed on: {set(handed_on) - set(ending)}"
    for pipeline in plan.pipelines:
        if pipeline.id in known:
            assert pipeline == known[pipeline.id], f"{pipeline.id} has changed"
        else:
            assert int(pipeline.id.removeprefix("p")) >= previous.next_pipeline_number, f"{pipeline.id} is not new"
