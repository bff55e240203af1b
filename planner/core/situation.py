"""All that a decision depends on, and what follows from it directly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from planner.core.config_optimizer import Targets
from planner.core.cost_model import CostModel, Factors, Workload
from planner.core.fleet import Rank
from planner.core.layout import Layout, Shape
from planner.core.links import Links, uniform_links
from planner.core.profile import Profile
from planner.core.setbacks import RefusedShape
from planner.protocol import ModelShape, Pipeline, Plan, Retiring, StepProfile

SHORT_NOTICE_S: Final = 30.0
"""With so much time left beyond what handing over takes, an instance under notice is planned away. It is the usual
notice of clouds: one that is longer buys service, not safety."""
MORE_MEMORY: Final = 1.1
"""Ranks with so much more than one that refused a shape are another kind: they may take it."""
CALM_S: Final = 300.0
"""Expected time to the next event where nobody has watched the fleet."""


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelShape
    profile: Profile | StepProfile | None
    ranks: Mapping[str, Rank]
    """Of all living instances, those under notice included."""
    targets: Targets
    workload: Workload
    last: Plan | None
    cause: str
    cause_at_s: float
    excluded_ranks: frozenset[str] = frozenset()
    """Get no position for now: they failed to prepare too often."""
    refused_shapes: Mapping[Shape, RefusedShape] = {}
    """Not planned for now, unless nothing else is possible: ranks failed to prepare them too often."""
    suspects: frozenset[str] = frozenset()
    """Ranks that `refused_shapes` failed on: they come last."""
    ruined: frozenset[str] = frozenset()
    """Pipelines of the last plan that must be built anew although their ranks live."""
    settled: frozenset[str] = frozenset()
    """Pipelines of the last plan whose ranks are all prepared, or run."""
    untouched: frozenset[str] = frozenset()
    """Pipelines of the last plan for which no rank has prepared yet: nothing to retire."""
    open_retirements: tuple[Retiring, ...] = ()
    """Pipelines that earlier plans retire and that have not stopped yet."""
    revivable: frozenset[str] = frozenset()
    """Those of `open_retirements` that nobody has asked to stop yet."""
    links: Links | None = None
    """None: as the profile measured."""
    buffer_bytes: int | None = 0
    """What a migration may receive on a rank before it releases anything, see `CostModel`."""
    step_tokens: int = 0
    """Rows of the largest step, see `CostModel`."""
    corrections: Factors | None = None
    """What measured steps say of the profile."""
    expected_calm_s: float = CALM_S
    """Expected time to the next event of the fleet: a change must repay its pause until then."""
    num_ranks_per_instance: int = 1
    usd_per_rank_h: float = 0.0
    """Mean price of a rank; 0: the prices are not known."""
    can_release: bool = False
    """Instances without a position are given back, so that using fewer saves money."""
    num_paid_instances: int = 0
    """Where `can_release`: so many are kept whether they are used or not (the desired capacity with candidates)."""
    reviews_notices: bool = False
    """The caller decides again at `review_at_s`: until then instances with a long notice serve on."""

    def find_links(self) -> Links:
        """Those given, or what the profile measured."""
        return self.links if self.links is not None else uniform_links(self.costs(0).profile.transfer_bytes_per_s)

    def costs(self, memory_bytes: int) -> CostModel:
        """Of configurations on ranks with `memory_bytes` each."""
        return CostModel(
            self.model,
            self.profile,
            memory_bytes,
            self.workload,
            self.targets.max_batch,
            buffer_bytes=self.buffer_bytes,
            step_tokens=self.step_tokens,
            corrections=self.corrections,
        )

    def refusals(self, memory_bytes: int) -> dict[Shape, str]:
        """Shapes that ranks of about this memory cannot take for now, and why."""
        return {
            shape: f"not tried for now, it failed on {refused.why}"
            for shape, refused in self.refused_shapes.items()
            if memory_bytes < MORE_MEMORY * refused.memory_bytes
        }

    def is_intact(self, pipeline: Pipeline) -> bool:
        """All its ranks live, and are the processes that they were when it was planned."""
        return pipeline.id not in self.ruined and all(self._is_same(rank) for rank in pipeline.ranks())

    def _is_same(self, name: str) -> bool:
        rank = self.ranks.get(name)
        known = self.last.addresses.get(name) if self.last is not None else None
        return rank is not None and known is not None and known.context_address == rank.inventory.context_address

    def intact_pipelines(self) -> list[Pipeline]:
        """Those of the last plan with most KV first, then those that it retires and that nobody has stopped."""

        def by_kv(pipeline: Pipeline) -> tuple[int, int]:
            return -self.kv_tokens(pipeline), number_of(pipeline)

        current = sorted(self.last.pipelines, key=by_kv) if self.last is not None else []
        revivable = [r.pipeline for r in self.open_retirements if r.pipeline.id in self.revivable]
        return [p for p in [*current, *sorted(revivable, key=by_kv)] if self.is_intact(p)]

    def kv_tokens(self, pipeline: Pipeline) -> int:
        """Tokens of its live sequences."""
        leader = self.ranks.get(pipeline.leader)
        return leader.inventory.kv_tokens if leader is not None else 0

    def deadlines(self, pipelines: Iterable[Pipeline]) -> dict[str, float]:
        """By instance under notice that `pipelines` use."""
        members = [self.ranks[name] for pipeline in pipelines for name in pipeline.ranks() if name in self.ranks]
        return {rank.instance: rank.deadline_s for rank in members if rank.deadline_s is not None}

    def lasting(self, ranks: Iterable[Rank], now_s: float) -> list[Rank]:
        """Those not under notice, or with so long left that it pays to use them until `review_at_s`."""
        handover_s = self._handover_s() if self.reviews_notices else math.inf
        return [rank for rank in ranks if rank.deadline_s is None or now_s < rank.deadline_s - handover_s]

    def review_at_s(self, now_s: float) -> float:
        """When to decide again although nothing happens: a long notice has become a short one. Infinite: never."""
        if all(rank.deadline_s is None for rank in self.ranks.values()):
            return math.inf
        handover_s = self._handover_s()
        ends_s = (rank.deadline_s - handover_s for rank in self.ranks.values() if rank.deadline_s is not None)
        return min((end_s for end_s in ends_s if end_s > now_s), default=math.inf)

    def _handover_s(self) -> float:
        """Before a deadline: a short notice, and what another rank needs to pull all that one holds."""
        model = self.model
        held_bytes = (
            sum(
                (units.last_group - units.first_group + 1)
                * sum(model.unit_bytes(layer) for layer in range(units.first_layer, units.last_layer + 1))
                for units in rank.inventory.units
            )
            for rank in self.ranks.values()
        )
        return SHORT_NOTICE_S + max(held_bytes, default=0) / self.find_links().inter_bytes_per_s


def shape_of(pipeline: Pipeline) -> Shape:
    """Its numbers of stages and shards."""
    return len(pipeline.stages), pipeline.tensor


def layout_of(pipelines: Iterable[Pipeline]) -> Layout:
    """Their shapes."""
    return Layout.of(shape_of(pipeline) for pipeline in pipelines)


def number_of(pipeline: Pipeline) -> int:
    """What its id counts: later pipelines have greater numbers."""
    return int(pipeline.id.removeprefix("p"))


def without_conflicts(pipelines: Iterable[Pipeline]) -> list[Pipeline]:
    """Drop a pipeline that wants a rank of an earlier one."""
    chosen, taken = [], set[str]()
    for pipeline in pipelines:
        if taken.isdisjoint(pipeline.ranks()):
            chosen.append(pipeline)
            taken.update(pipeline.ranks())
    return chosen
