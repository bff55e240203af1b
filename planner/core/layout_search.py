"""Which layouts to weigh.

The paper runs D equal pipelines and leaves N - D * P * M ranks idle. A layout may add pipelines of other shapes, or
give some pipelines a stage more, so that no rank idles because N does not divide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from planner.core.layout import Layout, Score, Scorer, Shape, size_of

MAX_EXHAUSTIVE: Final = 192
"""Up to so many layouts all of them are weighed; otherwise those that `_constructed` builds."""
NUM_BASES: Final = 12
"""Shapes of least latency whose leftover ranks are filled with others; a third as many of most throughput."""
LOADS: Final = (0.95, 0.8, 0.6)
"""Utilizations that a mix of a fast shape with one of more throughput aims at."""


class Knapsack:
    """For every number of ranks, the pipelines that give most throughput on them (an unbounded knapsack)."""

    def __init__(self, scorer: Scorer, shapes: Sequence[Shape], num_ranks: int) -> None:
        best_of_size: dict[int, Shape] = {}
        for shape in shapes:
            size = size_of(shape)
            if size not in best_of_size or scorer.throughput_per_s(shape) > scorer.throughput_per_s(best_of_size[size]):
                best_of_size[size] = shape
        sizes = np.array(sorted(best_of_size))
        self._shapes = [best_of_size[size] for size in sizes]
        gains = np.array([scorer.throughput_per_s(shape) for shape in self._shapes])
        self.throughput_per_s: NDArray[np.float64] = np.zeros(num_ranks + 1)
        self._choice = np.full(num_ranks + 1, -1)
        for num in range(1, num_ranks + 1):
            fitting = int(np.searchsorted(sizes, num, side="right"))
            if not fitting:
                continue
            totals = self.throughput_per_s[num - sizes[:fitting]] + gains[:fitting]
            best = int(totals.argmax())
            if totals[best] > self.throughput_per_s[num - 1] * (1 + 1e-12):
                self.throughput_per_s[num], self._choice[num] = totals[best], best
            else:
                self.throughput_per_s[num] = self.throughput_per_s[num - 1]

    def fill(self, num_ranks: int) -> Layout:
        """Of most throughput on up to `num_ranks` ranks; the fewest ranks that give it."""
        chosen: Counter[Shape] = Counter()
        while num_ranks > 0:
            if self._choice[num_ranks] < 0:
                num_ranks -= 1
            else:
                shape = self._shapes[self._choice[num_ranks]]
                chosen[shape] += 1
                num_ranks -= size_of(shape)
        return Layout.of(chosen)


def weigh(scorer: Scorer, shapes: Sequence[Shape], num_ranks: int, max_pipelines: int | None = None) -> list[Score]:
    """Scores of the layouts worth looking at on up to `num_ranks` ranks, of up to `max_pipelines` pipelines.

    All layouts if they are few. Otherwise every shape alone with as many pipelines as fit, the layout of most
    throughput, and the best of the former with their leftover ranks filled, with some pipelines a stage deeper, or
    mixed with shapes of more throughput until they keep up with the arrivals.
    """
    if not shapes:
        return []
    limit = num_ranks if max_pipelines is None else max_pipelines
    every = _every_layout(shapes, num_ranks, limit)
    layouts = every if every is not None else _constructed(scorer, shapes, num_ranks, limit)
    return [scorer.score(layout) for layout in dict.fromkeys(layouts) if 0 < layout.num_pipelines <= limit]


def filled(scorer: Scorer, shapes: Sequence[Shape], present: Layout, num_ranks: int, limit: int) -> list[Score]:
    """Scores of `present` as it is, and with pipelines on the ranks that it leaves free."""
    layouts = [present]
    free = num_ranks - present.num_ranks
    if shapes and free > 0:
        present_shapes = [shape for shape, _ in present.counts]
        for shape in [*present_shapes, *sorted(shapes, key=lambda s: scorer.score(Layout.of([s])).service_s)[:2]]:
            room = min(free // size_of(shape), limit - present.num_pipelines)
            if room > 0 and shape in shapes:
                layouts.append(present.plus(Layout.of({shape: room})))
        layouts.append(present.plus(Knapsack(scorer, shapes, free).fill(free)))
    return [scorer.score(layout) for layout in dict.fromkeys(layouts) if 0 < layout.num_pipelines <= limit]


def fewest_pipelines(scorer: Scorer, shape: Shape, most: int, is_enough: Callable[[Score], bool]) -> Score | None:
    """The fewest pipelines of one shape that are enough, if `most` are; by bisection, as more are never worse."""
    if most < 1 or not is_enough(scorer.score(Layout.of({shape: most}))):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(scorer.score(Layout.of({shape: middle}))) else (middle, high)
    return scorer.score(Layout.of({shape: high}))


def _every_layout(shapes: Sequence[Shape], num_ranks: int, max_pipelines: int) -> list[Layout] | None:
    """All multisets of up to `num_ranks` ranks; None if they are more than MAX_EXHAUSTIVE."""
    found: list[Layout] = []

    def extend(chosen: list[Shape], first: int, free: int) -> bool:
        for index in range(first, len(shapes)):
            if size_of(shapes[index]) <= free and len(chosen) < max_pipelines:
                if len(found) == MAX_EXHAUSTIVE:
                    return False
                found.append(Layout.of([*chosen, shapes[index]]))
                if not extend([*chosen, shapes[index]], index, free - size_of(shapes[index])):
                    return False
        return True

    return found if extend([], 0, num_ranks) else None


def _constructed(scorer: Scorer, shapes: Sequence[Shape], num_ranks: int, max_pipelines: int) -> Iterator[Layout]:
    uniform = [scorer.score(Layout.of({shape: min(num_ranks // size_of(shape), max_pipelines)})) for shape in shapes]
    yield from (score.layout for score in uniform)
    knapsack = Knapsack(scorer, shapes, num_ranks)
    yield knapsack.fill(num_ranks)
    by_latency = sorted(uniform, key=lambda s: (s.latency_s, s.service_s))[:NUM_BASES]
    by_service = sorted(uniform, key=lambda s: s.service_s)[: NUM_BASES // 3]
    by_throughput = sorted(uniform, key=lambda s: -s.throughput_per_s)[: NUM_BASES // 3]
    fast = [score.layout.main for score in by_service]
    for score in dict.fromkeys([*by_latency, *by_service, *by_throughput]):
        yield from _around(scorer, score.layout, fast, set(shapes), num_ranks, knapsack)


def _around(
    scorer: Scorer, base: Layout, fast: Sequence[Shape], shapes: set[Shape], num_ranks: int, knapsack: Knapsack
) -> Iterator[Layout]:
    """`base`, which is of one shape, with other pipelines on leftover ranks."""
    ((shape, number),) = base.counts
    size = size_of(shape)
    leftover = num_ranks - base.num_ranks
    deeper = (shape[0] + 1, shape[1])
    num_deeper = min(number, leftover // shape[1])
    if num_deeper and deeper in shapes:
        yield Layout.of({shape: number - num_deeper, deeper: num_deeper})
    for other in fast:
        if other != shape and leftover >= size_of(other):
            yield base.plus(Layout.of({other: leftover // size_of(other)}))
    numbers = np.arange(number + 1)
    total_per_s = numbers * scorer.throughput_per_s(shape) + knapsack.throughput_per_s[num_ranks - numbers * size]
    keep = {number, number - 1, number - 2}
    for load in LOADS:
        enough = np.flatnonzero(total_per_s >= scorer.arrivals_per_s / load)
        keep |= {int(enough[-1])} if len(enough) else set()
    for kept in sorted(keep):
        if kept >= 0:
            yield Layout.of({shape: kept}).plus(knapsack.fill(num_ranks - kept * size))
