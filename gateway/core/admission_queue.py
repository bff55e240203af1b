"""The bounded queue before the pipelines, fair between keys. Pure: time is an argument, expiry and shedding are returned.

Two lanes. Choices that were interrupted go first, in the order in which they first came, and take no room. The new ones
are bounded by `max_waiting`, and ordered so:

1. by priority class of the key (lower first). A key whose oldest choice waits is lifted by one class for each `aging_s`,
   up to the best class that waits: so no class starves, and no key gets past its class's turn by having a long queue;
2. in a class by tokens served, fewest first: the virtual token counters of Sheng et al., "Fairness in Serving Large
   Language Models" (OSDI 2024), algorithm 2: a key that begins to wait is lifted to the least counter of those that
   wait, a choice is charged with what it is expected to cost when it leaves, and corrected when it has ended;
3. of one key by the request's own `priority` (lower first), then by arrival; what has waited for `aging_s` goes first.

When the queue is full, a key that has less in it than another gets in: the other's newest request is shed for it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

import msgspec

_RATE_WINDOW_S = 30.0
_MAX_RETRY_AFTER_S = 60
AGING_S = 15.0


class Tenant(msgspec.Struct, frozen=True):
    """For whom a request waits: a key, or everybody without one."""

    id: str = ""
    priority_class: int = 0
    """Lower goes first."""


class Waiting(msgspec.Struct, order=True):
    """A place in the queue; compares by priority, then by arrival."""

    priority: int
    number: int
    item: str
    tenant: str
    enqueued_s: float
    deadline_s: float
    cost_tokens: int
    group: int
    """The request; its choices come and are shed together."""
    not_before_s: float = 0.0


class Admission(msgspec.Struct, frozen=True):
    """Whether new items were taken, and one item of each request that had to make room for them."""

    accepted: bool
    shed: list[str] = []


class _Line:
    """What waits for one tenant."""

    def __init__(self, tenant: Tenant, served_tokens: float) -> None:
        self.tenant = tenant
        self.served_tokens = served_tokens
        self.by_priority: list[Waiting] = []
        self.by_arrival: list[tuple[int, Waiting]] = []

    def __len__(self) -> int:
        return len(self.by_priority)

    def add(self, waiting: Waiting) -> None:
        insort(self.by_priority, waiting)
        insort(self.by_arrival, (waiting.number, waiting))

    def drop(self, waiting: Waiting) -> None:
        del self.by_priority[bisect_left(self.by_priority, waiting)]
        del self.by_arrival[bisect_left(self.by_arrival, (waiting.number,))]

    def first(self, now_s: float, aging_s: float) -> Waiting | None:
        """The next that may go."""
        oldest = next((w for _, w in self.by_arrival if w.not_before_s <= now_s), None)
        if oldest is None or now_s - oldest.enqueued_s >= aging_s:
            return oldest
        return next(w for w in self.by_priority if w.not_before_s <= now_s)

    def level(self, now_s: float, aging_s: float) -> int:
        waited_s = now_s - self.by_arrival[0][1].enqueued_s
        return self.tenant.priority_class - int(max(0.0, waited_s) // aging_s)


class AdmissionQueue:
    """Item names with deadlines; durations in seconds, costs in tokens."""

    def __init__(
        self, max_waiting: int, queue_timeout_s: float, no_pipeline_timeout_s: float, aging_s: float = AGING_S
    ) -> None:
        self._max_waiting = max_waiting
        self._queue_timeout_s = queue_timeout_s
        self._no_pipeline_timeout_s = no_pipeline_timeout_s
        self._aging_s = aging_s
        self._lines: dict[str, _Line] = {}
        self._served_tokens: dict[str, float] = {}
        """Of tenants with nothing waiting."""
        self._interrupted: list[tuple[int, Waiting]] = []
        self._items: dict[str, Waiting] = {}
        """Of everything that was pushed and has not been forgotten; waiting or not."""
        self._waiting: set[str] = set()
        self._started_groups: dict[int, int] = {}
        """How many choices of a request have left the queue at least once."""
        self._next_number = 0
        self._departures_s: deque[float] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, item: str) -> bool:
        return item in self._waiting

    @property
    def num_new(self) -> int:
        """Waiting, and never interrupted: what the bound is for."""
        return len(self._waiting) - len(self._interrupted)

    def push(
        self,
        items: Sequence[str],
        deadline_s: float,
        now_s: float,
        *,
        tenant: Tenant = Tenant(),  # noqa: B008  immutable
        priority: int = 0,
        cost_tokens: int = 1,
        max_wait_s: float = math.inf,
    ) -> Admission:
        """Append new items, all or none; `cost_tokens` is what each of them is expected to cost."""
        shed = self._make_room(len(items), tenant)
        if shed is None:
            return Admission(False)
        group = self._next_number
        for item in items:
            waiting = Waiting(
                priority, self._next_number, item, tenant.id, now_s, min(deadline_s, now_s + max_wait_s), cost_tokens, group
            )
            self._next_number += 1
            self._items[item] = waiting
            self._enqueue(waiting, tenant)
        return Admission(True, shed)

    def put_back(self, item: str, deadline_s: float, *, interrupted: bool, not_before_s: float = 0.0) -> None:
        """Return an item that had left the queue to its old place, or, `interrupted`, before all new ones.

        Only its deadline ends the waiting of an interrupted item.
        """
        waiting = self._items[item]
        waiting.not_before_s = not_before_s
        if interrupted:
            waiting.deadline_s = deadline_s
            self._waiting.add(item)
            insort(self._interrupted, (waiting.number, waiting))
        else:
            self._charge(waiting.tenant, -waiting.cost_tokens)
            self._enqueue(waiting, Tenant(waiting.tenant))

    def first(self, now_s: float) -> str | None:
        """The next item that may go."""
        if not self._waiting:
            return None
        for _, waiting in self._interrupted:
            if waiting.not_before_s <= now_s:
                return waiting.item
        best = self._first_new(now_s)
        return best.item if best is not None else None

    def take(self, item: str, now_s: float) -> None:
        """`item` goes to a pipeline; its tenant is charged for it, unless it had gone before."""
        waiting = self._items[item]
        new = not self._is_interrupted(waiting)
        self._drop(item)
        self._departures_s.append(now_s)
        if new:
            self._started_groups[waiting.group] = self._started_groups.get(waiting.group, 0) + 1
            self._charge(waiting.tenant, waiting.cost_tokens)

    def forget(self, item: str, used_tokens: int | None = None) -> None:
        """`item` has ended, wherever it was; it has cost `used_tokens` (None: as expected)."""
        waiting = self._items.get(item)
        if waiting is None:
            return
        was_new = item in self._waiting and not self._is_interrupted(waiting)
        self._drop(item)
        del self._items[item]
        self._started_groups.pop(waiting.group, None)
        if used_tokens is not None and not was_new:
            self._charge(waiting.tenant, used_tokens - waiting.cost_tokens)

    def expire(self, now_s: float, pipelines_since_s: float | None) -> list[str]:
        """Take out and return what has waited too long.

        `pipelines_since_s`: since when there has been a pipeline; None: there is none.
        """
        expired = [w.item for _, w in self._interrupted if now_s >= w.deadline_s]
        for line in self._lines.values():
            expired += [w.item for _, w in line.by_arrival if now_s >= self._limit_s(w, pipelines_since_s)]
        for item in expired:
            self.forget(item)
        return expired

    def retry_after_s(self, now_s: float) -> int:
        """When a refused client should come back: 1 to 60 s, from the rate at which the queue drains."""
        while self._departures_s and self._departures_s[0] < now_s - _RATE_WINDOW_S:
            self._departures_s.popleft()
        if not self._departures_s:
            return min(_MAX_RETRY_AFTER_S, max(1, len(self)))
        rate_per_s = len(self._departures_s) / _RATE_WINDOW_S
        return max(1, min(_MAX_RETRY_AFTER_S, math.ceil(len(self) / rate_per_s)))

    def _first_new(self, now_s: float) -> Waiting | None:
        if len(self._lines) == 1:
            return next(iter(self._lines.values())).first(now_s, self._aging_s)
        heads = [(line, head) for line in self._lines.values() if (head := line.first(now_s, self._aging_s)) is not None]
        if not heads:
            return None
        best_class = min(line.tenant.priority_class for line, _ in heads)

        def rank(at: tuple[_Line, Waiting]) -> tuple[int, float, int]:
            line, head = at
            return max(best_class, line.level(now_s, self._aging_s)), line.served_tokens, head.number

        return min(heads, key=rank)[1]

    def _make_room(self, num_items: int, tenant: Tenant) -> list[str] | None:
        """One item of each request to shed for `num_items` new ones of `tenant`; None if they cannot get in."""
        room = self._max_waiting - self.num_new
        # One request of many choices may pass the bound when nothing waits: otherwise it could never be served.
        if num_items <= room or not self.num_new:
            return []
        own = len(self._lines.get(tenant.id, ()))
        victim = max(self._lines.values(), key=len)
        shed: list[str] = []
        num_left, seen = len(victim), set[int]()
        for _, waiting in reversed(victim.by_arrival):
            if num_items <= room:
                break
            if waiting.group in seen or waiting.group in self._started_groups:
                continue
            seen.add(waiting.group)
            size = sum(w.group == waiting.group for w in victim.by_priority)
            if victim.tenant.id == tenant.id or num_left - size < own + num_items:
                return None
            shed.append(waiting.item)
            num_left, room = num_left - size, room + size
        if num_items > room:
            return None
        for item in shed:
            group = self._items[item].group
            for sibling in [w.item for w in victim.by_priority if w.group == group]:
                self._drop(sibling)
        return shed

    def _enqueue(self, waiting: Waiting, tenant: Tenant) -> None:
        line = self._lines.get(waiting.tenant)
        if line is None:
            least = min((other.served_tokens for other in self._lines.values()), default=0.0)
            line = _Line(tenant, max(self._served_tokens.pop(waiting.tenant, 0.0), least))
            self._lines[waiting.tenant] = line
        self._waiting.add(waiting.item)
        line.add(waiting)

    def _charge(self, tenant: str, num_tokens: int) -> None:
        line = self._lines.get(tenant)
        if line is not None:
            line.served_tokens += num_tokens
        else:
            self._served_tokens[tenant] = self._served_tokens.get(tenant, 0.0) + num_tokens

    def _is_interrupted(self, waiting: Waiting) -> bool:
        at = bisect_left(self._interrupted, (waiting.number,))
        return at < len(self._interrupted) and self._interrupted[at][0] == waiting.number

    def _limit_s(self, waiting: Waiting, pipelines_since_s: float | None) -> float:
        if pipelines_since_s is None:
            return min(waiting.deadline_s, waiting.enqueued_s + self._no_pipeline_timeout_s)
        since_s = max(waiting.enqueued_s, pipelines_since_s)
        return min(waiting.deadline_s, since_s + self._queue_timeout_s)

    def _drop(self, item: str) -> None:
        if item not in self._waiting:
            return
        self._waiting.remove(item)
        waiting = self._items[item]
        if self._is_interrupted(waiting):
            del self._interrupted[bisect_left(self._interrupted, (waiting.number,))]
            return
        line = self._lines[waiting.tenant]
        line.drop(waiting)
        if not line:
            del self._lines[waiting.tenant]
            self._served_tokens[waiting.tenant] = line.served_tokens
