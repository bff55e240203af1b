"""What the baselines share: pipelines of one shape, whose weights come from disk, and that end with their instances."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Final

from loadtest.simulator.clock import Clock
from loadtest.simulator.ledger import Ledger
from loadtest.simulator.pipelines import Limits, Pipeline
from loadtest.simulator.policies.base import OnProgress
from loadtest.simulator.policies.cloud import START_S
from loadtest.simulator.policies.step_times import ShapeTimes, cost_model
from loadtest.simulator.scenario import Scenario
from loadtest.simulator.service import Service

PROGRESS_S: Final = 10.0
STALLED_S: Final = 900.0
"""After the end of the trace: nothing has been served for so long, so nothing will be."""


class FixedShapeRun:
    """One run of pipelines of `pipeline` stages by `tensor` shards."""

    def __init__(self, scenario: Scenario, shape: tuple[int, int], on_progress: OnProgress) -> None:
        self.scenario = scenario
        self.shape = shape
        self.clock = Clock(START_S)
        self.service = Service(self.clock, scenario.requests, scenario.model.max_model_len)
        self.ledger = Ledger(self.clock, scenario)
        self._on_progress = on_progress
        self._costs = cost_model(scenario)
        self._times = ShapeTimes(self._costs, *shape)
        self._limits = Limits(
            max_batch=self._costs.batch(*shape),
            num_kv_blocks=self._costs.num_kv_blocks(*shape),
            block_tokens=scenario.model.kv_block_tokens,
            num_stages=shape[0],
        )

    def run(self) -> None:
        """Until all requests have ended, or the scenario has."""
        self._report_progress()
        end_s = self.scenario.trace.end_s
        self.clock.run(end_s + self.scenario.drain_s, self._goes_on)
        self.clock.now_s = max(self.clock.now_s, end_s)

    def _goes_on(self) -> bool:
        end_s = self.scenario.trace.end_s
        if self.clock.now_s < end_s:
            return True
        is_stalled = not self.service.pipelines and self.clock.now_s > end_s + STALLED_S
        return self.service.num_open > 0 and not is_stalled

    def _report_progress(self) -> None:
        self._on_progress(max(0.0, self.clock.now_s))
        self.clock.at(self.clock.now_s + PROGRESS_S, self._report_progress)

    # --- Pipelines ---

    def serve(self, name: str, deadline_s: float = math.inf, on_idle: Callable[[], None] | None = None) -> None:
        """A pipeline of that name serves from now on; `on_idle` whenever some of its requests have ended."""

        def on_change() -> None:
            self.service.dispatch()
            if on_idle is not None:
                on_idle()

        pipeline = Pipeline(self.clock, name, self._times, self._limits, self.service.on_done, on_change)
        self.service.add(pipeline, deadline_s if deadline_s < math.inf else None)
        self.service.advertise(self.scenario.model)
        self.sample()

    def fail(self, names: Iterable[str], cause: str) -> None:
        """They lost an instance: their requests begin again elsewhere."""
        change = self.ledger.change(cause)
        failed = [self.service.pipelines[name] for name in names if name in self.service.pipelines]
        for pipeline in failed:  # none of them may get the others' requests
            pipeline.takes_requests = False
        for pipeline in failed:
            self.service.break_off(pipeline, change, from_scratch=True)
        self.sample()

    def sample(self) -> None:
        self.ledger.sample([self.shape] * len(self.service.pipelines))

    # --- Weights ---

    def position_bytes(self) -> list[int]:
        """Weights of each position, stage by stage, shard by shard."""
        model, (pipeline, tensor) = self.scenario.model, self.shape
        return [
            model.num_head_groups // tensor * sum(model.unit_bytes(layer) for layer in model.layers_of_stage(*stage))
            for stage in self._costs.stages(pipeline)
            for _ in range(tensor)
        ]
