"""The planner's cost model as the simulator's clockwork: what a step of each shape takes, and which shape is best."""

from __future__ import annotations

import math
from collections.abc import Collection

import msgspec

from loadtest.errors import SimulationError
from loadtest.simulator.pipelines import MAX_STEP_TOKENS
from loadtest.simulator.scenario import CapacityTrace, Scenario
from planner.core.cost_model import CostModel, Workload
from planner.core.layout import feasible_shapes
from planner.protocol import Market, ParallelConfig


def cost_model(scenario: Scenario) -> CostModel:
    """For the mean of the requests."""
    requests = scenario.requests
    num = max(1, len(requests))
    span_s = min(scenario.trace.end_s, requests[-1].arrival_s) if requests else 0.0
    num_inside = sum(r.arrival_s <= span_s for r in requests)
    workload = Workload(
        arrivals_per_s=num_inside / span_s if span_s > 0 else 0.0,
        prompt_tokens=sum(r.prompt_tokens for r in requests) / num if requests else 512.0,
        output_tokens=sum(r.output_tokens for r in requests) / num if requests else 128.0,
    )
    return CostModel(scenario.model, scenario.profile, scenario.memory_bytes, workload, scenario.max_batch)


def best_config(scenario: Scenario, num_ranks: int, arrivals_per_s: float | None = None) -> ParallelConfig | None:
    """Equal pipelines on up to `num_ranks` ranks, for the mean of the arrivals or `arrivals_per_s`.

    The least latency among those that keep up, else the most throughput. None: the model does not fit.
    """
    costs = cost_model(scenario)
    if arrivals_per_s is not None:
        costs.workload = msgspec.structs.replace(costs.workload, arrivals_per_s=arrivals_per_s)
    estimates = [
        estimate
        for tensor in costs.tensor_degrees()
        for pipeline in range(1, min(num_ranks // tensor, scenario.model.num_layers) + 1)
        if (estimate := costs.estimate(num_ranks // (pipeline * tensor), pipeline, tensor)) is not None
    ]
    best = min(estimates, key=lambda e: (e.latency_s, -e.throughput_per_s), default=None)
    return best.config if best is not None else None


def lone_request_s(scenario: Scenario) -> float:
    """Latency of the quickest request, with the pipeline of least latency for itself: no policy serves any one sooner.

    Infinite if the model fits into no pipeline, however many ranks it has.
    """
    costs = cost_model(scenario)
    shapes, _ = feasible_shapes(costs, scenario.model.num_layers * max(costs.tensor_degrees(), default=1))
    lengths = {(request.prompt_tokens, request.output_tokens) for request in scenario.requests}
    times = [ShapeTimes(costs, *shape) for shape in shapes]
    return min((one.alone_s(*pair) for one in times for pair in lengths), default=math.inf)


def best_shape_of_smallest_fleet(scenario: Scenario) -> tuple[int, int]:
    """(pipeline, tensor) that serves at every point of the trace at which any shape does.

    Raises SimulationError if the model fits at no point.
    """
    sizes = fleet_sizes(scenario.trace)
    for num_instances in sizes:
        config = best_config(scenario, num_instances * scenario.ranks_per_instance)
        if config is not None:
            return config.pipeline, config.tensor
    raise does_not_fit(scenario, sizes[-1])


def fleet_sizes(trace: CapacityTrace, markets: Collection[Market] = tuple(Market)) -> list[int]:
    """How many usable instances of `markets` there are at any time before the end; ascending, each number once."""
    market_of = {name: event.market for event in trace.events for name in event.added}
    num, sizes = 0, set[int]()
    for index, event in enumerate(trace.events):
        num += sum(market_of[name] in markets for name in event.added)
        num -= sum(market_of[name] in markets for name in event.removed)
        is_last_then = index + 1 == len(trace.events) or trace.events[index + 1].at_s > event.at_s
        if is_last_then and event.at_s < trace.end_s:
            sizes.add(num)
    return sorted(sizes) or [0]


def does_not_fit(scenario: Scenario, num_instances: int) -> SimulationError:
    """On the largest fleet of the trace."""
    ranks = num_instances * scenario.ranks_per_instance
    each = f"{scenario.memory_bytes / 1e9:.1f} GB each"
    return SimulationError(f"{scenario.name}: {scenario.model.name} does not fit on {ranks} ranks with {each}")


class ShapeTimes:
    """Of one (pipeline, tensor) shape."""

    def __init__(self, costs: CostModel, pipeline: int, tensor: int) -> None:
        self._costs = costs
        self._pipeline = pipeline
        self._tensor = tensor

    def step_s(self, num_decoding: int, prefill_tokens: int, context_tokens: float) -> float:
        return (
            self._costs.step_ms(
                self._pipeline,
                self._tensor,
                num_decoding=num_decoding,
                prefill_tokens=prefill_tokens,
                context_tokens=context_tokens,
            )
            / 1000
        )

    def prefill_s(self, num_tokens: int) -> float:
        """A prompt of `num_tokens` alone, in the engine's chunks."""
        num_full, rest = divmod(num_tokens, MAX_STEP_TOKENS * self._pipeline)
        full_s = self.step_s(0, MAX_STEP_TOKENS * self._pipeline, 0.0) if num_full else 0.0
        return num_full * full_s + (self.step_s(0, rest, 0.0) if rest else 0.0)

    def alone_s(self, prompt_tokens: int, output_tokens: int) -> float:
        """A whole request alone; the time of a step is linear in the context."""
        num_steps = output_tokens - 1
        return self.prefill_s(prompt_tokens) + num_steps * self.step_s(1, 0, prompt_tokens + num_steps / 2)
