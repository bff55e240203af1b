"""The planner's decisions: `PlannerState.handle(event, now_s)` returns the effects to carry out.

It hears of instances, of progress and of load, decides when a new plan is due, and sees the current one through.
Every decision starts from the newest inventories, so a second event in the middle of a migration needs no special care.
"""

from __future__ import annotations

import math
import traceback
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from typing import Final, assert_never

import msgspec

from planner.core.agenda import Agenda
from planner.core.capacity import CapacityLimits
from planner.core.config_optimizer import Targets
from planner.core.effects import (
    Effect,
    Event,
    InstanceReached,
    PublishAdvice,
    PublishArrange,
    PublishDesired,
    PublishPlan,
    Report,
    Severity,
    Tick,
)
from planner.core.estimates import Estimates
from planner.core.faults import Faults
from planner.core.fleet import Fleet
from planner.core.intake import check_load
from planner.core.invariants import check_plan
from planner.core.links import Links
from planner.core.load import PEAK_S, Load
from planner.core.membership import Membership
from planner.core.planning import Situation, make_plan, retirement_kv_s
from planner.core.profile import Profile
from planner.core.provisioning import Provisioning
from planner.core.rollout import Rollout
from planner.protocol import (
    Explanation,
    InstanceInventory,
    InstanceLost,
    InstanceRequested,
    InstanceStarting,
    LoadReport,
    ModelShape,
    NoticeCancelled,
    Phase,
    Plan,
    PreemptionNotice,
    RankProgress,
    Status,
)

HISTORY: Final = 20
PREPARE_TIMEOUT_S: Final = 120.0


