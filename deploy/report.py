"""What `status` and `plan` say: the JSON reports, made from the planner's answer. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from deploy.client import RequestCounts
from planner.protocol import InstanceState, InstanceStatus, Market, Pipeline, Shard, Status


class ShardReport(msgspec.Struct, frozen=True, kw_only=True):
    rank: str
    instance: str
    head_groups: tuple[int, int]
    """First and last."""


class StageReport(msgspec.Struct, frozen=True, kw_only=True):
    layers: tuple[int, int]
    """First and last."""
    shards: list[ShardReport]


class PipelineReport(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    stages: list[StageReport]
    running: int


class InstanceReport(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    market: Market
    state: InstanceState
    deadline_s: float | None
    ranks: list[str]


class RequestReport(msgspec.Struct, frozen=True, kw_only=True):
    running: int | None
    """None, as `waiting`: the gateway did not answer."""
    waiting: int | None


class PlannerReport(msgspec.Struct, frozen=True, kw_only=True):
    advisory: bool
    """Only what keeps the fleet serving is carried out."""
    failed_decisions: int
    last_failure: str
    """Empty if the last decision has worked; else the last good plan stands."""
    desired: dict[str, Any] | None
    """A `DesiredCapacity`, the instances that the planner wants; None: it takes the fleet as it comes."""


class StatusReport(msgspec.Struct, frozen=True, kw_only=True):
    """`spotserve status --json`."""

    epoch: int
    instances: list[InstanceReport]
    pipelines: list[PipelineReport]
    requests: RequestReport
    planner: PlannerReport


def status_report(status: Status, requests: RequestCounts | None) -> StatusReport:
    """`requests` is None where the gateway did not answer.

    A retiring pipeline is listed for as long as it serves: under notice it goes on until its deadline is near.
    """
    running = requests.pipelines if requests else {}
    pipelines = list(status.plan.pipelines) if status.plan else []
    retiring = status.plan.retiring if status.plan else []
    pipelines += [one.pipeline for one in retiring if not one.broken and running.get(one.pipeline.id)]
    return StatusReport(
        epoch=status.epoch,
        instances=[_instance_report(instance) for instance in status.instances],
        pipelines=[_pipeline_report(pipeline, running.get(pipeline.id, 0)) for pipeline in pipelines],
        requests=RequestReport(
            running=requests.running if requests else None, waiting=requests.waiting if requests else None
        ),
        planner=PlannerReport(
            advisory=status.advisory,
            failed_decisions=status.num_failed_decisions,
            last_failure=status.last_failure,
            desired=_complete(status.desired),
        ),
    )


def plan_report(status: Status, num_decisions: int | None = None) -> dict[str, Any]:
    """`spotserve plan --json`: epoch, pipelines, retiring, explanation (None before the first plan), history, desired.

    `num_decisions`: the length of the history, newest first; None: all of it. Every field is there, defaults too.
    """
    plan = status.plan
    explicit = {
        "epoch": status.epoch,
        "pipelines": [_pipeline_report(pipeline, 0) for pipeline in plan.pipelines] if plan else [],
        "retiring": [{"id": one.pipeline.id, "reason": one.reason} for one in plan.retiring] if plan else [],
        "explanation": plan.explanation if plan else None,
        "history": status.history[:num_decisions],
        "desired": status.desired,
    }
    report: dict[str, Any] = _complete(explicit)
    for pipeline in report["pipelines"]:
        del pipeline["running"]  # the plan does not know it; `status` does
    return report


def _complete(value: Any) -> Any:
    """As plain objects, fields that have their default value included: on the wire they are left out."""
    match value:
        case msgspec.Struct():
            return {name: _complete(getattr(value, name)) for name in value.__struct_fields__}
        case dict():
            return {name: _complete(one) for name, one in value.items()}
        case list() | tuple():
            return [_complete(one) for one in value]
        case _:
            return msgspec.to_builtins(value)


def _instance_report(instance: InstanceStatus) -> InstanceReport:
    return InstanceReport(
        id=instance.id,
        market=instance.market,
        state=instance.state,
        deadline_s=instance.deadline_s,
        ranks=instance.ranks,
    )


def _pipeline_report(pipeline: Pipeline, running: int) -> PipelineReport:
    stages = [
        StageReport(
            layers=(stage.first_layer, stage.last_layer), shards=[_shard_report(shard) for shard in stage.shards]
        )
        for stage in pipeline.stages
    ]
    return PipelineReport(id=pipeline.id, stages=stages, running=running)


def _shard_report(shard: Shard) -> ShardReport:
    return ShardReport(rank=shard.rank, instance=shard.instance, head_groups=(shard.first_group, shard.last_group))
