"""The planner's decisions: `PlannerState.handle(event, now_s)` returns the effects to carry out.

It hears of instances, of progress and of load, decides when a new plan is due, and sees the current one through.
Every decision starts from the newest inventories, so a second event in the middle of a migration needs no special care.
"""

from __future__ import annotations

import contextlib
import math
import traceback
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from typing import Final, assert_never

import msgspec

from planner.core.agenda import Agenda
from planner.core.capacity import CapacityLimits, expected_calm_s
from planner.core.config_optimizer import Targets
from planner.core.cost_model import CostModel
from planner.core.effects import (
    Effect,
    Event,
    ForgetInstance,
    InstanceReached,
    PublishAdvice,
    PublishArrange,
    PublishDesired,
    PublishPlan,
    Report,
    Severity,
    Tick,
    WatchInstance,
)
from planner.core.faults import Faults
from planner.core.fleet import OUTLIVED_S, Fleet, Sign
from planner.core.intake import check_inventory, check_load, check_notice
from planner.core.invariants import check_plan
from planner.core.links import Links
from planner.core.load import PEAK_S, Load
from planner.core.planning import Situation, make_plan, retirement_kv_s
from planner.core.profile import Profile
from planner.core.provisioning import Provisioning
from planner.core.refine import Corrections
from planner.core.rollout import Rollout
from planner.errors import ModelMismatchError, ProfileError
from planner.protocol import (
    Explanation,
    InstanceInventory,
    InstanceLost,
    InstanceRequested,
    InstanceStarting,
    InstanceState,
    LoadReport,
    ModelShape,
    NoticeCancelled,
    Phase,
    Pipeline,
    Plan,
    PreemptionNotice,
    RankInventory,
    RankProgress,
    Status,
    StepProfile,
)

