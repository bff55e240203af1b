"""Choose the layout for the ranks that exist, or could be had (SpotServe's Algorithm 1).

Among the layouts that keep up with the arrivals, the least latency; if none does, the most throughput. With a latency
target (SLO): of those that meet it the cheapest, else the least latency. Near-ties go to the cheapest, which is the
one with fewest instances beyond those that are paid for anyway; ranks that exist and cannot be given back cost
nothing more, so among equally cheap ones the one with most throughput wins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

import msgspec

from planner.core.cost_model import CostModel
from planner.core.layout import NOTHING, Layout, Score, Scorer, Shape, feasible_shapes, size_of
from planner.core.layout_search import fewest_pipelines, filled, weigh
from planner.protocol import ParallelConfig

NEAR_TIE: Final = 0.05
SAME_THROUGHPUT: Final = 0.10


class Objective(StrEnum):
    LATENCY = "latency"
    THROUGHPUT = "throughput"
    SLO = "slo"
    """Meet `Targets.latency_s`, then the least cost."""


class Targets(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator asks for. A degree means: this many when the fleet can supply it, else the closest below.

    Raises ValueError where the objective is SLO and there is no latency target.
    """

    data: int | None = None
    pipeline: int | None = None
    tensor: int | None = None
    objective: Objective = Objective.LATENCY
    max_batch: int = 16
    latency_s: float | None = None
    """Mean latency of a typical request, queueing included; for the objective SLO."""

    def __post_init__(self) -> None:
        if self.objective is Objective.SLO and (self.latency_s is None or not self.latency_s > 0):
            raise ValueError(f"latency_s: the objective slo needs a latency above 0, not {self.latency_s}")


