"""Which instances exist and how each one is: the life cycle as a table, and the ranks that can be used.

    requested --launched--> starting --reached--> ready <--cancelled, noticed--> grace
        any --lost--> lost --requested, launched, announced--> it comes again

An instance counts as alive once its liveness connection stands: an old inventory of a dead one changes nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from typing import Final

import msgspec

from planner.protocol import InstanceInventory, InstanceState, InstanceStatus, Market, RankInventory

LOST_SHOWN_S: Final = 60.0
STARTING_TIMEOUT_S: Final = 600.0
REQUEST_TIMEOUT_S: Final = 300.0
"""A cloud that has not launched by then has no capacity."""
OUTLIVED_S: Final = 10.0
"""An instance that lives so long after its deadline is not taken away: the notice was false."""


class Sign(StrEnum):
    """What is heard of an instance."""

    REQUESTED = "requested"
    LAUNCHED = "launched"
    ANNOUNCED = "announced"
    REACHED = "reached"
    NOTICED = "noticed"
    CANCELLED = "cancelled"
    """The notice does not hold any more."""
    CANCELLED_UNREACHED = "cancelled_unreached"
    """The same of an instance that has not joined yet."""
    LOST = "lost"


_CHANGES: Final[Mapping[InstanceState, Mapping[Sign, InstanceState]]] = {
    InstanceState.REQUESTED: {
        Sign.LAUNCHED: InstanceState.STARTING,
        Sign.ANNOUNCED: InstanceState.STARTING,
        Sign.REACHED: InstanceState.READY,
        Sign.NOTICED: InstanceState.GRACE,
        Sign.LOST: InstanceState.LOST,
    },
    InstanceState.STARTING: {
        Sign.REACHED: InstanceState.READY,
        Sign.NOTICED: InstanceState.GRACE,
        Sign.LOST: InstanceState.LOST,
    },
    InstanceState.READY: {
        Sign.NOTICED: InstanceState.GRACE,
        Sign.LOST: InstanceState.LOST,
    },
    InstanceState.GRACE: {
        Sign.CANCELLED: InstanceState.READY,
        Sign.CANCELLED_UNREACHED: InstanceState.STARTING,
        Sign.LOST: InstanceState.LOST,
    },
    InstanceState.LOST: {
        Sign.REQUESTED: InstanceState.REQUESTED,
        Sign.LAUNCHED: InstanceState.STARTING,
        Sign.ANNOUNCED: InstanceState.STARTING,
    },
}

TRANSITIONS: Final[Mapping[tuple[InstanceState, Sign], InstanceState]] = {
    (state, sign): changes.get(sign, state) for state, changes in _CHANGES.items() for sign in Sign
}
"""Every sign has an answer in every state; most change nothing."""


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

    @property
    def overdue_at_s(self) -> float:
        """When its state ends by itself if nothing is heard; infinite for one that may go on for ever."""
        match self.state:
            case InstanceState.REQUESTED:
                return self.since_s + REQUEST_TIMEOUT_S
            case InstanceState.STARTING:
                return self.since_s + STARTING_TIMEOUT_S
            case InstanceState.GRACE if self.deadline_s is not None:
                return max(self.deadline_s, self.since_s) + (OUTLIVED_S if self.is_alive else 0.0)
            case _:
                return math.inf


class Rank(msgspec.Struct, frozen=True, kw_only=True):
    """A rank of a living instance."""

    instance: str
    inventory: RankInventory
    deadline_s: float | None
    """Of its instance; None unless it is under notice."""

    @property
    def id(self) -> str:
        return self.inventory.rank


_FIRST_SIGNS: Final = frozenset({Sign.REQUESTED, Sign.LAUNCHED, Sign.ANNOUNCED, Sign.NOTICED})


class Fleet:
    """All instances by id."""

    def __init__(self) -> None:
        self.instances: dict[str, Instance] = {}

    def apply(self, instance_id: str, sign: Sign, now_s: float, market: Market = Market.SPOT) -> bool:
        """Advance the life cycle; True if the state changed. An unknown instance begins as the sign says."""
        instance = self.instances.get(instance_id)
        if instance is None:
            if sign not in _FIRST_SIGNS:
                return False
            first = InstanceState.REQUESTED if sign is Sign.REQUESTED else InstanceState.STARTING
            instance = Instance(id=instance_id, market=market, state=first, since_s=now_s)
            self.instances[instance_id] = instance
        before = instance.state
        instance.state = TRANSITIONS[before, sign]
        if instance.state is before:
            return False
        instance.since_s = now_s
        if instance.state is InstanceState.LOST:
            instance.reached = False
        elif before in (InstanceState.LOST, InstanceState.GRACE):
            instance.deadline_s = None
        return True

    def withdraw_notice(self, instance_id: str, now_s: float) -> bool:
        """Its notice does not hold any more; False if it was under none."""
        instance = self.instances.get(instance_id)
        if instance is None or instance.state is not InstanceState.GRACE:
            return False
        return self.apply(instance_id, Sign.CANCELLED if instance.reached else Sign.CANCELLED_UNREACHED, now_s)

    def ranks(self) -> dict[str, Rank]:
        """Every rank of every living instance."""
        return {
            rank.rank: Rank(instance=instance.id, inventory=rank, deadline_s=instance.deadline_s)
            for _, instance in sorted(self.instances.items())
            if instance.is_alive and instance.inventory is not None
            for rank in instance.inventory.ranks
        }

    def num_ranks_per_instance(self) -> int:
        """Of most living instances; 1 if there are none."""
        alive = [i.inventory for i in self.instances.values() if i.is_alive and i.inventory is not None]
        numbers = Counter(len(inventory.ranks) for inventory in alive)
        return max(numbers, key=lambda number: (numbers[number], number), default=1)

    def markets(self) -> list[tuple[Market, int]]:
        """Market and number of ranks of each living instance."""
        alive = [i for i in self.instances.values() if i.is_alive]
        return [(i.market, len(i.inventory.ranks)) for i in alive if i.inventory is not None]

    def kv_tokens(self) -> dict[str, int]:
        """By living instance: tokens of live sequences that its ranks hold."""
        alive = [i.inventory for i in self.instances.values() if i.is_alive and i.inventory is not None]
        return {inventory.instance: sum(rank.kv_tokens for rank in inventory.ranks) for inventory in alive}

    def ranks_of_others(self, instance_id: str) -> set[str]:
        """Ranks that living instances other than this one have announced."""
        return {
            rank.rank
            for instance in self.instances.values()
            if instance.is_alive and instance.inventory is not None and instance.id != instance_id
            for rank in instance.inventory.ranks
        }

    def overdue(self, now_s: float) -> list[Instance]:
        """Those whose state should have ended by now: never came, or outlived their notice."""
        return [instance for _, instance in sorted(self.instances.items()) if instance.overdue_at_s <= now_s]

    def next_wakeup_s(self) -> float:
        return min((instance.overdue_at_s for instance in self.instances.values()), default=math.inf)

    def forget_old(self, now_s: float) -> None:
        """Drop lost instances that nobody asks about any more."""
        for instance in list(self.instances.values()):
            if instance.state is InstanceState.LOST and instance.since_s + LOST_SHOWN_S < now_s:
                del self.instances[instance.id]

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
