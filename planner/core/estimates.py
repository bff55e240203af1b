"""The cost model of the live fleet: a given or a measured profile, corrected by the steps that leaders report."""

from __future__ import annotations

import contextlib
from collections.abc import Collection

from planner.core.cost_model import CostModel, Workload
from planner.core.fleet import Fleet
from planner.core.profile import Profile
from planner.core.refine import Corrections
from planner.core.situation import shape_of
from planner.errors import ProfileError
from planner.protocol import ModelShape, Pipeline, RankInventory, StepProfile


class Estimates:
    def __init__(self, given: Profile | None, fleet: Fleet, max_batch: int) -> None:
        """`given`: None: what the instances of `fleet` have measured."""
        self._given = given
        self._fleet = fleet
        self._max_batch = max_batch
        self.corrections = Corrections()
        self._memory_bytes = 0
        """Of the smallest rank, from when there last was one."""

    def profile(self) -> Profile | StepProfile | None:
        """Of the first living instance that has one: decisions must not change with the order of messages."""
        if self._given is not None:
            return self._given
        return next(
            (
                instance.inventory.profile
                for _, instance in sorted(self._fleet.instances.items())
                if instance.is_alive and instance.inventory is not None and instance.inventory.profile is not None
            ),
            None,
        )

    def costs(self, model: ModelShape, workload: Workload) -> CostModel:
        """On the smallest rank that there is, or was last."""
        ranks = self._fleet.ranks().values()
        self._memory_bytes = min((rank.inventory.memory_bytes for rank in ranks), default=self._memory_bytes)
        return CostModel(
            model, self.profile(), self._memory_bytes, workload, self._max_batch, corrections=self.corrections
        )

    def note_measured_step(
        self, rank: RankInventory, pipeline: Pipeline, model: ModelShape, workload: Workload
    ) -> None:
        """`rank` leads `pipeline` and may have measured steps of it."""
        if rank.measured_step is None:
            return
        with contextlib.suppress(ProfileError):  # make_plan says so too, and is heard
            costs = CostModel(model, self.profile(), rank.memory_bytes, workload, self._max_batch)
            self.corrections = self.corrections.noted(pipeline.id, shape_of(pipeline), rank.measured_step, costs)

    def forget_all_but(self, pipelines: Collection[str]) -> None:
        """The others no longer exist; what they taught stays."""
        self.corrections = self.corrections.without(set(self.corrections.num_steps) - set(pipelines))