class Supply(msgspec.Struct, frozen=True, kw_only=True):
    """Ranks that there are, or could be."""

    num_ranks: int
    num_ranks_per_instance: int = 1
    num_paid_instances: int | None = None
    """Paid for whether they are used or not; None: all of them."""

    def extra_instances(self, layout: Layout) -> int:
        """Instances that `layout` costs beyond those that are paid for anyway."""
        if self.num_paid_instances is None:
            return 0
        return max(0, self.num_instances(layout) - self.num_paid_instances)

    def num_instances(self, layout: Layout) -> int:
        return -(-layout.num_ranks // max(1, self.num_ranks_per_instance))


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    config: ParallelConfig | None
    """Of the pipelines that most ranks of the best layout serve in; None if there is none."""
    best: Score | None
    """None: the model does not fit on these ranks."""
    why: str
    stay: Score | None
    """The best that lets all present pipelines run on; None if there are none, or the targets forbid it."""
    weighed: list[Score]
    refused: dict[Shape, str]
    """Shapes that the targets or the ranks rule out, and why."""
    misfits: list[Shape]
    """Shapes that the model does not fit in."""


def choose_layout(
    costs: CostModel,
    supply: Supply,
    targets: Targets,
    present: Layout = NOTHING,
    scorer: Scorer | None = None,
    refusals: Mapping[Shape, str] = MappingProxyType({}),
) -> Choice:
    """Weigh the layouts on up to `supply.num_ranks` ranks; `present` is what serves now, on some of them.

    `refusals`: shapes that the ranks cannot take although the model fits in them, and why.
    """
    scorer = scorer or Scorer(costs)
    fitting, misfits = feasible_shapes(costs, supply.num_ranks)
    shapes, refused = _nearest_to_targets([shape for shape in fitting if shape not in refusals], targets)
    refused = {shape: refusals[shape] for shape in fitting if shape in refusals} | refused
    weighed = _nearest_to_data(weigh(scorer, shapes, supply.num_ranks, targets.data), targets)
    weighed += _smaller_ones(scorer, shapes, weighed, supply, targets)
    best, why = pick(weighed, supply, targets) if weighed else (None, "")
    stay = None
    if best is not None and present.counts and set(shapes).issuperset(shape for shape, _ in present.counts):
        wanted = best.layout.num_pipelines if targets.data is not None else None
        staying = filled(scorer, shapes, present, supply.num_ranks, wanted or supply.num_ranks)
        staying = [s for s in staying if wanted is None or s.layout.num_pipelines == wanted]
        stay = pick(staying, supply, targets)[0] if staying else None
    if stay is not None and best is not None and pick([best, stay], supply, targets)[0] is stay:
        best = stay
    return Choice(
        config=best.layout.configs(costs)[0] if best is not None else None,
        best=best,
        why=why,
        stay=stay,
        weighed=weighed,
        refused=refused,
        misfits=misfits,
    )


def choose_config(costs: CostModel, num_ranks: int, targets: Targets) -> Choice:
    """`choose_layout` for a fleet that does not serve yet."""
    return choose_layout(costs, Supply(num_ranks=num_ranks), targets)


def pick(scores: Iterable[Score], supply: Supply, targets: Targets) -> tuple[Score, str]:
    """The best of at least one by the objective, and why."""
    scores = list(scores)
    enough = [s for s in scores if s.keeps_up]
    if targets.objective is Objective.THROUGHPUT or not enough:
        why = "most throughput" if enough else "none keeps up with the arrivals: most throughput"
        limit_per_s = (1 - NEAR_TIE) * max(s.throughput_per_s for s in scores)
        near = [s for s in scores if s.throughput_per_s >= limit_per_s]
        return min(near, key=lambda s: (s.service_s, -s.throughput_per_s, *_order(s.layout))), why
    if targets.objective is Objective.SLO:
        assert targets.latency_s is not None, "Targets checks it"
        meeting = [s for s in enough if s.latency_s <= targets.latency_s]
        if meeting:
            fewest = min(supply.extra_instances(s.layout) for s in meeting)
            cheapest = [s for s in meeting if supply.extra_instances(s.layout) == fewest]
            return _least_latency(cheapest, supply), f"cheapest of those with a latency up to {targets.latency_s:g} s"
        why = f"none has a latency up to {targets.latency_s:g} s: least latency"
        return _least_latency(enough, supply), why
    why = "least latency of those that keep up with the arrivals; of near-ties the cheapest, then most throughput"
    return _least_latency(enough, supply), why


def _least_latency(enough: list[Score], supply: Supply) -> Score:
    limit_s = _near_s(enough)
    near = [s for s in enough if s.latency_s <= limit_s]
    fewest = min(supply.extra_instances(s.layout) for s in near)
    near = [s for s in near if supply.extra_instances(s.layout) == fewest]
    limit_per_s = (1 - SAME_THROUGHPUT) * max(s.throughput_per_s for s in near)
    near = [s for s in near if s.throughput_per_s >= limit_per_s]
    return min(near, key=lambda s: (s.latency_s, -s.throughput_per_s, *_order(s.layout)))


def _near_s(enough: Iterable[Score]) -> float:
    return (1 + NEAR_TIE) * min(s.latency_s for s in enough)


def _order(layout: Layout) -> tuple[int, int, tuple[tuple[Shape, int], ...]]:
    """Among equals: few different shapes, few ranks; the rest makes the decision repeatable."""
    return len(layout.counts), layout.num_ranks, layout.counts


def _nearest_to_targets(shapes: list[Shape], targets: Targets) -> tuple[list[Shape], dict[Shape, str]]:
    """Of each degree that has a target, only the value closest to it (from below, if there is one below).

    The tensor degree is the hardest to change: it is first.
    """
    refused: dict[Shape, str] = {}
    for name, index, target in (("tensor", 1, targets.tensor), ("pipeline", 0, targets.pipeline)):
        if target is None or not shapes:
            continue
        nearest = _nearest({shape[index] for shape in shapes}, target)
        why = f"the operator asks for {name} {target}; {nearest} is the closest"
        refused |= {shape: why for shape in shapes if shape[index] != nearest}
        shapes = [shape for shape in shapes if shape[index] == nearest]
    return shapes, refused


def _nearest_to_data(scores: list[Score], targets: Targets) -> list[Score]:
    if targets.data is None or not scores:
        return scores
    nearest = _nearest({s.layout.num_pipelines for s in scores}, targets.data)
    return [s for s in scores if s.layout.num_pipelines == nearest]


def _nearest(values: set[int], target: int) -> int:
    below = [value for value in values if value <= target]
    return max(below) if below else min(values)


def _smaller_ones(
    scorer: Scorer, shapes: list[Shape], weighed: list[Score], supply: Supply, targets: Targets
) -> list[Score]:
    """Where instances can be saved: of each shape the fewest pipelines that are good enough."""
    enough = [s for s in weighed if s.keeps_up]
    saves = supply.num_paid_instances is not None and targets.data is None
    if not saves or not enough or targets.objective is Objective.THROUGHPUT:
        return []
    limit_s = _near_s(enough)
    if targets.objective is Objective.SLO and targets.latency_s is not None:
        limit_s = targets.latency_s if any(s.latency_s <= targets.latency_s for s in enough) else limit_s

    def is_enough(score: Score) -> bool:
        return score.latency_s <= limit_s

    found = [fewest_pipelines(scorer, s, supply.num_ranks // size_of(s), is_enough) for s in shapes]
    known = {s.layout for s in weighed}
    return [score for score in found if score is not None and score.layout not in known]
