"""The bounded queue before the pipelines, fair between keys. Pure: time is an argument, what is shed is returned.

Choices that were interrupted go first, in the order in which they first came, and take no room. The new ones are
bounded by `max_waiting`, and ordered so:

1. by the priority class of their key (lower first). A key whose oldest choice waits is lifted by one class for each
   `aging_s`, up to the best class that waits: no class starves, and a long queue of its own gains a key nothing;
2. in a class by tokens served, fewest first: the virtual token counters of Sheng et al., "Fairness in Serving Large
   Language Models" (OSDI 2024), algorithm 2. A key that begins to wait is lifted to the least counter of those that
   wait; a choice is charged with what it is expected to cost when it leaves, and corrected when it has ended;
3. of one key by the request's own `priority` (lower first), then by arrival; what has waited for `aging_s` goes first.

When the queue is full, a key that has less in it than another gets in: the newest request of the other is shed.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

_RATE_WINDOW_S = 30.0
_MAX_RETRY_AFTER_S = 60
AGING_S = 15.0


class Tenant(msgspec.Struct, frozen=True):
    """For whom a request waits: a key, or everybody without one."""

    id: str = ""
    priority_class: int = 0
    """Lower goes first."""


ANYBODY = Tenant()


class Admission(msgspec.Struct, frozen=True):
    """Whether new items were taken, and one item of each request that had to make room for them."""

    accepted: bool
    shed: list[str] = []


class _Request(msgspec.Struct):
    """What the choices of one request share: they come together, and are shed together."""

    tenant: Tenant
    started: bool = False
    """One of them has left the queue."""


class _Waiting(msgspec.Struct):
    """A place in the queue."""

    item: str
    request: _Request
    priority: int
    number: int
    enqueued_s: float
    deadline_s: float
    cost_tokens: int
    interrupted: bool = False
    not_before_s: float = 0.0


def _number(waiting: _Waiting) -> int:
    return waiting.number


def _place(waiting: _Waiting) -> tuple[int, int]:
    return waiting.priority, waiting.number


def _remove(line: list[_Waiting], waiting: _Waiting, key: Callable[[_Waiting], Any]) -> None:
    del line[bisect_left(line, key(waiting), key=key)]


class _Line:
    """What waits for one tenant."""

    def __init__(self, tenant: Tenant, served_tokens: float) -> None:
        self.tenant = tenant
        self.served_tokens = served_tokens
        self.by_priority: list[_Waiting] = []
        self.by_arrival: list[_Waiting] = []

    def __len__(self) -> int:
        return len(self.by_priority)

    def add(self, waiting: _Waiting) -> None:
        insort(self.by_priority, waiting, key=_place)
        insort(self.by_arrival, waiting, key=_number)

    def drop(self, waiting: _Waiting) -> None:
        _remove(self.by_priority, waiting, _place)
        _remove(self.by_arrival, waiting, _number)

    def first(self, now_s: float, aging_s: float) -> _Waiting | None:
        """The next that may go."""
        oldest = next((w for w in self.by_arrival if w.not_before_s <= now_s), None)
        if oldest is None or now_s - oldest.enqueued_s >= aging_s:
            return oldest
        return next(w for w in self.by_priority if w.not_before_s <= now_s)

    def level(self, now_s: float, aging_s: float) -> int:
        waited_s = now_s - self.by_arrival[0].enqueued_s
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
        self._least_served_tokens = 0.0
        """Of the tenant that was the last to have something waiting."""
        self._interrupted: list[_Waiting] = []
        self._items: dict[str, _Waiting] = {}
        """What was pushed and has not been forgotten; waiting or not."""
        self._waiting: set[str] = set()
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
        tenant: Tenant = ANYBODY,
        priority: int = 0,
        cost_tokens: int = 1,
    ) -> Admission:
        """Append new items, all or none; `cost_tokens` is what each of them is expected to cost.

        What was shed to make room must be forgotten by its owner.
        """
        shed = self._make_room(len(items), tenant)
        if shed is None:
            return Admission(False)
        request = _Request(tenant)
        for item in items:
            waiting = _Waiting(item, request, priority, self._next_number, now_s, deadline_s, cost_tokens)
            self._next_number += 1
            self._items[item] = waiting
            self._enqueue(waiting)
        return Admission(True, shed)

    def put_back(self, item: str, deadline_s: float, *, interrupted: bool, not_before_s: float = 0.0) -> None:
        """Return an item that had left the queue to its old place, or, `interrupted` (ever), ahead of all new ones.

        Only its deadline ends the waiting of an interrupted item.
        """
        waiting = self._items[item]
        waiting.not_before_s, waiting.deadline_s = not_before_s, deadline_s
        if interrupted or waiting.interrupted:
            waiting.interrupted = True
            self._waiting.add(item)
            insort(self._interrupted, waiting, key=_number)
        else:
            self._charge(waiting.request.tenant, -waiting.cost_tokens)
            self._enqueue(waiting)

    def first(self, now_s: float) -> str | None:
        """The next item that may go."""
        if not self._waiting:
            return None
        waiting = next((w for w in self._interrupted if w.not_before_s <= now_s), None) or self._first_new(now_s)
        return waiting.item if waiting is not None else None

    def take(self, item: str, now_s: float) -> None:
        """`item` goes to a pipeline; its tenant is charged for it, unless it had gone before."""
        waiting = self._items[item]
        if not waiting.interrupted:
            self._charge(waiting.request.tenant, waiting.cost_tokens)
        self._drop(item)
        self._departures_s.append(now_s)
        waiting.request.started = True

    def waited_s(self, item: str, now_s: float) -> float:
        """Since `item` came."""
        return now_s - self._items[item].enqueued_s

    def forget(self, item: str, used_tokens: int | None = None) -> None:
        """`item` has ended, wherever it was; it has cost `used_tokens` (None: as expected)."""
        waiting = self._items.get(item)
        if waiting is None:
            return
        charged = waiting.interrupted or item not in self._waiting
        self._drop(item)
        del self._items[item]
        if used_tokens is not None and charged:
            self._charge(waiting.request.tenant, used_tokens - waiting.cost_tokens)

    def expire(self, now_s: float, pipelines_since_s: float | None) -> list[str]:
        """Take out and return what has waited too long.

        `pipelines_since_s`: since when there has been a pipeline; None: there is none.
        """
        expired = [w.item for w in self._interrupted if now_s >= w.deadline_s]
        for line in self._lines.values():
            expired += [w.item for w in line.by_arrival if now_s >= self._limit_s(w, pipelines_since_s)]
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

    def _first_new(self, now_s: float) -> _Waiting | None:
        heads = [
            (line, head) for line in self._lines.values() if (head := line.first(now_s, self._aging_s)) is not None
        ]
        if len(heads) <= 1:
            return heads[0][1] if heads else None
        best_class = min(line.tenant.priority_class for line, _ in heads)

        def rank(at: tuple[_Line, _Waiting]) -> tuple[int, float, int]:
            line, head = at
            return max(best_class, line.level(now_s, self._aging_s)), line.served_tokens, head.number

        return min(heads, key=rank)[1]

    def _make_room(self, num_items: int, tenant: Tenant) -> list[str] | None:
        """One item of each request to shed for `num_items` new ones of `tenant`; None if they cannot get in."""
        room = self._max_waiting - self.num_new
        # One request of many choices may pass the bound when nothing waits: otherwise it could never be served.
        if num_items <= room or not self.num_new:
            return []
        victim = max(self._lines.values(), key=len)
        num_own = len(self._lines[tenant.id]) if tenant.id in self._lines else 0
        num_left, shed = len(victim), list[_Waiting]()
        for waiting in reversed(victim.by_arrival):
            request = waiting.request
            if request.started or any(request is other.request for other in shed):
                continue
            # Some of its choices may have ended before they began.
            num_waiting = sum(other.request is request for other in victim.by_arrival)
            num_left, room = num_left - num_waiting, room + num_waiting
            if victim.tenant.id == tenant.id or num_left < num_own + num_items:
                return None
            shed.append(waiting)
            if num_items <= room:
                break
        else:
            return None
        for waiting in shed:
            for one in [one for one in victim.by_arrival if one.request is waiting.request]:
                self._drop(one.item)
        return [waiting.item for waiting in shed]

    def _enqueue(self, waiting: _Waiting) -> None:
        tenant = waiting.request.tenant
        line = self._lines.get(tenant.id)
        if line is None:
            others = [other.served_tokens for other in self._lines.values()]
            least = min(others, default=self._least_served_tokens)
            line = _Line(tenant, max(self._served_tokens.pop(tenant.id, 0.0), least))
            self._lines[tenant.id] = line
        self._waiting.add(waiting.item)
        line.add(waiting)

    def _charge(self, tenant: Tenant, num_tokens: int) -> None:
        line = self._lines.get(tenant.id)
        if line is not None:
            line.served_tokens += num_tokens
        else:
            self._served_tokens[tenant.id] = self._served_tokens.get(tenant.id, 0.0) + num_tokens

    def _limit_s(self, waiting: _Waiting, pipelines_since_s: float | None) -> float:
        if pipelines_since_s is None:
            return min(waiting.deadline_s, waiting.enqueued_s + self._no_pipeline_timeout_s)
        since_s = max(waiting.enqueued_s, pipelines_since_s)
        return min(waiting.deadline_s, since_s + self._queue_timeout_s)

    def _drop(self, item: str) -> None:
        if item not in self._waiting:
            return
        self._waiting.remove(item)
        waiting = self._items[item]
        if waiting.interrupted:
            _remove(self._interrupted, waiting, _number)
            return
        tenant = waiting.request.tenant
        line = self._lines[tenant.id]
        line.drop(waiting)
        if not line:
            del self._lines[tenant.id]
            self._served_tokens[tenant.id] = self._least_served_tokens = line.served_tokens
