"""Which pipelines a plan ends, and why."""

from __future__ import annotations

from collections.abc import Collection

from planner.core.migration_planner import kv_migration_s
from planner.core.situation import Situation
from planner.protocol import Pipeline, Plan, Retiring


def retiring_pipelines(situation: Situation, kept: Collection[str], serves_with: str) -> list[Retiring]:
    """Those of the last plan, and those of earlier ones that have not stopped, unless they are `kept`.

    `serves_with`: the new layout in words, for the reason; empty if there is none.
    """
    if situation.last is None:
        return []
    ended = [Retiring(pipeline=p, reason="") for p in situation.last.pipelines if p.id not in situation.untouched]
    ended += [r for r in situation.open_retirements if r.pipeline.id not in {e.pipeline.id for e in ended}]
    return [_retire(situation, r.pipeline, r.reason, serves_with) for r in ended if r.pipeline.id not in kept]


def retirement_kv_s(situation: Situation, retiring: Retiring) -> float:
    """Seconds that must stay free before the deadline of a retiring pipeline for its KV to leave."""
    return kv_migration_s(situation.model, retiring.pipeline, situation.ranks, situation.find_links())


def is_news(last: Plan, pipelines: list[Pipeline], retiring: list[Retiring], deadlines: dict[str, float]) -> bool:
    """Whether the fleet must know of anything that has changed since `last`."""
    if [p.id for p in pipelines] != [p.id for p in last.pipelines] or deadlines != last.deadlines:
        return True
    known = {(r.pipeline.id, r.broken, r.deadline_s) for r in last.retiring}
    return any((r.pipeline.id, r.broken, r.deadline_s) not in known for r in retiring)


def _retire(situation: Situation, pipeline: Pipeline, reason: str, serves_with: str) -> Retiring:
    """`reason` is that of an earlier plan, empty if this is the first one that ends `pipeline`."""
    broken = not situation.is_intact(pipeline)
    deadlines = situation.deadlines([pipeline])
    if broken:
        gone = sorted(name for name in pipeline.ranks() if name not in situation.ranks)
        reason = f"lost {', '.join(gone)}" if gone else "its group failed, or a rank was restarted"
    elif deadlines:
        reason = f"{', '.join(sorted(deadlines))} will be preempted"
    elif not reason and serves_with:
        reason = f"the fleet now serves with {serves_with}"
    return Retiring(
        pipeline=pipeline,
        reason=reason or "its ranks are not used any more",
        broken=broken,
        deadline_s=None if broken else min(deadlines.values(), default=None),
    )
