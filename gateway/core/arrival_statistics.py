"""How many requests arrive, and how evenly: what the planner's estimate of queues needs. Pure."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import Final

GAPS_WINDOW_S: Final = 300.0
"""Bursts are minutes apart."""
MAX_GAPS: Final = 2000
PRIOR_GAPS: Final = 10
"""So many gaps of random (Poisson) arrivals are taken to have been seen before the first ones."""


class ArrivalStatistics:
    """Of one gateway."""

    def __init__(self) -> None:
        self._arrivals_s: deque[float] = deque(maxlen=MAX_GAPS + 1)

    def note(self, now_s: float) -> None:
        """A request has arrived."""
        self._arrivals_s.append(now_s)

    def squared_cv(self, now_s: float) -> float:
        """Of the gaps within GAPS_WINDOW_S: 0 evenly spaced, 1 at random, more in bursts.

        The gap that still runs counts once it is longer than the mean: a lull after a burst is part of the pattern.
        """
        while self._arrivals_s and self._arrivals_s[0] < now_s - GAPS_WINDOW_S:
            self._arrivals_s.popleft()
        times_s = list(self._arrivals_s)
        gaps_s = [after - before for before, after in pairwise(times_s)]
        if not gaps_s:
            return 1.0
        mean_s = sum(gaps_s) / len(gaps_s)
        if now_s - times_s[-1] > mean_s:
            gaps_s.append(now_s - times_s[-1])
            mean_s = sum(gaps_s) / len(gaps_s)
        if mean_s <= 0:
            return 1.0
        squared_cv = sum((gap - mean_s) ** 2 for gap in gaps_s) / len(gaps_s) / mean_s**2
        return (PRIOR_GAPS + squared_cv * len(gaps_s)) / (PRIOR_GAPS + len(gaps_s))
