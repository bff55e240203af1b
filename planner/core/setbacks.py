"""Failures while pipelines are prepared or run with all ranks alive: retry with growing delay, then another way.

A preparation that fails again and again is the fault of the shape (too little memory for so many layers, an engine
that cannot be built so) or of a rank (a bad device). The shape is given up first, as that gives up no rank: until it
may be tried again, other shapes are planned. The rank is left out if the shape serves elsewhere, or if it has
failed in one shape and now fails in another. A failure whose cause the engine names as the shape's is not retried.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from planner.core.layout import Shape, in_words

RETRY_DELAYS_S: Final = (0.2, 1.0, 3.0)
EXCLUSION_S: Final = 30.0
"""Of a rank that failed too often."""
HANG_EXCLUSION_S: Final = 300.0
"""A rank that hung has cost a long wait already."""
REFUSAL_S: Final = 60.0
"""Of a shape, the first time; a new try may cost the build of an engine, so later ones last longer."""
REFUSAL_GROWTH: Final = 4.0
MAX_REFUSAL_S: Final = 3600.0
FORGET_BREAKS_AFTER_S: Final = 60.0
"""A pipeline that has not broken for so long begins anew."""
FORGET_FAILURES_AFTER_S: Final = 600.0
"""The same of preparations: the build of an engine alone may take minutes."""

Ranks = frozenset[str]


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """A pipeline that could not be prepared or started."""

    shape: Shape
    ranks: Ranks
    culprit: str
    """The rank that said so."""
    memory_bytes: int
    """Of that rank."""
    detail: str = ""
    names_shape: bool = False
    """By the engine's word the shape cannot be taken there: to try again is of no use."""
    is_proven: bool = False
    """Another pipeline of this shape serves."""


class RefusedShape(msgspec.Struct, frozen=True, kw_only=True):
    memory_bytes: int
    """Of the rank that refused it: those with more memory may take it."""
    why: str


class _Refusal(msgspec.Struct, frozen=True, kw_only=True):
    what: RefusedShape
    suspects: frozenset[str]
    until_s: float


class Setbacks:
    def __init__(self) -> None:
        self._failures: dict[tuple[Ranks, Shape | None], tuple[int, float]] = {}
        """By the ranks of the pipeline, and its shape where it failed to prepare: how often, and when last."""
        self._excluded_until_s: dict[str, float] = {}
        self._refusals: dict[Shape, _Refusal] = {}
        self._next_refusal_s: dict[Shape, float] = {}
        """How long the next refusal of a shape lasts that was refused before and has not served since."""

    # --- What happens ---

    def note_break(self, ranks: Ranks, now_s: float) -> float:
        """When to try again after a pipeline of `ranks` broke or hung, and no rank is to blame."""
        retry_at_s = self._next_retry_s((ranks, None), FORGET_BREAKS_AFTER_S, now_s)
        return retry_at_s if retry_at_s is not None else now_s + EXCLUSION_S / 3

    def note_failure(self, attempt: Attempt, now_s: float) -> float:
        """When to decide again after a failed preparation. The shape may be refused by then, or the rank excluded."""
        if attempt.names_shape and not attempt.is_proven:
            # Where it was refused already, it was tried for want of any other.
            again_at_s = now_s + EXCLUSION_S if attempt.shape in self.refused(now_s) else now_s
            self._refuse(attempt, frozenset(), now_s)
            return again_at_s
        if attempt.culprit in self.suspects(now_s):
            self._excluded_until_s[attempt.culprit] = now_s + EXCLUSION_S
            return now_s
        key = attempt.ranks, attempt.shape
        retry_at_s = self._next_retry_s(key, FORGET_FAILURES_AFTER_S, now_s)
        if retry_at_s is not None:
            return retry_at_s
        del self._failures[key]
        if attempt.is_proven:
            self._excluded_until_s[attempt.culprit] = now_s + EXCLUSION_S
        else:
            self._refuse(attempt, frozenset({attempt.culprit}), now_s)
        return now_s

    def note_hang(self, ranks: Ranks, culprit: str | None, now_s: float) -> float:
        """The same of ranks that said nothing at all: a culprit that is known is excluded at once."""
        if culprit is None:
            return self.note_break(ranks, now_s)
        self._excluded_until_s[culprit] = now_s + HANG_EXCLUSION_S
        return now_s

    def note_serving(self, shape: Shape) -> bool:
        """A pipeline of this shape serves: the shape is not to blame. True if it was refused."""
        self._next_refusal_s.pop(shape, None)
        return self._refusals.pop(shape, None) is not None

    def pop_expired(self, now_s: float) -> list[str]:
        """Ranks and shapes, in words, that may be tried again from now on."""
        ranks = sorted(rank for rank, until_s in self._excluded_until_s.items() if until_s <= now_s)
        for rank in ranks:
            del self._excluded_until_s[rank]
        shapes = sorted(shape for shape, refusal in self._refusals.items() if refusal.until_s <= now_s)
        for shape in shapes:
            del self._refusals[shape]
        return ranks + [in_words(shape) for shape in shapes]

    # --- What it means ---

    def excluded(self, now_s: float) -> frozenset[str]:
        """Ranks that get no position for now."""
        return frozenset(rank for rank, until_s in self._excluded_until_s.items() if until_s > now_s)

    def refused(self, now_s: float) -> dict[Shape, RefusedShape]:
        """Shapes that are not planned for now, if there is another."""
        return {shape: refusal.what for shape, refusal in self._refusals.items() if refusal.until_s > now_s}

    def suspects(self, now_s: float) -> frozenset[str]:
        """Ranks that a refused shape failed on: they, and not the shape, may be at fault."""
        return frozenset().union(*(r.suspects for r in self._refusals.values() if r.until_s > now_s))

    def next_wakeup_s(self) -> float:
        ends_s = [*self._excluded_until_s.values(), *(refusal.until_s for refusal in self._refusals.values())]
        return min(ends_s, default=math.inf)

    # --- Steps ---

    def _next_retry_s(self, key: tuple[Ranks, Shape | None], forget_after_s: float, now_s: float) -> float | None:
        """None after the last retry."""
        count, last_s = self._failures.get(key, (0, -math.inf))
        count = count + 1 if now_s - last_s < forget_after_s else 1
        self._failures[key] = (count, now_s)
        return now_s + RETRY_DELAYS_S[count - 1] if count <= len(RETRY_DELAYS_S) else None

    def _refuse(self, attempt: Attempt, suspects: Ranks, now_s: float) -> None:
        lasts_s = self._next_refusal_s.get(attempt.shape, REFUSAL_S)
        self._next_refusal_s[attempt.shape] = min(REFUSAL_GROWTH * lasts_s, MAX_REFUSAL_S)
        known = self._refusals.get(attempt.shape)
        self._refusals[attempt.shape] = _Refusal(
            what=RefusedShape(memory_bytes=attempt.memory_bytes, why=f"{attempt.culprit}: {attempt.detail}"),
            suspects=suspects | (known.suspects if known is not None else frozenset()),
            until_s=now_s + lasts_s,
        )
