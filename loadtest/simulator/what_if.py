"""Before anything is rented: where the model fits, what each fleet size of a trace could do, and a verdict in words."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from loadtest.errors import InputError
from loadtest.simulator.scenario import CapacityTrace, Prices
from planner.core.config_optimizer import Objective, Supply, Targets, choose_layout
from planner.core.cost_model import CostModel
from planner.core.layout import Score
from planner.protocol import Market, ModelShape


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """The smallest number of ranks that hold the model with one sequence of the greatest length."""

    num_ranks: int
    pipeline: int
    tensor: int
    rank_bytes: int
    """Weights, activations and migration buffer of the rank that holds most."""


class FleetRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a fleet of one size is expected to do; `score` None: the model does not fit on it."""

    num_instances: int
    share: float
    """Of the trace's time that the fleet has this size."""
    score: Score | None
    usd_per_h: float
    usd_per_million_tokens: float | None
    """On spot, at the arrivals of the scenario; None where they are more than it can serve."""


def weights_bytes(model: ModelShape) -> int:
    """Weights of the whole model, once."""
    layers = model.layers_of_stage(0, model.num_layers - 1)
    return model.num_head_groups * sum(model.unit_bytes(layer) for layer in layers)


def smallest_fit(costs: CostModel, max_ranks: int) -> Fit | None:
    """Among shapes of up to `max_ranks`; of several, the one with the smallest tensor degree."""
    for tensor, pipeline in sorted(_shapes(costs, max_ranks), key=lambda shape: (shape[0] * shape[1], shape)):
        if costs.num_kv_blocks(pipeline, tensor) > 0:
            return Fit(
                num_ranks=pipeline * tensor,
                pipeline=pipeline,
                tensor=tensor,
                rank_bytes=costs.reserved_bytes(pipeline, tensor),
            )
    return None


def check_fit(costs: CostModel, trace: CapacityTrace, ranks_per_instance: int) -> Fit:
    """Raises InputError if the model fits on no fleet of the trace; it says how much memory would do."""
    if not costs.tensor_degrees():
        degrees = ", ".join(str(degree) for degree in sorted(costs.profile.degrees))
        problem = f"none of {degrees} divides the {costs.model.num_head_groups} head groups of {costs.model.name}"
        raise InputError(f"profile {costs.profile.name}", None, "degrees", problem)
    max_ranks = max((size for size, _ in fleet_sizes(trace)), default=0) * ranks_per_instance
    found = smallest_fit(costs, max_ranks)
    if found is not None:
        return found
    if max_ranks == 0:
        raise InputError(trace.name, None, "fleet", "the trace never has an instance")
    shapes = _shapes(costs, max_ranks) or [(min(costs.tensor_degrees()), 1)]
    needed = min(_needed_bytes(costs, pipeline, tensor) for tensor, pipeline in shapes)
    enough = smallest_fit(costs, costs.model.num_layers * costs.model.num_head_groups)
    remedy = f"; or {enough.num_ranks} ranks of this memory" if enough else ""
    raise InputError(
        trace.name,
        None,
        "fleet",
        f"{costs.model.name} fits on no fleet of this trace: its largest one has {max_ranks} ranks of "
        f"{describe_gib(costs.memory_bytes)}, and every rank would need {describe_gib(needed)} for weights, "
        f"activations, a migration buffer and one sequence of {costs.model.max_model_len} tokens{remedy}",
    )


def fleet_sizes(trace: CapacityTrace) -> list[tuple[int, float]]:
    """(instances, share of the trace's time), by size."""
    alive: set[str] = set()
    lengths: dict[int, float] = {}
    times = [*(event.at_s for event in trace.events), trace.end_s]
    for event, next_s in zip(trace.events, times[1:], strict=True):
        alive = (alive | set(event.added)) - set(event.removed)
        until_s = min(next_s, trace.end_s)
        if until_s > event.at_s:
            lengths[len(alive)] = lengths.get(len(alive), 0.0) + until_s - event.at_s
    total_s = sum(lengths.values())
    return [(size, lengths[size] / total_s) for size in sorted(lengths)]


def fleet_rows(
    costs: CostModel, targets: Targets, trace: CapacityTrace, ranks_per_instance: int, prices: Prices
) -> list[FleetRow]:
    """What the planner would choose for each fleet size of the trace, at the workload of `costs`."""
    rows = []
    for size, share in fleet_sizes(trace):
        score = _best(costs, targets, size, ranks_per_instance)
        usd_per_h = size * prices.per_h(Market.SPOT)
        keeps_up = score is not None and score.keeps_up
        rows.append(
            FleetRow(
                num_instances=size,
                share=share,
                score=score,
                usd_per_h=usd_per_h,
                usd_per_million_tokens=_usd_per_million_tokens(costs, usd_per_h) if keeps_up else None,
            )
        )
    return rows


def sensible_arrivals_per_s(costs: CostModel, trace: CapacityTrace, ranks_per_instance: int) -> float:
    """60 % of what the median fleet of the trace can serve: the load assumed where none is given."""
    targets = Targets(objective=Objective.THROUGHPUT, max_batch=costs.max_batch)
    throughputs = []
    for size, share in fleet_sizes(trace):
        score = _best(costs, targets, size, ranks_per_instance)
        throughputs.append((score.throughput_per_s if score else 0.0, share))
    return float(f"{0.6 * _weighted_median(throughputs):.2g}")


def describe_gib(num_bytes: float) -> str:
    """`14.2 GiB`."""
    return f"{num_bytes / 2**30:.1f} GiB"


def _best(costs: CostModel, targets: Targets, num_instances: int, ranks_per_instance: int) -> Score | None:
    supply = Supply(num_ranks=num_instances * ranks_per_instance, num_ranks_per_instance=ranks_per_instance)
    return choose_layout(costs, supply, targets).best if num_instances else None


def _shapes(costs: CostModel, max_ranks: int) -> list[tuple[int, int]]:
    """(tensor, pipeline) of all pipelines of up to `max_ranks` ranks."""
    return [
        (tensor, pipeline)
        for tensor in costs.tensor_degrees()
        for pipeline in range(1, min(costs.model.num_layers, max_ranks // tensor) + 1)
    ]


def _needed_bytes(costs: CostModel, pipeline: int, tensor: int) -> int:
    model = costs.model
    most_layers = max(last - first + 1 for first, last in costs.stages(pipeline))
    kv_bytes_per_token = most_layers * model.num_head_groups // tensor * model.kv_unit_bytes_per_token
    return costs.reserved_bytes(pipeline, tensor) + costs.min_kv_blocks * model.kv_block_tokens * kv_bytes_per_token


def _usd_per_million_tokens(costs: CostModel, usd_per_h: float) -> float | None:
    workload = costs.workload
    tokens_per_h = workload.arrivals_per_s * (workload.prompt_tokens + workload.output_tokens) * 3600
    return usd_per_h / tokens_per_h * 1e6 if tokens_per_h > 0 else None


def _weighted_median(values: Sequence[tuple[float, float]]) -> float:
    reached = 0.0
    for value, weight in sorted(values):
        reached += weight
        if reached >= 0.5:
            return value
    return 0.0
