"""Who sends: the least loaded of those that hold what is asked for, in the receiver's own instance if there is one."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from planner.core.fleet import Rank

MAX_SOURCES: Final = 4
"""Named for one transfer: the one that is planned, and others in case that it fails."""


class Holders:
    """Ranks and instances by number; `signatures[i]` are ranks that hold the same."""

    def __init__(self, signatures: Sequence[Sequence[int]], ranks: Sequence[Rank], instance_of: Sequence[int]) -> None:
        self._instance_of = instance_of
        self._under_notice = [rank.deadline_s is not None for rank in ranks]
        self._signatures = signatures
        # Those that stay, as a reserve, before those that leave.
        self._reserves = [sorted(holders, key=lambda n: self._under_notice[n]) for holders in signatures]
        self._num_leaving = [sum(self._under_notice[n] for n in holders) for holders in signatures]
        self._num_asked = [0] * len(signatures)
        self._near: list[dict[int, list[int]]] = []
        for holders in signatures:
            near: dict[int, list[int]] = defaultdict(list)
            for number in holders:
                near[instance_of[number]].append(number)
            self._near.append(near)
        self._inter_bytes = [0.0] * (max(instance_of, default=-1) + 1)
        self._rank_bytes = [0.0] * len(instance_of)
        # Victims first among equally loaded: they have no other work before them.
        self._queues = [[(0.0, 0.0, not self._under_notice[n], n) for n in holders] for holders in signatures]
        for queue in self._queues:
            heapq.heapify(queue)

    def num_of(self, signature: int) -> int:
        return len(self._signatures[signature])

    def is_leaving(self, signature: int) -> bool:
        """Only ranks under notice hold this."""
        return 0 < self.num_of(signature) == self._num_leaving[signature]

    def choose(self, signature: int, receiver: int, num_bytes: float) -> list[int]:
        """Up to `MAX_SOURCES` holders, the one that shall send `num_bytes` first; empty if nobody holds it."""
        if not self._signatures[signature]:
            return []
        near = self._near[signature].get(self._instance_of[receiver], [])
        if near:
            first = min(near, key=lambda n: (self._rank_bytes[n], not self._under_notice[n], n))
        else:
            first = self._least_loaded(signature)
            self._inter_bytes[self._instance_of[first]] += num_bytes
        self._rank_bytes[first] += num_bytes
        return [first, *self._others(signature, first, near)]

    def _least_loaded(self, signature: int) -> int:
        """Loads only grow, so that an entry with its present load is the least of all."""
        queue = self._queues[signature]
        while True:
            entry = queue[0]
            number = entry[3]
            present = (self._inter_bytes[self._instance_of[number]], self._rank_bytes[number], *entry[2:])
            if present == entry:
                return number
            heapq.heapreplace(queue, present)

    def _others(self, signature: int, first: int, near: Sequence[int]) -> list[int]:
        """Reserves in turn: not all transfers shall fall back on the same rank."""
        reserves = self._reserves[signature]
        num_staying = len(reserves) - self._num_leaving[signature]
        turn = self._num_asked[signature]
        self._num_asked[signature] += 1
        chosen = [n for n in near if n != first][: MAX_SOURCES - 1]
        for count, offset in ((num_staying, 0), (len(reserves) - num_staying, num_staying)):
            for step in range(min(count, MAX_SOURCES + len(chosen))):
                number = reserves[offset + (turn + step) % count]
                if len(chosen) < MAX_SOURCES - 1 and number != first and number not in chosen:
                    chosen.append(number)
        return chosen
