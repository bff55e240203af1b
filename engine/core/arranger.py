"""Just-in-time arrangement (SpotServe, section 4): how far to go on before the KV must leave, and which KV leaves.

A sequence can be cut between any two steps. Before a preemption as many steps as leave room for the migration are
taken; before an acquisition as few as fill the time until the new instance is ready. A sequence that was resumed is
arranged like any other: what counts is what lies before it.

The paper's guard (migrate only if that takes less than what is executed until then, else compute again elsewhere)
decides for a whole batch. Here `choose_kv_moves` decides it for each sequence, by what is ready sooner, and before the
deadline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from itertools import combinations
from typing import NamedTuple

ExecutionTime = Callable[[int], float]
"""l_exe of the paper: seconds that S more steps take; 0 for S = 0, and never less for a greater S."""


def execution_time(step_s: float, prefill_s: float = 0.0) -> ExecutionTime:
    """`prefill_s` before the first of equal steps. Raises ValueError for a step time that is not positive."""
    if not step_s > 0:
        raise ValueError(f"step_s: must be positive, got {step_s}")
    return lambda num_steps: prefill_s + num_steps * step_s if num_steps else 0.0


def steps_before_preemption(execution_s: ExecutionTime, most: int, left_s: float, migration_s: float) -> int:
    """The most steps, up to `most`, that end more than `migration_s` before an instance goes away in `left_s`."""
    return _first(lambda steps: execution_s(steps) >= left_s - migration_s, 1, most + 1) - 1


def steps_before_acquisition(execution_s: ExecutionTime, most: int, ready_in_s: float) -> int:
    """The fewest steps that last until a new instance is ready in `ready_in_s`; `most` if all end before that."""
    return _first(lambda steps: execution_s(steps) >= ready_in_s, 0, most)


def steps_before_stop(
    now_s: float, deadline_s: float | None, migration_s: float, step_s: float, margin_s: float
) -> int:
    """Steps of `step_s` each that a pipeline which retires may still take; 0 also where it is too late already.

    `deadline_s` None is an acquisition whose instance is there: every step would be one more on the old configuration.
    Raises ValueError for a step time that is not positive.
    """
    execution_s = execution_time(step_s)
    if deadline_s is None:
        return steps_before_acquisition(execution_s, 1, 0.0)
    left_s = deadline_s - margin_s - now_s
    return steps_before_preemption(execution_s, max(0, math.ceil(left_s / step_s)), left_s, migration_s)


def _first(holds: Callable[[int], bool], first: int, last: int) -> int:
    """The least number from `first` on for which `holds`, which it then does for all greater ones; else `last`."""
    while first < last:
        middle = (first + last) // 2
        if holds(middle):
            last = middle
        else:
            first = middle + 1
    return first


MAX_EXACT = 8
"""Sequences among which every choice of those that move is tried."""


class KvMove(NamedTuple):
    """KV that can be moved, or computed again from its tokens."""

    id: Hashable
    num_tokens: int
    num_bytes: int


def choose_kv_moves(
    sequences: Iterable[KvMove],
    kv_bytes_per_s: float,
    prefill_s_per_token: float,
    left_s: float = math.inf,
    *,
    latency_s: float = 0.0,
    link_busy_s: float = 0.0,
    prefill_busy_s: float = 0.0,
) -> set[Hashable]:
    """Ids of the sequences whose KV moves; the others are computed again.

    Moves follow one another on the link (each `latency_s` and its bytes), prefills in the pipeline, both at once and
    each after what it has to do already: the last sequence shall be ready as soon as possible. No move may end after
    `left_s`. Up to `MAX_EXACT` sequences all ways are tried; of more, the longest first, each to where it is ready
    sooner.
    """
    with_kv = [sequence for sequence in sequences if sequence.num_tokens > 0]

    def moved_s(moving: Iterable[KvMove]) -> float:
        return link_busy_s + sum(latency_s + sequence.num_bytes / kv_bytes_per_s for sequence in moving)

    def computed_s(others: Iterable[KvMove]) -> float:
        return prefill_busy_s + sum(sequence.num_tokens * prefill_s_per_token for sequence in others)

    def cost(moving: Iterable[KvMove]) -> tuple[float, int]:
        others = set(with_kv).difference(moving)
        return max(moved_s(moving), computed_s(others)), sum(sequence.num_tokens for sequence in others)

    if len(with_kv) <= MAX_EXACT:
        subsets = (moving for count in range(len(with_kv) + 1) for moving in combinations(with_kv, count))
        in_time = (moving for moving in subsets if not moving or moved_s(moving) <= left_s)
        return {sequence.id for sequence in min(in_time, key=cost)}
    moving: list[KvMove] = []
    others: list[KvMove] = []
    for sequence in sorted(with_kv, key=lambda s: -s.num_tokens):
        done_s = moved_s([*moving, sequence])
        is_sooner = done_s <= left_s and done_s < computed_s([*others, sequence])
        (moving if is_sooner else others).append(sequence)
    return {sequence.id for sequence in moving}
