"""Who belongs to the fleet: instances come, are noticed and go; what of it calls for a decision.

After a restart of the planner the instances of its plan are awaited: they are alive until they fail to show up.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection
from typing import Final

from planner.core.agenda import Agenda
from planner.core.capacity import expected_calm_s
from planner.core.effects import Effect, ForgetInstance, Report, Severity, WatchInstance
from planner.core.fleet import OUTLIVED_S, Fleet, Sign
from planner.core.intake import check_inventory, check_notice
from planner.errors import ModelMismatchError
from planner.protocol import (
    InstanceInventory,
    InstanceRequested,
    InstanceStarting,
    InstanceState,
    ModelShape,
    PreemptionNotice,
    RankInventory,
)

JOIN_SETTLE_S: Final = 0.3
"""Instances that join together get one plan."""
RESTORE_HOLD_S: Final = 4.0
"""How long a restarted planner waits for the instances of its plan: inventories come every 2 s."""
CAPACITY_EVENTS: Final = 1000


class Membership:
    def __init__(self, agenda: Agenda, on_change: Callable[[], None]) -> None:
        """`on_change` is called whenever the number or the state of instances has changed."""
        self.fleet = Fleet()
        self.model: ModelShape | None = None
        self._agenda = agenda
        self._on_change = on_change
        self._events_s: deque[float] = deque(maxlen=CAPACITY_EVENTS)
        """When instances joined, were noticed or lost."""
        self._awaited: set[str] = set()
        """Instances of a restored plan that have not shown up yet."""
        self._hold_until_s = -math.inf

    # --- After a restart ---

    def expect(self, instances: Collection[str], gone: Collection[str], now_s: float) -> list[Effect]:
        """Await `instances`, of which `gone` were lost meanwhile."""
        self._awaited = set(instances)
        self._hold_until_s = now_s + RESTORE_HOLD_S
        lost = sorted(self._awaited.intersection(gone))
        return [effect for name in lost for effect in self.lose(name, "while no planner ran", now_s, now_s)]

    @property
    def is_complete(self) -> bool:
        """No instance is awaited any more: it is known what there is to decide about."""
        return not self._awaited

    @property
    def hold_until_s(self) -> float:
        """Until then, if it is not complete."""
        return self._hold_until_s

    # --- What is heard ---

    def hear_launch(self, launch: InstanceRequested | InstanceStarting, now_s: float) -> None:
        sign = Sign.REQUESTED if isinstance(launch, InstanceRequested) else Sign.LAUNCHED
        if self.fleet.apply(launch.instance, sign, now_s, launch.market):
            self._on_change()

    def hear_inventory(self, inventory: InstanceInventory, now_s: float) -> list[Effect]:
        """Raises PlannerError if it must be dropped; nothing has changed then."""
        name = inventory.instance
        known = self.fleet.instances.get(name)
        before = known.inventory if known is not None else None
        is_same = before is not None and _identities(before.ranks) == _identities(inventory.ranks)
        check_inventory(inventory, () if is_same else self.fleet.ranks_of_others(name))
        self._adopt_model(inventory)
        effects: list[Effect] = []
        if before is not None and before.liveness_address != inventory.liveness_address:
            effects += self.lose(name, "its agent was restarted", now_s, now_s)
        self.fleet.apply(name, Sign.ANNOUNCED, now_s, inventory.market)
        instance = self.fleet.instances[name]
        instance.inventory, instance.market = inventory, inventory.market
        if not instance.reached:
            return [*effects, WatchInstance(instance=name, address=inventory.liveness_address)]
        if before is not None and not is_same:
            self._agenda.want(f"the ranks of {name} have changed", now_s, now_s)
        return effects

    def hear_reached(self, name: str, now_s: float) -> list[Effect]:
        """Nothing if it is not news."""
        instance = self.fleet.instances.get(name)
        if instance is None or instance.inventory is None or instance.reached or instance.state is InstanceState.LOST:
            return []
        self.fleet.apply(name, Sign.REACHED, now_s)
        instance.reached = True
        self._note_event(now_s)
        if name in self._awaited:
            self._awaited.discard(name)
            self._agenda.want(f"instance {name} found again after the planner's restart", now_s, now_s)
        else:
            self._agenda.want(f"instance {name} joined", now_s, now_s + JOIN_SETTLE_S)
        ranks = ",".join(rank.rank for rank in instance.inventory.ranks)
        return [Report(event="instance joined", fields={"instance": name, "ranks": ranks})]

    def hear_notice(self, notice: PreemptionNotice, now_s: float) -> list[Effect]:
        """Raises PlannerError if it must be dropped."""
        check_notice(notice)
        known = self.fleet.instances.get(notice.instance)
        if known is None and notice.deadline_s < now_s:
            return []
        self.fleet.apply(notice.instance, Sign.NOTICED, now_s)
        instance = self.fleet.instances[notice.instance]
        if instance.state is InstanceState.LOST or instance.deadline_s == notice.deadline_s:
            return []
        instance.deadline_s = notice.deadline_s
        self._note_event(now_s)
        left_s = notice.deadline_s - now_s
        self._agenda.want(f"{notice.instance} will be preempted in {left_s:.1f} s", now_s, now_s)
        return [Report(event="preemption notice", fields={"instance": notice.instance, "left_s": f"{left_s:.3f}"})]

    def withdraw_notice(self, name: str, why: str, now_s: float) -> list[Effect]:
        """It is not taken away after all: what has not stopped because of its notice goes on."""
        if not self.fleet.withdraw_notice(name, now_s):
            return []
        self._on_change()
        self._agenda.want(f"{name} stays: {why}", now_s, now_s)
        return [Report(event="notice withdrawn", fields={"instance": name, "reason": why}, severity=Severity.WARNING)]

    def lose(self, name: str, reason: str, detected_at_s: float, now_s: float) -> list[Effect]:
        """It is gone. Nothing if it was known to be, or not known at all."""
        instance = self.fleet.instances.get(name)
        was_reached = instance is not None and instance.reached
        was_awaited = name in self._awaited
        if was_awaited:
            self._awaited.discard(name)
            self.fleet.apply(name, Sign.LAUNCHED, now_s)  # the earlier planner knew it, this one has not seen it
        if not self.fleet.apply(name, Sign.LOST, now_s):
            return []
        self._note_event(now_s)
        if was_reached or was_awaited:
            self._agenda.want(f"instance {name} lost: {reason}", detected_at_s, now_s)
        return [
            ForgetInstance(instance=name),
            Report(
                event="instance lost",
                fields={"instance": name, "reason": reason, "detected_ago_s": f"{now_s - detected_at_s:.3f}"},
                severity=Severity.WARNING,
            ),
        ]

    # --- Time passes ---

    def advance(self, now_s: float) -> list[Effect]:
        """Give up instances that never came, and believe in those that their deadline has not taken."""
        effects: list[Effect] = []
        for instance in self.fleet.overdue(now_s):
            if instance.state is not InstanceState.GRACE:
                effects += self.lose(instance.id, f"{instance.state} for too long, it never joined", now_s, now_s)
            elif instance.is_alive:
                why = f"it lives {OUTLIVED_S:g} s after its deadline, the notice was false"
                effects += self.withdraw_notice(instance.id, why, now_s)
            else:
                effects += self.lose(instance.id, "its notice ran out before it joined", now_s, now_s)
        if self._hold_until_s <= now_s:
            for name in sorted(self._awaited):
                effects += self.lose(name, "not seen since the planner's restart", now_s, now_s)
        return effects

    def expected_calm_s(self, now_s: float, since_s: float) -> float:
        """Expected time to the next capacity event, by those since `since_s`."""
        return expected_calm_s(self._events_s, now_s, since_s=since_s)

    def _note_event(self, now_s: float) -> None:
        self._events_s.append(now_s)
        self._on_change()

    def _adopt_model(self, inventory: InstanceInventory) -> None:
        """Raises PlannerError if the inventory does not belong into this fleet."""
        model = inventory.model
        if self.model is None or self.model == model:
            self.model = model
            return
        if any(i.is_alive for i in self.fleet.instances.values() if i.id != inventory.instance):
            raise ModelMismatchError(inventory.instance, repr(model), repr(self.model))
        self.model = model


def _identities(ranks: list[RankInventory]) -> list[tuple[str, str, str]]:
    """Who they are; units, tokens and free memory change all the time."""
    return sorted((r.rank, r.context_address, r.store_address) for r in ranks)
