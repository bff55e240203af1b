"""Refines the cost model on line: how much slower or faster real steps are than the profile says, by shape.

A calibration measures one rank alone, for a moment; real steps meet neighbours, networks and other context lengths.
The ratio of measured to predicted step time is smoothed exponentially, one weight for each report that counts new
steps, so that a burst of slow steps fades. A shape that has never run is given the mean of those that have.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from planner.core.cost_model import CostModel
from planner.protocol import MeasuredStep

WEIGHT: Final = 0.3
"""Of the newest report."""
LEAST_FACTOR: Final = 0.2
MOST_FACTOR: Final = 5.0
"""Beyond these the measurement is wrong, or the profile is of something else: neither must decide alone."""
MIN_STEPS: Final = 8
"""Fewer new steps are left for the next report: the first ones of a pipeline warm it up."""


class Corrections(msgspec.Struct, frozen=True):
    """Factors of predicted step times, by (pipeline, tensor) degrees. A value: `noted` makes a new one."""

    factors: dict[tuple[int, int], float] = {}
    num_steps: dict[str, int] = {}
    """Steps of each pipeline (by id) that have been counted."""

    def factor(self, pipeline: int, tensor: int) -> float:
        """Of a shape that was never measured: the geometric mean of those that were, 1 if there are none."""
        known = self.factors.get((pipeline, tensor))
        if known is not None:
            return known
        if not self.factors:
            return 1.0
        return math.exp(math.fsum(math.log(factor) for factor in self.factors.values()) / len(self.factors))

    def noted(self, pipeline_id: str, shape: tuple[int, int], measured: MeasuredStep, costs: CostModel) -> Corrections:
        """After a report of the leader of `pipeline_id`, whose degrees are `shape`; the same object if it says nothing
        new. `costs` predicts without corrections.
        """
        counted = self.num_steps.get(pipeline_id, 0)
        if measured.num_steps < counted:
            counted = 0  # Its leader has been started again.
        if measured.num_steps - counted < MIN_STEPS or not 0 < measured.mean_step_ms < math.inf:
            return self
        predicted_ms = costs.step_ms(
            *shape, num_decoding=measured.num_sequences, context_tokens=measured.mean_context_tokens
        )
        if predicted_ms <= 0:
            return self
        ratio = min(MOST_FACTOR, max(LEAST_FACTOR, measured.mean_step_ms / predicted_ms))
        smoothed = (1 - WEIGHT) * self.factor(*shape) + WEIGHT * ratio
        return Corrections(
            {**self.factors, shape: smoothed},
            {**self.num_steps, pipeline_id: measured.num_steps},
        )

    def without(self, gone: set[str]) -> Corrections:
        """Forget the counts of pipelines that no longer exist; what they taught stays."""
        return Corrections(self.factors, {id_: count for id_, count in self.num_steps.items() if id_ not in gone})
