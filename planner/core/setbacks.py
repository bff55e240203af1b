"""Failures while pipelines are prepared or run with all ranks alive: retry with growing delay, then exclude a rank."""

from __future__ import annotations

import math
from typing import Final

RETRY_DELAYS_S: Final = (0.2, 1.0, 3.0)
EXCLUSION_S: Final = 30.0
HANG_EXCLUSION_S: Final = 300.0
"""A rank that hung has cost a long wait already."""
FORGET_AFTER_S: Final = 60.0
"""A shape that has not failed for so long begins anew."""


class Setbacks:
    def __init__(self) -> None:
        self._failures: dict[frozenset[str], tuple[int, float]] = {}
        """By the ranks of the pipeline: how often, and when last."""
        self._excluded_until_s: dict[str, float] = {}

    def note_failure(self, ranks: frozenset[str], culprit: str | None, now_s: float) -> float:
        """When to try again. After the last retry the culprit, if one is known, is excluded for a while."""
        count, last_s = self._failures.get(ranks, (0, -math.inf))
        count = count + 1 if now_s - last_s < FORGET_AFTER_S else 1
        self._failures[ranks] = (count, now_s)
        if count <= len(RETRY_DELAYS_S):
            return now_s + RETRY_DELAYS_S[count - 1]
        if culprit is None:
            return now_s + EXCLUSION_S / 3
        del self._failures[ranks]
        self._excluded_until_s[culprit] = now_s + EXCLUSION_S
        return now_s

    def note_hang(self, ranks: frozenset[str], culprit: str | None, now_s: float) -> float:
        """The same of ranks that said nothing at all: a culprit that is known is excluded at once."""
        if culprit is None:
            return self.note_failure(ranks, None, now_s)
        self._excluded_until_s[culprit] = now_s + HANG_EXCLUSION_S
        return now_s

    def excluded(self, now_s: float) -> frozenset[str]:
        return frozenset(rank for rank, until_s in self._excluded_until_s.items() if until_s > now_s)

    def pop_expired(self, now_s: float) -> list[str]:
        """Ranks that may be tried again from now on."""
        expired = sorted(rank for rank, until_s in self._excluded_until_s.items() if until_s <= now_s)
        for rank in expired:
            del self._excluded_until_s[rank]
        return expired

    def next_wakeup_s(self) -> float:
        return min(self._excluded_until_s.values(), default=math.inf)
