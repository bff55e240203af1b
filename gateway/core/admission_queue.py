"""The bounded queue before the pipelines. Pure: time is an argument, expiry and shedding are return values.

Two lanes: choices that were interrupted go first (among themselves in the order in which they first came), then the
new ones. Only the new ones are bounded: what was accepted once is never refused for want of room.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Sequence

import msgspec

_RATE_WINDOW_S = 30.0
_MAX_RETRY_AFTER_S = 60


class Waiting(msgspec.Struct, order=True):
    """A place in the queue; compares by lane, then by arrival."""

    lane: int
    number: int
    item: str
    enqueued_s: float
    deadline_s: float
    not_before_s: float = 0.0


class AdmissionQueue:
    """FIFO of item names with deadlines; durations in seconds."""

    def __init__(self, max_waiting: int, queue_timeout_s: float, no_pipeline_timeout_s: float) -> None:
        self._max_waiting = max_waiting
        self._queue_timeout_s = queue_timeout_s
        self._no_pipeline_timeout_s = no_pipeline_timeout_s
        self._waiting: list[Waiting] = []
        self._arrivals: dict[str, tuple[int, float]] = {}
        self._next_number = 0
        self._departures_s: deque[float] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, item: str) -> bool:
        return any(waiting.item == item for waiting in self._waiting)

    def push(self, items: Sequence[str], deadline_s: float, now_s: float) -> bool:
        """Append new items, all or none; False if there is no room for them."""
        num_new = sum(waiting.lane == 1 for waiting in self._waiting)
        # One request of many choices may pass the bound when nothing waits: otherwise it could never be served.
        if num_new and num_new + len(items) > self._max_waiting:
            return False
        for item in items:
            self._arrivals[item] = (self._next_number, now_s)
            insort(self._waiting, Waiting(1, self._next_number, item, now_s, deadline_s))
            self._next_number += 1
        return True

    def put_back(self, item: str, deadline_s: float, *, interrupted: bool, not_before_s: float = 0.0) -> None:
        """Return an item that had left the queue to its old place, or, `interrupted`, before all new ones.

        Only its deadline ends the waiting of an interrupted item.
        """
        number, enqueued_s = self._arrivals[item]
        lane = 0 if interrupted else 1
        insort(self._waiting, Waiting(lane, number, item, enqueued_s, deadline_s, not_before_s))

    def first(self, now_s: float) -> str | None:
        """The next item that may go."""
        return next((w.item for w in self._waiting if w.not_before_s <= now_s), None)

    def take(self, item: str, now_s: float) -> None:
        """`item` goes to a pipeline."""
        self._drop(item)
        self._departures_s.append(now_s)

    def forget(self, item: str) -> None:
        """`item` has ended, wherever it was."""
        self._drop(item)
        self._arrivals.pop(item, None)

    def expire(self, now_s: float, pipelines_since_s: float | None) -> list[str]:
        """Take out and return what has waited too long.

        `pipelines_since_s`: since when there has been a pipeline; None: there is none.
        """
        expired = [w.item for w in self._waiting if now_s >= self._limit_s(w, pipelines_since_s)]
        for item in expired:
            self.forget(item)
        return expired

    def retry_after_s(self, now_s: float) -> int:
        """When a refused client should come back: 1 to 60 s, from the rate at which the queue drains."""
        while self._departures_s and self._departures_s[0] < now_s - _RATE_WINDOW_S:
            self._departures_s.popleft()
        if not self._departures_s:
            return min(_MAX_RETRY_AFTER_S, max(1, len(self._waiting)))
        rate_per_s = len(self._departures_s) / _RATE_WINDOW_S
        return max(1, min(_MAX_RETRY_AFTER_S, math.ceil(len(self._waiting) / rate_per_s)))

    def _limit_s(self, waiting: Waiting, pipelines_since_s: float | None) -> float:
        if waiting.lane == 0:
            return waiting.deadline_s
        if pipelines_since_s is None:
            return min(waiting.deadline_s, waiting.enqueued_s + self._no_pipeline_timeout_s)
        since_s = max(waiting.enqueued_s, pipelines_since_s)
        return min(waiting.deadline_s, since_s + self._queue_timeout_s)

    def _drop(self, item: str) -> None:
        self._waiting = [w for w in self._waiting if w.item != item]
