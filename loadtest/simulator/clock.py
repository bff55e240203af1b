"""Virtual time: a heap of timers. Timers due at the same time fire in the order in which they were set."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Final

ALWAYS: Final[Callable[[], bool]] = lambda: True  # noqa: E731 - a default that reads as a word


class Timer:
    """Something that will happen, unless it is cancelled."""

    __slots__ = ("action", "at_s")

    def __init__(self, at_s: float, action: Callable[[], None] | None) -> None:
        self.at_s = at_s
        self.action = action

    def cancel(self) -> None:
        """Nothing happens any more; also when it has fired already."""
        self.action = None


class Clock:
    """`now_s` moves only inside `run`, from timer to timer."""

    def __init__(self, start_s: float = 0.0) -> None:
        self.now_s = start_s
        self._heap: list[tuple[float, int, Timer]] = []
        self._num_set = 0

    def at(self, at_s: float, action: Callable[[], None]) -> Timer:
        """Call `action` at `at_s`, or right after what is due now if that has passed."""
        timer = Timer(max(at_s, self.now_s), action)
        heapq.heappush(self._heap, (timer.at_s, self._num_set, timer))
        self._num_set += 1
        return timer

    def next_s(self) -> float:
        """When the next timer fires; infinite if there is none."""
        while self._heap and self._heap[0][2].action is None:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def run(self, until_s: float = math.inf, wanted: Callable[[], bool] = ALWAYS) -> None:
        """Fire all timers up to and including `until_s`, for as long as `wanted` says so before each one.

        Afterwards `now_s` is `until_s`, unless that is infinite or `wanted` has ended it.
        """
        while wanted():
            if self.next_s() > until_s:
                if until_s < math.inf:
                    self.now_s = max(self.now_s, until_s)
                return
            if not self._heap:
                return
            at_s, _, timer = heapq.heappop(self._heap)
            self.now_s = at_s
            action, timer.action = timer.action, None
            if action is not None:
                action()
