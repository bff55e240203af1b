"""How far the fleet has come with the current plan, and when retiring pipelines are told to stop.

A retiring pipeline is arranged when all new pipelines are prepared; at once if no new pipeline waits for its ranks and
it has a deadline (its leader then runs as long as that allows); and in any case in time before its deadline.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Final

import msgspec

from planner.protocol import Arrange, InstanceInventory, Phase, Pipeline, Plan, RankProgress, Retiring

ARRANGE_MARGIN_S: Final = 1.0
"""How long before the last moment an unprepared change is arranged all the same."""
RESEND_S: Final = 1.0
MAX_SENDS: Final = 10


class Retirement(msgspec.Struct, kw_only=True):
    """One retiring pipeline that has not stopped yet."""

    retiring: Retiring
    shares_ranks: bool
    """New pipelines need ranks of it."""
    migration_s: float
    num_sent: int = 0
    sent_at_s: float = 0.0
    """The last time."""
    may_be_stopping: bool = False
    """Somebody may have told it to stop: a planner that ran before this one."""

    def arrange_at_s(self, is_prepared: bool, now_s: float) -> float:
        """When the next Arrange for it is due; infinite if it waits for the ranks of the new pipelines."""
        deadline_s = self.retiring.deadline_s
        if self.num_sent >= MAX_SENDS:
            return math.inf
        if self.num_sent:
            stops_at_s = deadline_s - self.migration_s if deadline_s is not None else -math.inf
            return max(self.sent_at_s, stops_at_s) + RESEND_S
        if is_prepared or (deadline_s is not None and not self.shares_ranks):
            return now_s
        return deadline_s - self.migration_s - ARRANGE_MARGIN_S if deadline_s is not None else math.inf


class Rollout:
    """Progress of the current plan; pipelines that stay from plan to plan keep theirs."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.retirements: dict[str, Retirement] = {}
        self._prepared: dict[str, set[str]] = defaultdict(set)
        """By pipeline: ranks that are prepared, or run it."""
        self._may_run: frozenset[str] = frozenset()
        """Pipelines of a restored plan: they may run although nobody has told this planner."""

    def adopt(self, plan: Plan, migration_s: Mapping[str, float], *, restored_at_s: float | None = None) -> None:
        """Follow `plan` from now on. `migration_s` by retiring pipeline. `restored_at_s`: time of a restart."""
        needed = {rank for pipeline in plan.pipelines for rank in pipeline.ranks()}
        before, self.retirements = self.retirements, {}
        for retiring in plan.retiring:
            has_ended = retiring.broken or (
                # It was arranged before its deadline, by this planner or the one before.
                restored_at_s is not None and retiring.deadline_s is not None and retiring.deadline_s < restored_at_s
            )
            if has_ended:
                continue
            retirement = Retirement(
                retiring=retiring,
                shares_ranks=not needed.isdisjoint(retiring.pipeline.ranks()),
                migration_s=migration_s.get(retiring.pipeline.id, 0.0),
                may_be_stopping=restored_at_s is not None,
            )
            earlier = before.get(retiring.pipeline.id)
            if earlier is not None:
                retirement.may_be_stopping = earlier.may_be_stopping or earlier.num_sent > 0
                if earlier.retiring.deadline_s == retiring.deadline_s:
                    retirement.num_sent, retirement.sent_at_s = earlier.num_sent, earlier.sent_at_s
            self.retirements[retiring.pipeline.id] = retirement
        self.plan = plan
        if restored_at_s is not None:
            self._may_run = frozenset(p.id for p in plan.pipelines)
        alive = {p.id for p in plan.pipelines} | set(self.retirements)
        self._prepared = defaultdict(set, {k: v for k, v in self._prepared.items() if k in alive})

    # --- What is heard ---

    def note_progress(self, progress: RankProgress) -> None:
        if progress.phase in (Phase.PREPARED, Phase.STARTED):
            self._note_prepared(progress.pipeline, progress.rank)
        elif progress.phase is Phase.STOPPED:
            self.retirements.pop(progress.pipeline, None)

    def note_inventory(self, inventory: InstanceInventory) -> None:
        """Inventories say the same as progress messages, only later: what was lost on the way is made good."""
        for rank in inventory.ranks:
            for pipeline in [*rank.prepared, *([rank.pipeline] if rank.pipeline else [])]:
                self._note_prepared(pipeline, rank.rank)
            if self.plan is not None and inventory.epoch >= self.plan.epoch:
                self._drop_stopped(rank.rank, rank.pipeline)

    def _note_prepared(self, pipeline: str, rank: str) -> None:
        if self._find(pipeline) is not None:
            self._prepared[pipeline].add(rank)

    def _drop_stopped(self, rank: str, runs: str | None) -> None:
        for name, retirement in list(self.retirements.items()):
            if retirement.retiring.pipeline.leader == rank and runs != name:
                del self.retirements[name]

    # --- What it means ---

    def is_prepared(self, pipeline: Pipeline) -> bool:
        return self._prepared[pipeline.id].issuperset(pipeline.ranks())

    @property
    def is_all_prepared(self) -> bool:
        return self.plan is not None and all(self.is_prepared(p) for p in self.plan.pipelines)

    def settled(self) -> frozenset[str]:
        """Pipelines of the plan whose ranks are all prepared."""
        return frozenset(p.id for p in self._pipelines() if self.is_prepared(p))

    def untouched(self) -> frozenset[str]:
        """Pipelines of the plan that no rank has prepared yet."""
        return frozenset(p.id for p in self._pipelines() if not self._prepared[p.id]) - self._may_run

    def open_retirements(self) -> tuple[Retiring, ...]:
        return tuple(retirement.retiring for retirement in self.retirements.values())

    def revivable(self) -> frozenset[str]:
        """Retiring pipelines that nobody has told to stop."""
        return frozenset(name for name, r in self.retirements.items() if r.num_sent == 0 and not r.may_be_stopping)

    def due_arranges(self, now_s: float) -> list[Arrange]:
        """The Arrange messages to send now, one for each deadline."""
        if self.plan is None:
            return []
        due: dict[float | None, list[Retirement]] = defaultdict(list)
        is_prepared = self.is_all_prepared
        for retirement in self.retirements.values():
            if retirement.arrange_at_s(is_prepared, now_s) <= now_s:
                due[retirement.retiring.deadline_s].append(retirement)
                retirement.num_sent += 1
                retirement.sent_at_s = now_s
        return [
            Arrange(
                epoch=self.plan.epoch,
                pipelines=[r.retiring.pipeline.id for r in retirements],
                deadline_s=deadline_s,
                migration_s=round(max(r.migration_s for r in retirements), 3),
            )
            for deadline_s, retirements in due.items()
        ]

    def next_wakeup_s(self, now_s: float) -> float:
        is_prepared = self.is_all_prepared
        return min((r.arrange_at_s(is_prepared, now_s) for r in self.retirements.values()), default=math.inf)

    def _pipelines(self) -> list[Pipeline]:
        return self.plan.pipelines if self.plan is not None else []

    def _find(self, pipeline: str) -> Pipeline | None:
        known = [*self._pipelines(), *(r.retiring.pipeline for r in self.retirements.values())]
        return next((p for p in known if p.id == pipeline), None)