class PlannerState:
    def __init__(
        self,
        targets: Targets,
        *,
        prepare_timeout_s: float = PREPARE_TIMEOUT_S,
        is_advisory: bool = False,
        profile: Profile | None = None,
        links: Links | None = None,
        limits: CapacityLimits | None = None,
    ) -> None:
        """`prepare_timeout_s`: a rank whose preparation stands still for so long, beyond what its transfers should
        take, hangs. `is_advisory`: only what keeps the fleet serving is carried out, the rest is advice.
        `profile`, `links`: None: what the instances have measured. `limits`: None: the fleet is taken as it comes.
        """
        self.targets = targets
        self.plan: Plan | None = None
        self.history: deque[Explanation] = deque(maxlen=HISTORY)
        self._given_links = links
        self._prepare_timeout_s = prepare_timeout_s
        self._is_advisory = is_advisory
        self._provisioning = Provisioning(limits) if limits is not None else None
        self._agenda = Agenda()
        self._members = Membership(self._agenda, self._note_fleet)
        self._rollout = Rollout()
        self._faults = Faults(self._agenda, self._rollout)
        self._load = Load()
        self._estimates = Estimates(profile, self.fleet, targets.max_batch)
        self._watching_since_s: float | None = None

    @property
    def fleet(self) -> Fleet:
        return self._members.fleet

    @property
    def model(self) -> ModelShape | None:
        """None until an instance has shown it."""
        return self._members.model

    def restore(self, plan: Plan, history: Iterable[Explanation], gone: Collection[str], now_s: float) -> list[Effect]:
        """Go on from the plan of an earlier planner; `history` newest first, `gone` the instances lost meanwhile.

        No decision is made until the instances of the plan have shown up, or have had the time to.
        """
        self.plan, self._members.model = plan, plan.model
        self.history.extend(history)
        migration_s = {r.pipeline.id: plan.explanation.migration_s for r in plan.retiring}
        self._rollout.adopt(plan, migration_s, now_s, is_restored=True)
        shards = [shard for p in self._rollout.current() for stage in p.stages for shard in stage.shards]
        return self._members.expect({shard.instance for shard in shards}, gone, now_s)

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Raises PlannerError if the event must be dropped; the state is then as before."""
        if self._watching_since_s is None:
            self._watching_since_s = now_s
        effects = self._hear(event, now_s)
        return effects + self._advance(now_s)

    def set_limits(self, limits: CapacityLimits) -> None:
        """What the operator allows, or the market has, from now on; only where there have been limits before."""
        assert self._provisioning is not None, "this planner takes the fleet as it comes"
        if limits != self._provisioning.limits:
            self._provisioning.limits = limits
            self._provisioning.note_change()

    def next_wakeup_s(self, now_s: float) -> float:
        """When a `Tick` is due at the latest; infinite if nothing waits for time to pass."""
        return min(
            self._agenda.due_at_s if self._members.is_complete else self._members.hold_until_s,
            self.fleet.next_wakeup_s(),
            self._faults.next_wakeup_s(),
            self._rollout.next_wakeup_s(now_s, self._prepare_timeout_s),
        )

    def status(self, now_s: float) -> Status:
        self.fleet.forget_old(now_s)
        return Status(
            epoch=self.plan.epoch if self.plan is not None else 0,
            instances=self.fleet.statuses(),
            plan=self.plan,
            history=list(self.history),
            advisory=self._is_advisory,
            num_failed_decisions=self._agenda.num_failed,
            last_failure=self._agenda.last_failure,
            desired=self._provisioning.desired if self._provisioning is not None else None,
        )

    # --- Hear ---

    def _hear(self, event: Event, now_s: float) -> list[Effect]:
        match event:
            case InstanceInventory():
                effects = self._members.hear_inventory(event, now_s)
                if self.fleet.instances[event.instance].reached:
                    self._note_inventory(event, now_s)
                return effects
            case InstanceReached():
                return self._hear_reached(event.instance, now_s)
            case InstanceRequested() | InstanceStarting():
                self._members.hear_launch(event, now_s)
            case PreemptionNotice():
                return self._members.hear_notice(event, now_s)
            case NoticeCancelled():
                return self._members.withdraw_notice(event.instance, "its notice was cancelled", now_s)
            case InstanceLost():
                return self._members.lose(event.instance, event.reason, event.detected_at_s or now_s, now_s)
            case LoadReport():
                self._hear_load(event, now_s)
            case RankProgress():
                return self._hear_progress(event, now_s)
            case Tick():
                self.fleet.forget_old(now_s)
            case _:
                assert_never(event)
        return []

    def _hear_reached(self, name: str, now_s: float) -> list[Effect]:
        effects = self._members.hear_reached(name, now_s)
        inventory = self.fleet.instances[name].inventory if effects else None
        if inventory is not None:
            self._note_inventory(inventory, now_s)
        return effects

    def _note_inventory(self, inventory: InstanceInventory, now_s: float) -> None:
        for rank in inventory.ranks:
            pipeline = self._rollout.find(rank.pipeline) if rank.pipeline is not None else None
            if pipeline is not None and pipeline.leader == rank.rank and self.model is not None:
                workload = self._load.workload(self.model.max_model_len, now_s)
                self._estimates.note_measured_step(rank, pipeline, self.model, workload)
        for name in self._rollout.note_inventory(inventory, now_s):
            self._faults.note_over(name, now_s)

    def _hear_load(self, report: LoadReport, now_s: float) -> None:
        check_load(report)
        self._load.note(report, now_s)
        if self._provisioning is not None:
            self._provisioning.note_load(now_s)
        is_calm = self._rollout.is_all_prepared and not self._rollout.retirements
        if self.model is None or not is_calm:
            return
        workload = self._load.workload(self.model.max_model_len, now_s)
        change = self._load.change(workload.demand_per_s, now_s)
        if change is not None:
            self._agenda.want(change, now_s, now_s)

    def _hear_progress(self, progress: RankProgress, now_s: float) -> list[Effect]:
        self._rollout.note_progress(progress, now_s)
        pipeline = self._rollout.find(progress.pipeline)
        if pipeline is None or pipeline.id in self._faults.ruined:
            return []
        if progress.phase is Phase.PREPARE_FAILED:
            culprit = self.fleet.ranks().get(progress.rank)
            memory_bytes = culprit.inventory.memory_bytes if culprit is not None else 0
            return self._faults.note_prepare_failed(pipeline, progress, memory_bytes, now_s)
        if progress.phase is Phase.STOPPED and pipeline.id not in self._rollout.retirements:
            return self._faults.note_stopped(pipeline, progress, now_s)
        if progress.phase is Phase.BROKEN:
            return self._faults.note_broken(pipeline, progress, now_s)
        return []

    # --- Decide ---

    def _advance(self, now_s: float) -> list[Effect]:
        effects = self._members.advance(now_s)
        for pipeline, waiting in self._rollout.hung(now_s, self._prepare_timeout_s):
            effects += self._faults.note_hung(pipeline, waiting, now_s)
        self._faults.advance(now_s)
        if self._members.is_complete and self._agenda.due_at_s <= now_s:
            effects += self._decide(now_s)
        if self._provisioning is not None and self._provisioning.is_due and self._members.is_complete:
            effects += self._provision(self._provisioning, now_s)
        return effects + [PublishArrange(arrange=arrange) for arrange in self._rollout.due_arranges(now_s)]

    def _decide(self, now_s: float) -> list[Effect]:
        cause, cause_at_s = self._agenda.take(now_s)
        if self.model is None:
            return []
        migration_s: dict[str, float] = {}
        review_at_s = math.inf
        try:
            situation = self._situation(self.model, cause, cause_at_s, now_s)
            plan = make_plan(situation, now_s)
            review_at_s = situation.review_at_s(now_s)
            if plan is not None:
                check_plan(plan, self.plan)
                migration_s = {r.pipeline.id: retirement_kv_s(situation, r) for r in plan.retiring if not r.broken}
        except Exception as error:  # noqa: BLE001 - whatever it is: the fleet serves on with the last good plan
            return self._fail(cause, cause_at_s, error, now_s)
        self._agenda.note_success(review_at_s)
        self._load.note_decision(situation.workload.demand_per_s, now_s)
        if plan is None:
            return [Report(event="plan unchanged", fields={"cause": cause})]
        if self._is_advisory and not _is_forced(plan, situation):
            return self._advise(plan)
        return self._adopt(plan, migration_s, now_s)

    def _adopt(self, plan: Plan, migration_s: Mapping[str, float], now_s: float) -> list[Effect]:
        self.plan = plan
        self.history.appendleft(plan.explanation)
        self._rollout.adopt(plan, migration_s, now_s)
        ids = {p.id for p in [*plan.pipelines, *(r.pipeline for r in plan.retiring)]}
        self._faults.forget_all_but(ids)
        self._estimates.forget_all_but(ids)
        self._note_fleet()
        return [PublishPlan(plan=plan)]

    def _advise(self, plan: Plan) -> list[Effect]:
        explanation = msgspec.structs.replace(plan.explanation, advisory=True)
        self.history.appendleft(explanation)
        return [PublishAdvice(explanation=explanation)]

    def _fail(self, cause: str, cause_at_s: float, error: Exception, now_s: float) -> list[Effect]:
        failure = f"{type(error).__name__}: {error}"
        self._agenda.note_failure(cause, cause_at_s, failure, now_s)
        trace = traceback.extract_tb(error.__traceback__)
        fields = {
            "cause": cause,
            "error": failure,
            "at": f"{trace[-1].filename.rpartition('/')[2]}:{trace[-1].lineno}" if trace else "",
            "ranks": ",".join(self.fleet.ranks()),
            "epoch": str(self.plan.epoch if self.plan is not None else 0),
        }
        return [Report(event="decision failed, the last plan stands", fields=fields, severity=Severity.ERROR)]

    def _situation(self, model: ModelShape, cause: str, cause_at_s: float, now_s: float) -> Situation:
        ranks = self.fleet.ranks()
        noticed = {name for name, rank in ranks.items() if rank.deadline_s is not None}
        return Situation(
            model=model,
            profile=self._estimates.profile(),
            links=self._given_links,
            ranks=ranks,
            targets=self.targets,
            workload=self._load.workload(model.max_model_len, now_s),
            last=self.plan,
            cause=cause,
            cause_at_s=cause_at_s,
            excluded_ranks=self._faults.excluded(now_s),
            refused_shapes=self._faults.refused(now_s),
            suspects=self._faults.suspects(now_s),
            ruined=self._faults.ruined,
            settled=self._rollout.settled(),
            untouched=self._rollout.untouched(),
            open_retirements=self._rollout.open_retirements(),
            revivable=self._rollout.revivable(now_s, noticed),
            corrections=self._estimates.corrections,
            expected_calm_s=self._members.expected_calm_s(now_s, self._watching_since_s or now_s),
            num_ranks_per_instance=self.fleet.num_ranks_per_instance(),
            usd_per_rank_h=self._provisioning.usd_per_rank_h(self.fleet.markets()) if self._provisioning else 0.0,
            can_release=self._provisioning is not None and self._may_release(now_s),
            num_paid_instances=self._provisioning.num_paid if self._provisioning is not None else 0,
            reviews_notices=True,
        )

    def _may_release(self, now_s: float) -> bool:
        """A planner that has just been started does not know yet what load is usual."""
        return self._watching_since_s is not None and now_s >= self._watching_since_s + PEAK_S

    def _provision(self, provisioning: Provisioning, now_s: float) -> list[Effect]:
        try:
            costs = None
            if self.model is not None:
                costs = self._estimates.costs(self.model, self._load.workload(self.model.max_model_len, now_s))
            peak_per_s = self._load.peak_per_s(now_s)
            may_release = self._may_release(now_s)
            desired = provisioning.answer(
                costs, self.targets, self.fleet, self.plan, peak_per_s, now_s, may_release=may_release
            )
        except Exception as error:  # noqa: BLE001 - as for plans: the last answer stands
            fields = {"error": f"{type(error).__name__}: {error}"}
            return [Report(event="no answer on capacity, the last one stands", fields=fields, severity=Severity.ERROR)]
        return [PublishDesired(desired=desired)] if desired is not None else []

    def _note_fleet(self) -> None:
        if self._provisioning is not None:
            self._provisioning.note_change()


def _is_forced(plan: Plan, situation: Situation) -> bool:
    """Without it nothing serves, or a pipeline that serves is lost; or it changes nothing that serves."""
    pipelines = situation.last.pipelines if situation.last is not None else []
    return pipelines in ([], plan.pipelines) or any(
        not situation.is_intact(p) or any(situation.ranks[name].deadline_s is not None for name in p.ranks())
        for p in pipelines
    )
