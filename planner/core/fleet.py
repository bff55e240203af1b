"""Which instances exist and how each one is: the life cycle as a table, and the ranks that can be used.

    starting --reached--> ready --noticed--> grace
        any --lost--> lost --announced--> starting (it rejoins)

An instance counts as alive once its liveness connection stands: an old inventory of a dead one changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

import msgspec

from planner.protocol import InstanceInventory, InstanceState, InstanceStatus, Market, RankInventory

LOST_SHOWN_S: Final = 60.0
STARTING_TIMEOUT_S: Final = 600.0


class Sign(StrEnum):
    """What is heard of an instance."""

    LAUNCHED = "launched"
    ANNOUNCED = "announced"
    REACHED = "reached"
    NOTICED = "noticed"
    LOST = "lost"


TRANSITIONS: Final[Mapping[tuple[InstanceState, Sign], InstanceState]] = {
    (InstanceState.STARTING, Sign.LAUNCHED): InstanceState.STARTING,
    (InstanceState.STARTING, Sign.ANNOUNCED): InstanceState.STARTING,
    (InstanceState.STARTING, Sign.REACHED): InstanceState.READY,
    (InstanceState.STARTING, Sign.NOTICED): InstanceState.GRACE,
    (InstanceState.STARTING, Sign.LOST): InstanceState.LOST,
    (InstanceState.READY, Sign.LAUNCHED): InstanceState.READY,
    (InstanceState.READY, Sign.ANNOUNCED): InstanceState.READY,
    (InstanceState.READY, Sign.REACHED): InstanceState.READY,
    (InstanceState.READY, Sign.NOTICED): InstanceState.GRACE,
    (InstanceState.READY, Sign.LOST): InstanceState.LOST,
    (InstanceState.GRACE, Sign.LAUNCHED): InstanceState.GRACE,
    (InstanceState.GRACE, Sign.ANNOUNCED): InstanceState.GRACE,
    (InstanceState.GRACE, Sign.REACHED): InstanceState.GRACE,
    (InstanceState.GRACE, Sign.NOTICED): InstanceState.GRACE,
    (InstanceState.GRACE, Sign.LOST): InstanceState.LOST,
    (InstanceState.LOST, Sign.LAUNCHED): InstanceState.STARTING,
    (InstanceState.LOST, Sign.ANNOUNCED): InstanceState.STARTING,
    (InstanceState.LOST, Sign.REACHED): InstanceState.LOST,
    (InstanceState.LOST, Sign.NOTICED): InstanceState.LOST,
    (InstanceState.LOST, Sign.LOST): InstanceState.LOST,
}


class Instance(msgspec.Struct, kw_only=True):
    id: str
    market: Market
    state: InstanceState
    since_s: float
    """When it came into this state."""
    deadline_s: float | None = None
    inventory: InstanceInventory | None = None
    reached: bool = False
    """Its liveness connection stands."""

    @property
    def is_alive(self) -> bool:
        return self.reached and self.inventory is not None and self.state is not InstanceState.LOST


class Rank(msgspec.Struct, frozen=True, kw_only=True):
    """A rank of a living instance."""

    instance: str
    inventory: RankInventory
    deadline_s: float | None
    """Of its instance; None unless it is under notice."""

    @property
    def id(self) -> str:
        return self.inventory.rank


class Fleet:
    """All instances by id."""

    def __init__(self) -> None:
        self.instances: dict[str, Instance] = {}

    def apply(self, instance_id: str, sign: Sign, now_s: float, market: Market = Market.SPOT) -> bool:
        """Advance the life cycle; True if the state changed. An unknown instance begins as starting."""
        instance = self.instances.get(instance_id)
        if instance is None:
            if sign in (Sign.REACHED, Sign.LOST):
                return False
            instance = Instance(id=instance_id, market=market, state=InstanceState.STARTING, since_s=now_s)
            self.instances[instance_id] = instance
        before = instance.state
        instance.state = TRANSITIONS[before, sign]
        if instance.state is before:
            return False
        instance.since_s = now_s
        if instance.state is InstanceState.LOST:
            instance.reached = False
        elif before is InstanceState.LOST:
            instance.deadline_s = None
        return True

    def ranks(self) -> dict[str, Rank]:
        """Every rank of every living instance."""
        return {
            rank.rank: Rank(instance=instance.id, inventory=rank, deadline_s=instance.deadline_s)
            for _, instance in sorted(self.instances.items())
            if instance.is_alive and instance.inventory is not None
            for rank in instance.inventory.ranks
        }

    def state_of(self, instance_id: str) -> InstanceState | None:
        instance = self.instances.get(instance_id)
        return instance.state if instance is not None else None

    def forget_old(self, now_s: float) -> None:
        """Drop lost instances that nobody asks about any more, and those that were launched but never joined."""
        for instance in list(self.instances.values()):
            age_s = now_s - instance.since_s
            never_joined = instance.state is InstanceState.STARTING and age_s > STARTING_TIMEOUT_S
            taken_unseen = not instance.is_alive and instance.deadline_s is not None and instance.deadline_s < now_s
            if instance.state is InstanceState.LOST:
                if age_s > LOST_SHOWN_S:
                    del self.instances[instance.id]
            elif never_joined or taken_unseen:
                self.apply(instance.id, Sign.LOST, now_s)

    def statuses(self) -> list[InstanceStatus]:
        return [
            InstanceStatus(
                id=instance.id,
                market=instance.market,
                state=instance.state,
                deadline_s=instance.deadline_s,
                ranks=[rank.rank for rank in instance.inventory.ranks] if instance.inventory else [],
            )
            for _, instance in sorted(self.instances.items())
        ]