JOIN_SETTLE_S: Final = 0.3
"""Instances that join together get one plan."""
RESTORE_HOLD_S: Final = 4.0
"""How long a restarted planner waits for the instances of its plan: inventories come every 2 s."""
HISTORY: Final = 20
CAPACITY_EVENTS: Final = 1000
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
        self._given_profile = profile
        self._given_links = links
        self.fleet = Fleet()
        self.plan: Plan | None = None
        self.model: ModelShape | None = None
        self.history: deque[Explanation] = deque(maxlen=HISTORY)
        self._rollout = Rollout()
        self._load = Load()
        self._agenda = Agenda()
        self._faults = Faults(self._agenda)
        self._prepare_timeout_s = prepare_timeout_s
        self._is_advisory = is_advisory
        self._provisioning = Provisioning(limits) if limits is not None else None
        self._corrections = Corrections()
        self._capacity_events_s: deque[float] = deque(maxlen=CAPACITY_EVENTS)
        """When instances joined, were noticed or lost."""
        self._watching_since_s: float | None = None
        self._memory_bytes = 0
        """Of the smallest rank, from when there last was one."""
        self._hold_until_s = -math.inf
        self._awaited: set[str] = set()
        """Instances of a restored plan that have not shown up yet."""

    def restore(self, plan: Plan, history: Iterable[Explanation], gone: Collection[str], now_s: float) -> list[Effect]:
        """Go on from the plan of an earlier planner; `history` newest first, `gone` the instances lost meanwhile.

        No decision is made until the instances of the plan have shown up, or have had the time to.
        """
        self.plan, self.model = plan, plan.model
        self.history.extend(history)
        migration_s = {r.pipeline.id: plan.explanation.migration_s for r in plan.retiring}
        self._rollout.adopt(plan, migration_s, now_s, is_restored=True)
        needed = [*plan.pipelines, *(r.pipeline for r in self._rollout.open_retirements())]
        self._awaited = {shard.instance for p in needed for stage in p.stages for shard in stage.shards}
        self._hold_until_s = now_s + RESTORE_HOLD_S
        lost = sorted(self._awaited.intersection(gone))
        return [effect for name in lost for effect in self._lose(name, "while no planner ran", now_s, now_s)]

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
            self._hold_until_s if self._awaited else self._agenda.due_at_s,
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
                return self._hear_inventory(event, now_s)
            case InstanceReached():
                return self._hear_reached(event.instance, now_s)
            case InstanceRequested():
                self._note_fleet(self.fleet.apply(event.instance, Sign.REQUESTED, now_s, event.market))
            case InstanceStarting():
                self._note_fleet(self.fleet.apply(event.instance, Sign.LAUNCHED, now_s, event.market))
            case PreemptionNotice():
                return self._hear_notice(event, now_s)
            case NoticeCancelled():
                return self._withdraw_notice(event.instance, "its notice was cancelled", now_s)
            case InstanceLost():
                return self._lose(event.instance, event.reason, event.detected_at_s or now_s, now_s)
            case LoadReport():
                self._hear_load(event, now_s)
            case RankProgress():
                return self._hear_progress(event, now_s)
            case Tick():
                self.fleet.forget_old(now_s)
            case _:
                assert_never(event)
        return []

    def _hear_inventory(self, inventory: InstanceInventory, now_s: float) -> list[Effect]:
        name = inventory.instance
        known = self.fleet.instances.get(name)
        before = known.inventory if known is not None else None
        is_same = before is not None and _identities(before.ranks) == _identities(inventory.ranks)
        check_inventory(inventory, () if is_same else self.fleet.ranks_of_others(name))
        self._adopt_model(inventory)
        effects: list[Effect] = []
        if before is not None and before.liveness_address != inventory.liveness_address:
            effects += self._lose(name, "its agent was restarted", now_s, now_s)
        self.fleet.apply(name, Sign.ANNOUNCED, now_s, inventory.market)
        instance = self.fleet.instances[name]
        instance.inventory, instance.market = inventory, inventory.market
        if not instance.reached:
            return [*effects, WatchInstance(instance=name, address=inventory.liveness_address)]
        self._note_inventory(inventory, now_s)
        if before is not None and not is_same:
            self._want_decision(f"the ranks of {name} have changed", now_s, now_s)
        return effects

    def _note_fleet(self, has_changed: bool) -> None:
        if has_changed and self._provisioning is not None:
            self._provisioning.note_change()

    def _note_capacity_event(self, now_s: float) -> None:
        self._capacity_events_s.append(now_s)
        self._note_fleet(has_changed=True)

    def _note_inventory(self, inventory: InstanceInventory, now_s: float) -> None:
        for rank in inventory.ranks:
            self._note_measured_step(rank, now_s)
        for name in self._rollout.note_inventory(inventory, now_s):
            self._faults.note_over(name, now_s)

    def _hear_reached(self, name: str, now_s: float) -> list[Effect]:
        instance = self.fleet.instances.get(name)
        if instance is None or instance.inventory is None or instance.reached or instance.state is InstanceState.LOST:
            return []
        self.fleet.apply(name, Sign.REACHED, now_s)
        instance.reached = True
        self._note_capacity_event(now_s)
        self._note_inventory(instance.inventory, now_s)
        if name in self._awaited:
            self._awaited.discard(name)
            self._want_decision(f"instance {name} found again after the planner's restart", now_s, now_s)
        else:
            self._want_decision(f"instance {name} joined", now_s, now_s + JOIN_SETTLE_S)
        ranks = ",".join(rank.rank for rank in instance.inventory.ranks)
        return [Report(event="instance joined", fields={"instance": name, "ranks": ranks})]

    def _hear_notice(self, notice: PreemptionNotice, now_s: float) -> list[Effect]:
        check_notice(notice)
        known = self.fleet.instances.get(notice.instance)
        if known is None and notice.deadline_s < now_s:
            return []
        self.fleet.apply(notice.instance, Sign.NOTICED, now_s)
        instance = self.fleet.instances[notice.instance]
        if instance.state is InstanceState.LOST or instance.deadline_s == notice.deadline_s:
            return []
        instance.deadline_s = notice.deadline_s
        self._note_capacity_event(now_s)
        left_s = notice.deadline_s - now_s
        self._want_decision(f"{notice.instance} will be preempted in {left_s:.1f} s", now_s, now_s)
        return [Report(event="preemption notice", fields={"instance": notice.instance, "left_s": f"{left_s:.3f}"})]

    def _withdraw_notice(self, name: str, why: str, now_s: float) -> list[Effect]:
        """It is not taken away after all: what has not stopped because of its notice goes on."""
        if not self.fleet.withdraw_notice(name, now_s):
            return []
        self._note_fleet(has_changed=True)
        self._want_decision(f"{name} stays: {why}", now_s, now_s)
        return [Report(event="notice withdrawn", fields={"instance": name, "reason": why}, severity=Severity.WARNING)]

    def _lose(self, name: str, reason: str, detected_at_s: float, now_s: float) -> list[Effect]:
        instance = self.fleet.instances.get(name)
        was_reached = instance is not None and instance.reached
        was_awaited = name in self._awaited
        if was_awaited:
            self._awaited.discard(name)
            self.fleet.apply(name, Sign.LAUNCHED, now_s)  # the earlier planner knew it, this one has not seen it
        if not self.fleet.apply(name, Sign.LOST, now_s):
            return []
        self._note_capacity_event(now_s)
        if was_reached or was_awaited:
            self._want_decision(f"instance {name} lost: {reason}", detected_at_s, now_s)
        return [
            ForgetInstance(instance=name),
            Report(
                event="instance lost",
                fields={"instance": name, "reason": reason, "detected_ago_s": f"{now_s - detected_at_s:.3f}"},
                severity=Severity.WARNING,
            ),
        ]

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
            self._want_decision(change, now_s, now_s)

    def _hear_progress(self, progress: RankProgress, now_s: float) -> list[Effect]:
        self._rollout.note_progress(progress, now_s)
        pipeline = self._current(progress.pipeline)
        if pipeline is None or progress.pipeline in self._faults.ruined:
            return []
        if progress.phase is Phase.PREPARE_FAILED:
            memory_bytes = self._memory_bytes_of(progress.rank)
            return self._faults.note_prepare_failed(pipeline, progress, memory_bytes, self._rollout.serving(), now_s)
        if progress.phase is Phase.STOPPED and self._is_planned(pipeline.id):
            return self._faults.note_stopped(pipeline, progress, now_s)
        if progress.phase is Phase.BROKEN:
            return self._faults.note_broken(pipeline, progress, now_s)
        return []

    # --- Decide ---

    def _advance(self, now_s: float) -> list[Effect]:
        effects = self._end_states(now_s)
        for pipeline, waiting in self._rollout.hung(now_s, self._prepare_timeout_s):
            effects += self._faults.note_hung(pipeline, waiting, now_s)
        self._faults.advance(self._all_current(), self._rollout.serving(), now_s)
        effects += self._end_hold(now_s)
        if not self._awaited and self._agenda.due_at_s <= now_s:
            effects += self._decide(now_s)
        if self._provisioning is not None and self._provisioning.is_due and not self._awaited:
            effects += self._provision(self._provisioning, now_s)
        return effects + [PublishArrange(arrange=arrange) for arrange in self._rollout.due_arranges(now_s)]

    def _end_states(self, now_s: float) -> list[Effect]:
        """Instances that never came, and those that their deadline has not taken."""
        effects: list[Effect] = []
        for instance in self.fleet.overdue(now_s):
            if instance.state is not InstanceState.GRACE:
                effects += self._lose(instance.id, f"{instance.state} for too long, it never joined", now_s, now_s)
            elif instance.is_alive:
                why = f"it lives {OUTLIVED_S:g} s after its deadline, the notice was false"
                effects += self._withdraw_notice(instance.id, why, now_s)
            else:
                effects += self._lose(instance.id, "its notice ran out before it joined", now_s, now_s)
        return effects

    def _end_hold(self, now_s: float) -> list[Effect]:
        if not self._awaited or now_s < self._hold_until_s:
            return []
        reason = "not seen since the planner's restart"
        return [effect for name in sorted(self._awaited) for effect in self._lose(name, reason, now_s, now_s)]

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
        self._corrections = self._corrections.without(set(self._corrections.num_steps) - ids)
        self._note_fleet(has_changed=True)
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
            profile=self._profile(),
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
            corrections=self._corrections,
            expected_calm_s=self._expected_calm_s(now_s),
            num_ranks_per_instance=self.fleet.num_ranks_per_instance(),
            usd_per_rank_h=self._provisioning.usd_per_rank_h(self.fleet.markets()) if self._provisioning else 0.0,
            can_release=self._provisioning is not None and self._may_release(now_s),
            num_paid_instances=self._provisioning.num_paid if self._provisioning is not None else 0,
            reviews_notices=True,
        )

    def _may_release(self, now_s: float) -> bool:
        """A planner that has just been started does not know yet what load is usual."""
        return self._watching_since_s is not None and now_s >= self._watching_since_s + PEAK_S

    def _expected_calm_s(self, now_s: float) -> float:
        since_s = self._watching_since_s if self._watching_since_s is not None else now_s
        return expected_calm_s(self._capacity_events_s, now_s, since_s=since_s)

    def _costs(self, model: ModelShape, memory_bytes: int, now_s: float, corrections: Corrections | None) -> CostModel:
        workload = self._load.workload(model.max_model_len, now_s)
        return CostModel(
            model, self._profile(), memory_bytes, workload, self.targets.max_batch, corrections=corrections
        )

    def _note_measured_step(self, rank: RankInventory, now_s: float) -> None:
        pipeline = self._current(rank.pipeline) if rank.pipeline is not None else None
        if rank.measured_step is None or pipeline is None or pipeline.leader != rank.rank or self.model is None:
            return
        shape = len(pipeline.stages), pipeline.tensor
        with contextlib.suppress(ProfileError):  # make_plan says so too, and is heard
            costs = self._costs(self.model, rank.memory_bytes, now_s, None)
            self._corrections = self._corrections.noted(pipeline.id, shape, rank.measured_step, costs)

    def _provision(self, provisioning: Provisioning, now_s: float) -> list[Effect]:
        ranks = self.fleet.ranks().values()
        try:
            costs = None
            if self.model is not None:
                memory_bytes = min((rank.inventory.memory_bytes for rank in ranks), default=self._memory_bytes)
                self._memory_bytes = memory_bytes
                costs = self._costs(self.model, memory_bytes, now_s, self._corrections)
            peak_per_s = self._load.peak_per_s(now_s)
            may_release = self._may_release(now_s)
            desired = provisioning.answer(
                costs, self.targets, self.fleet, self.plan, peak_per_s, now_s, may_release=may_release
            )
        except Exception as error:  # noqa: BLE001 - as for plans: the last answer stands
            fields = {"error": f"{type(error).__name__}: {error}"}
            return [Report(event="no answer on capacity, the last one stands", fields=fields, severity=Severity.ERROR)]
        return [PublishDesired(desired=desired)] if desired is not None else []

    def _want_decision(self, cause: str, cause_at_s: float, decide_at_s: float) -> None:
        self._agenda.want(cause, cause_at_s, decide_at_s)

    # --- Look up ---

    def _adopt_model(self, inventory: InstanceInventory) -> None:
        """Raises PlannerError if the inventory does not belong into this fleet."""
        model = inventory.model
        if self.model is None or self.model == model:
            self.model = model
            return
        if any(i.is_alive for i in self.fleet.instances.values() if i.id != inventory.instance):
            raise ModelMismatchError(inventory.instance, repr(model), repr(self.model))
        self.model = model

    def _current(self, pipeline: str) -> Pipeline | None:
        return next((p for p in self._all_current() if p.id == pipeline), None)

    def _all_current(self) -> list[Pipeline]:
        """Pipelines of the plan, and those that it retires and that have not stopped yet."""
        planned = self.plan.pipelines if self.plan is not None else []
        return [*planned, *(r.pipeline for r in self._rollout.open_retirements())]

    def _memory_bytes_of(self, rank: str) -> int:
        known = self.fleet.ranks().get(rank)
        return known.inventory.memory_bytes if known is not None else 0

    def _is_planned(self, pipeline: str) -> bool:
        return self.plan is not None and any(p.id == pipeline for p in self.plan.pipelines)

    def _profile(self) -> Profile | StepProfile | None:
        """Of the first living instance that has one: decisions must not change with the order of messages."""
        if self._given_profile is not None:
            return self._given_profile
        return next(
            (
                instance.inventory.profile
                for _, instance in sorted(self.fleet.instances.items())
                if instance.is_alive and instance.inventory is not None and instance.inventory.profile is not None
            ),
            None,
        )


def _is_forced(plan: Plan, situation: Situation) -> bool:
    """Without it nothing serves, or a pipeline that serves is lost; or it changes nothing that serves."""
    pipelines = situation.last.pipelines if situation.last is not None else []
    return pipelines in ([], plan.pipelines) or any(
        not situation.is_intact(p) or any(situation.ranks[name].deadline_s is not None for name in p.ranks())
        for p in pipelines
    )


def _identities(ranks: list[RankInventory]) -> list[tuple[str, str, str]]:
    """Who they are; units, tokens and free memory change all the time."""
    return sorted((r.rank, r.context_address, r.store_address) for r in ranks)
