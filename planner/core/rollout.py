"""How far the fleet has come with the current plan, and when retiring pipelines are told to stop.

A retiring pipeline is arranged when all new pipelines are prepared; at once if no new pipeline waits for its ranks and
it has a deadline (its leader then runs as long as that allows); and in any case in time before its deadline. One that
prepared pipelines wait for together with other ranks stops at the next token boundary, whatever its deadline: the other
ranks, and the sequences that were on them, would stand still until then.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Final

import msgspec

from planner.core.migration_planner import needed_units
from planner.protocol import Arrange, InstanceInventory, Phase, Pipeline, Plan, RankInventory, RankProgress, Retiring

ARRANGE_MARGIN_S: Final = 1.0
"""How long before the last moment an unprepared change is arranged all the same."""
RESEND_S: Final = 1.0
MAX_SENDS: Final = 10
REVIVE_MARGIN_S: Final = 3.0
"""A leader stops up to so long before it must; what is about to stop is not kept."""


class Retirement(msgspec.Struct, kw_only=True):
    """One retiring pipeline that has not stopped yet."""

    retiring: Retiring
    shares_ranks: bool
    """New pipelines need ranks of it."""
    migration_s: float
    holds_up_others: bool = False
    """New pipelines need ranks of it together with others."""
    is_waited_for: bool = False
    """They are prepared."""
    num_sent: int = 0
    sent_at_s: float = 0.0
    """The last time."""
    stops_at_s: float = math.inf
    """When it stops by what it has been told; infinite if nobody has told it to."""

    @property
    def deadline_s(self) -> float | None:
        """What its leader is told; None: stop at the next token boundary."""
        return None if self.is_waited_for else self.retiring.deadline_s

    def note_prepared(self) -> None:
        """All new pipelines are. What it was told before does not hold any more if they wait for it."""
        if self.holds_up_others and not self.is_waited_for:
            self.is_waited_for = True
            if self.retiring.deadline_s is not None:
                self.num_sent = 0

    def arrange_at_s(self, is_prepared: bool, now_s: float) -> float:
        """When the next Arrange for it is due; infinite if it waits for the ranks of the new pipelines."""
        deadline_s = self.deadline_s
        if self.num_sent >= MAX_SENDS:
            return math.inf
        if self.num_sent:
            stops_at_s = deadline_s - self.migration_s if deadline_s is not None else -math.inf
            return max(self.sent_at_s, stops_at_s) + RESEND_S
        if is_prepared or (deadline_s is not None and not self.shares_ranks):
            return now_s
        return deadline_s - self.migration_s - ARRANGE_MARGIN_S if deadline_s is not None else math.inf

    def note_told(self, now_s: float) -> None:
        """An Arrange goes out. One without deadline has stopped it for good, whatever is said later."""
        self.num_sent += 1
        self.sent_at_s = now_s
        deadline_s = self.deadline_s
        if self.stops_at_s != -math.inf:
            self.stops_at_s = -math.inf if deadline_s is None else deadline_s - self.migration_s


class Rollout:
    """Progress of the current plan; pipelines that stay from plan to plan keep theirs."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.retirements: dict[str, Retirement] = {}
        self._prepared: dict[str, set[str]] = defaultdict(set)
        """By pipeline: ranks that are prepared, or run it."""
        self._started: set[str] = set()
        """Pipelines that some rank has been heard to run."""
        self._said_started: set[str] = set()
        """Those of them that have said so themselves."""
        self._seen_running: set[str] = set()
        """Those of them that an inventory has shown: progress messages may overtake inventories."""
        self._since_epoch: dict[str, int] = {}
        """By pipeline: ranks that have not seen this epoch may since have discarded what they prepared."""
        self._waiting: dict[str, float] = {}
        """By pipeline of the plan that is not all prepared: when it was last seen to advance."""
        self._planned: dict[str, Pipeline] = {}
        self._place: dict[str, str] = {}
        """By rank: its pipeline in the plan."""
        self._may_run: frozenset[str] = frozenset()
        """Pipelines of a restored plan: they may run although nobody has told this planner."""
        self._ranks: dict[str, RankInventory] = {}

    def adopt(self, plan: Plan, migration_s: Mapping[str, float], now_s: float, *, is_restored: bool = False) -> None:
        """Follow `plan` from now on. `migration_s` by retiring pipeline; `is_restored`: an earlier planner's plan."""
        before, self.retirements = self.retirements, {}
        needed = [frozenset(pipeline.ranks()) for pipeline in plan.pipelines]
        for retiring in plan.retiring:
            ranks, deadline_s = frozenset(retiring.pipeline.ranks()), retiring.deadline_s
            # It was arranged before its deadline, by this planner or the one before.
            has_ended = is_restored and deadline_s is not None and deadline_s < now_s
            if retiring.broken or has_ended:
                continue
            retirement = Retirement(
                retiring=retiring,
                shares_ranks=any(not ranks.isdisjoint(new) for new in needed),
                holds_up_others=any(not ranks.isdisjoint(new) and not new <= ranks for new in needed),
                migration_s=migration_s.get(retiring.pipeline.id, 0.0),
            )
            if is_restored:
                retirement.stops_at_s = -math.inf if deadline_s is None else deadline_s - retirement.migration_s
            earlier = before.get(retiring.pipeline.id)
            if earlier is not None:
                retirement.stops_at_s = earlier.stops_at_s
                if earlier.retiring.deadline_s == deadline_s:
                    retirement.num_sent, retirement.sent_at_s = earlier.num_sent, earlier.sent_at_s
            self.retirements[retiring.pipeline.id] = retirement
        self._note_plan(plan, now_s, is_restored=is_restored)

    def _note_plan(self, plan: Plan, now_s: float, *, is_restored: bool) -> None:
        known = set(self._planned)
        self.plan, self._planned = plan, {p.id: p for p in plan.pipelines}
        self._place = {rank: p.id for p in plan.pipelines for rank in p.ranks()}
        ids = set(self._planned)
        self._started &= ids | set(self.retirements)
        self._seen_running &= self._started
        self._said_started &= self._started
        if is_restored:
            self._may_run = frozenset(ids)
        # Ranks discard what they prepared for a pipeline that a plan ends before it has started.
        kept = (ids & known) | ((ids | set(self.retirements)) & (self._started | self._may_run))
        self._prepared = defaultdict(set, {k: v for k, v in self._prepared.items() if k in kept})
        come = set[str]() if is_restored else ids - known
        self._since_epoch = {k: v for k, v in self._since_epoch.items() if k in ids} | dict.fromkeys(come, plan.epoch)
        waiting = [p.id for p in plan.pipelines if not self._prepared[p.id].issuperset(p.ranks())]
        self._waiting = {name: now_s if name in come else self._waiting.get(name, now_s) for name in waiting}

    # --- What is heard ---

    def note_progress(self, progress: RankProgress, now_s: float) -> None:
        if progress.phase is Phase.STARTED or (
            progress.phase is Phase.PREPARED and progress.epoch >= self._since_epoch.get(progress.pipeline, 0)
        ):
            self._note_prepared(progress.pipeline, progress.rank, now_s)
        if progress.phase is Phase.STARTED and progress.pipeline in {*self._planned, *self.retirements}:
            self._started.add(progress.pipeline)
            self._said_started.add(progress.pipeline)
        elif progress.phase is Phase.STOPPED:
            self.retirements.pop(progress.pipeline, None)

    def note_inventory(self, inventory: InstanceInventory, now_s: float) -> list[str]:
        """Inventories say the same as progress messages, only later: what was lost on the way is made good.

        Returns pipelines of the plan that ran and, by their leader's word, do not run any more.
        """
        over = []
        for rank in inventory.ranks:
            self._note_context(rank, now_s)
            for pipeline in rank.prepared:
                if inventory.epoch >= self._since_epoch.get(pipeline, 0):
                    self._note_prepared(pipeline, rank.rank, now_s)
            if rank.pipeline in self._planned or rank.pipeline in self.retirements:
                self._note_prepared(rank.pipeline, rank.rank, now_s)
                self._started.add(rank.pipeline)
                running = self.find(rank.pipeline)
                if running is not None and running.leader == rank.rank:
                    self._seen_running.add(rank.pipeline)  # A member may start long before its leader has prepared.
            if self.plan is not None and inventory.epoch >= self.plan.epoch:
                self._drop_stopped(rank.rank, rank.pipeline)
                over += self._ended(rank)
        return over

    def _note_context(self, rank: RankInventory, now_s: float) -> None:
        """Weights that have come in are progress too."""
        before = self._ranks.get(rank.rank)
        self._ranks[rank.rank] = rank
        pipeline = self._place.get(rank.rank, "")
        if pipeline in self._waiting and (before is None or before.units != rank.units):
            self._waiting[pipeline] = now_s

    def _note_prepared(self, name: str, rank: str, now_s: float) -> None:
        pipeline = self.find(name)
        if pipeline is None or rank in self._prepared[name]:
            return
        self._prepared[name].add(rank)
        if name in self._waiting:
            self._waiting[name] = now_s
            if self.is_prepared(pipeline):
                del self._waiting[name]

    def _drop_stopped(self, rank: str, runs: str | None) -> None:
        for name, retirement in list(self.retirements.items()):
            if retirement.retiring.pipeline.leader == rank and runs != name:
                del self.retirements[name]

    def _ended(self, rank: RankInventory) -> list[str]:
        """The pipeline of the plan that `rank` leads, if it ran and does not run any more."""
        name = self._place.get(rank.rank, "")
        if name not in self._seen_running or self._planned[name].leader != rank.rank:
            return []
        return [] if rank.pipeline == name or name in rank.prepared else [name]

    # --- What it means ---

    def is_prepared(self, pipeline: Pipeline) -> bool:
        return self._prepared[pipeline.id].issuperset(pipeline.ranks())

    @property
    def is_all_prepared(self) -> bool:
        return self.plan is not None and not self._waiting

    def settled(self) -> frozenset[str]:
        """Pipelines of the plan whose ranks are all prepared."""
        return frozenset(self._planned.keys() - self._waiting.keys())

    def current(self) -> list[Pipeline]:
        """Of the plan, and those that it retires and that have not stopped."""
        return [*self._planned.values(), *(r.retiring.pipeline for r in self.retirements.values())]

    def find(self, name: str) -> Pipeline | None:
        """One of `current`."""
        retirement = self.retirements.get(name)
        return self._planned.get(name) or (retirement.retiring.pipeline if retirement is not None else None)

    def serving(self) -> list[Pipeline]:
        """Those of `current` that have said that they serve.

        That a rank runs its part does not tell: its engine may still be built, and that may fail.
        """
        ids = self._said_started | (self._may_run & self._started)
        return [pipeline for pipeline in self.current() if pipeline.id in ids]

    def untouched(self) -> frozenset[str]:
        """Pipelines of the plan that no rank has prepared yet."""
        return frozenset(name for name in self._waiting if not self._prepared[name]) - self._may_run

    def open_retirements(self) -> tuple[Retiring, ...]:
        return tuple(retirement.retiring for retirement in self.retirements.values())

    def revivable(self, now_s: float, noticed: Collection[str]) -> frozenset[str]:
        """Retiring pipelines that nobody has told to stop.

        Also those that were told to stop at a time that is some way off because of a notice that does not hold any
        more: none of their ranks is `noticed`.
        """
        return frozenset(
            name
            for name, retirement in self.retirements.items()
            if retirement.stops_at_s == math.inf
            or (
                retirement.stops_at_s > now_s + REVIVE_MARGIN_S
                and not any(rank in noticed for rank in retirement.retiring.pipeline.ranks())
            )
        )

    def hung(self, now_s: float, timeout_s: float) -> list[tuple[Pipeline, list[str]]]:
        """Pipelines whose preparation stands still, and the ranks it waits for. Each is reported once."""
        due = [name for name in self._waiting if self._hangs_at_s(name, timeout_s) <= now_s]
        for name in due:
            self._waiting[name] = math.inf
        return [(self._planned[name], self._missing(self._planned[name])) for name in due]

    def _hangs_at_s(self, pipeline: str, timeout_s: float) -> float:
        expected_s = self.plan.explanation.migration_s if self.plan is not None else 0.0
        return self._waiting[pipeline] + timeout_s + expected_s

    def _missing(self, pipeline: Pipeline) -> list[str]:
        """Ranks that still lack weights; if all have theirs, those that are not prepared."""
        assert self.plan is not None
        waiting = [rank for rank in pipeline.ranks() if rank not in self._prepared[pipeline.id]]
        lacking = []
        for stage in pipeline.stages:
            for shard in stage.shards:
                known = self._ranks.get(shard.rank)
                held = {unit for units in known.units for unit in units.units()} if known is not None else set()
                if shard.rank in waiting and not held.issuperset(needed_units(self.plan.model, stage, shard)):
                    lacking.append(shard.rank)
        return lacking or waiting

    def due_arranges(self, now_s: float) -> list[Arrange]:
        """The Arrange messages to send now, one for each deadline."""
        if self.plan is None:
            return []
        due: dict[float | None, list[Retirement]] = defaultdict(list)
        is_prepared = self.is_all_prepared
        for retirement in self.retirements.values():
            if is_prepared:
                retirement.note_prepared()
            if retirement.arrange_at_s(is_prepared, now_s) <= now_s:
                due[retirement.deadline_s].append(retirement)
                retirement.note_told(now_s)
        return [
            Arrange(
                epoch=self.plan.epoch,
                pipelines=[r.retiring.pipeline.id for r in retirements],
                deadline_s=deadline_s,
                migration_s=round(max(r.migration_s for r in retirements), 3),
            )
            for deadline_s, retirements in due.items()
        ]

    def next_wakeup_s(self, now_s: float, timeout_s: float) -> float:
        """`timeout_s` as in `hung`."""
        is_prepared = self.is_all_prepared
        arranges_s = [r.arrange_at_s(is_prepared, now_s) for r in self.retirements.values()]
        return min([*arranges_s, *(self._hangs_at_s(name, timeout_s) for name in self._waiting)], default=math.inf)
