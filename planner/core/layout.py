"""Layouts: which pipelines run side by side, of equal shape or not, and what they give together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final, Self

import msgspec

from planner.core.cost_model import CostModel
from planner.core.queueing import pooled_wait_s
from planner.protocol import ParallelConfig

Shape = tuple[int, int]
"""(pipeline degree, tensor degree)"""


class Layout(msgspec.Struct, frozen=True):
    """A multiset of shapes."""

    counts: tuple[tuple[Shape, int], ...]
    """(shape, number of pipelines), ascending; every number is positive."""

    @classmethod
    def of(cls, counts: Mapping[Shape, int] | Iterable[Shape]) -> Self:
        return cls(tuple(sorted((shape, number) for shape, number in Counter(counts).items() if number > 0)))

    @property
    def num_ranks(self) -> int:
        return sum(number * size_of(shape) for shape, number in self.counts)

    @property
    def num_pipelines(self) -> int:
        return sum(number for _, number in self.counts)

    @property
    def main(self) -> Shape:
        """The shape that most ranks serve in."""
        return max(self.counts, key=lambda item: (item[1] * size_of(item[0]), item[1], item[0]))[0]

    def shapes(self) -> list[Shape]:
        """One entry a pipeline: those of the main shape first."""
        if not self.counts:
            return []
        main = self.main
        ordered = sorted(self.counts, key=lambda item: (item[0] != main, item[0]))
        return [shape for shape, number in ordered for _ in range(number)]

    def plus(self, other: Layout) -> Layout:
        return Layout.of(Counter(dict(self.counts)) + Counter(dict(other.counts)))

    def holds(self, other: Layout) -> bool:
        """It has all pipelines of `other`."""
        return not other.missing_from(self).counts

    def missing_from(self, other: Layout) -> Layout:
        """The pipelines of this layout that `other` lacks."""
        return Layout.of(Counter(dict(self.counts)) - Counter(dict(other.counts)))

    def configs(self, costs: CostModel) -> list[ParallelConfig]:
        """One for each shape, the main one first."""
        return [
            ParallelConfig(data=number, pipeline=shape[0], tensor=shape[1], max_batch=costs.batch(*shape))
            for shape, number in Counter(self.shapes()).items()
        ]

    def __str__(self) -> str:
        if not self.counts:
            return "no pipelines"
        parts = Counter(self.shapes()).items()
        return " and ".join(f"{_count(number, 'pipeline')} of {in_words(shape)}" for shape, number in parts)


def in_words(shape: Shape) -> str:
    """`2 stages x 1 shard`."""
    return f"{_count(shape[0], 'stage')} x {_count(shape[1], 'shard')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


NOTHING: Final = Layout(())


class Score(msgspec.Struct, frozen=True, kw_only=True):
    layout: Layout
    throughput_per_s: float
    latency_s: float
    """Mean over the arrivals; infinite where they exceed the throughput."""
    service_s: float
    """The same without queueing."""

    @property
    def keeps_up(self) -> bool:
        return self.latency_s != math.inf


class Scorer:
    """Latency and throughput of layouts for requests as in the workload of `costs`."""

    def __init__(self, costs: CostModel, arrivals_per_s: float | None = None) -> None:
        self.costs = costs
        self.arrivals_per_s = costs.workload.demand_per_s if arrivals_per_s is None else arrivals_per_s
        self._throughput_per_s: dict[Shape, float] = {}
        self._scores: dict[Layout, Score] = {}

    def throughput_per_s(self, shape: Shape) -> float:
        """Of one pipeline."""
        if shape not in self._throughput_per_s:
            self._throughput_per_s[shape] = self.costs.throughput_per_s(*shape)
        return self._throughput_per_s[shape]

    def score(self, layout: Layout) -> Score:
        """Arrivals go to the pipelines in proportion to their throughput, so all of them are equally busy."""
        if layout not in self._scores:
            self._scores[layout] = self._compute(layout)
        return self._scores[layout]

    def _compute(self, layout: Layout) -> Score:
        total_per_s = sum(number * self.throughput_per_s(shape) for shape, number in layout.counts)
        load = self.arrivals_per_s / total_per_s
        latency_s = service_s = 0.0
        for shape, number in layout.counts:
            one_per_s = self.throughput_per_s(shape)
            share = number * one_per_s / total_per_s
            served_s = self.costs.service_s(*shape, load * one_per_s)
            service_s += share * served_s
            if load < 1:
                alone_s = self.costs.latency_s(*shape, load * one_per_s)
                latency_s += share * (served_s + pooled_wait_s(alone_s - served_s, load, layout.num_pipelines))
        return Score(
            layout=layout,
            throughput_per_s=total_per_s,
            latency_s=latency_s if load < 1 else math.inf,
            service_s=service_s,
        )


def size_of(shape: Shape) -> int:
    """Ranks of one pipeline."""
    return shape[0] * shape[1]


def feasible_shapes(costs: CostModel, num_ranks: int) -> tuple[list[Shape], list[Shape]]:
    """The shapes on up to `num_ranks` ranks that the model fits in, and those that it does not fit in."""
    fitting: list[Shape] = []
    misfits: list[Shape] = []
    for tensor in costs.tensor_degrees():
        for pipeline in range(1, min(num_ranks // tensor, costs.model.num_layers) + 1):
            shapes = fitting if costs.num_kv_blocks(pipeline, tensor) > 0 else misfits
            shapes.append((pipeline, tensor))
    return fitting, misfits
