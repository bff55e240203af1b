"""Choose the parallel configuration for the ranks that exist (SpotServe's Algorithm 1).

Among the configurations that keep up with the arrivals, the least latency; if none does, the most throughput.
Ranks that exist are paid for, so among nearly equal latencies the one with most throughput wins. A shape that serves
is kept unless another one is clearly better.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

from planner.core.cost_model import CostModel, Estimate
from planner.protocol import Alternative, ParallelConfig

NEAR_TIE: Final = 0.05
MIN_GAIN: Final = 0.10
"""Gain in latency or throughput that is worth changing the shape of pipelines that serve."""
MAX_ALTERNATIVES: Final = 16


class Objective(StrEnum):
    LATENCY = "latency"
    THROUGHPUT = "throughput"


class Targets(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator asks for. A degree means: this many when the fleet can supply it, else the closest below."""

    data: int | None = None
    pipeline: int | None = None
    tensor: int | None = None
    objective: Objective = Objective.LATENCY
    max_batch: int = 16


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    config: ParallelConfig | None
    """None: the model does not fit on these ranks."""
    alternatives: list[Alternative]
    """The chosen one first."""


def choose_config(costs: CostModel, num_ranks: int, targets: Targets, present: tuple[int, int] | None = None) -> Choice:
    """Weigh all (D, P, M) on up to `num_ranks` ranks; `present` is the (pipeline, tensor) shape that serves now."""
    verdicts: dict[tuple[int, int, int], str] = {}
    estimates = _enumerate(costs, num_ranks, verdicts)
    wanted = _nearest_to_targets(estimates, targets, verdicts)
    if not wanted:
        return Choice(config=None, alternatives=_misfits(verdicts))
    chosen, why = _best(wanted, targets.objective, costs.workload.arrivals_per_s)
    same_shape = [e for e in wanted if (e.config.pipeline, e.config.tensor) == present]
    if same_shape and (chosen.config.pipeline, chosen.config.tensor) != present:
        kept, _ = _best(same_shape, targets.objective, costs.workload.arrivals_per_s)
        if not _clearly_better(chosen, kept):
            verdicts[_key(chosen)] = f"better, but by less than {MIN_GAIN:.0%}: not worth a change of shape"
            chosen, why = kept, "the present shape, and no other is clearly better"
    return Choice(config=chosen.config, alternatives=_alternatives(chosen, why, estimates, verdicts))


def _enumerate(costs: CostModel, num_ranks: int, verdicts: dict[tuple[int, int, int], str]) -> list[Estimate]:
    estimates = []
    for tensor in range(1, min(num_ranks, costs.model.num_head_groups) + 1):
        if costs.model.num_head_groups % tensor:
            continue
        for pipeline in range(1, min(num_ranks // tensor, costs.model.num_layers) + 1):
            if costs.num_kv_blocks(pipeline, tensor) == 0:
                need_bytes = costs.weight_bytes(pipeline, tensor)
                verdicts[1, pipeline, tensor] = (
                    f"does not fit: {need_bytes / 1e6:.0f} MB of weights a rank and KV of {costs.model.max_model_len} "
                    f"tokens, in {costs.memory_bytes / 1e6:.0f} MB"
                )
                continue
            for data in range(1, num_ranks // (pipeline * tensor) + 1):
                estimate = costs.estimate(data, pipeline, tensor)
                assert estimate is not None, "num_kv_blocks said that it fits"
                estimates.append(estimate)
    return estimates


def _nearest_to_targets(
    estimates: list[Estimate], targets: Targets, verdicts: dict[tuple[int, int, int], str]
) -> list[Estimate]:
    """Of each degree that has a target, only the value closest to it (from below, if there is one below).

    The tensor degree is the hardest to change, the number of pipelines the easiest: that is the order.
    """
    for field, target in (("tensor", targets.tensor), ("pipeline", targets.pipeline), ("data", targets.data)):
        if target is None or not estimates:
            continue
        values = {getattr(e.config, field) for e in estimates}
        below = [value for value in values if value <= target]
        nearest = max(below) if below else min(values)
        for estimate in estimates:
            if getattr(estimate.config, field) != nearest:
                verdicts[_key(estimate)] = f"the operator asks for {field} {target}; {nearest} is the closest"
        estimates = [e for e in estimates if getattr(e.config, field) == nearest]
    return estimates


def _best(estimates: list[Estimate], objective: Objective, arrivals_per_s: float) -> tuple[Estimate, str]:
    enough = [e for e in estimates if e.throughput_per_s >= arrivals_per_s and e.latency_s != float("inf")]
    if objective is Objective.LATENCY and enough:
        limit_s = (1 + NEAR_TIE) * min(e.latency_s for e in enough)
        near = [e for e in enough if e.latency_s <= limit_s]
        best = min(near, key=lambda e: (-e.throughput_per_s, e.latency_s, e.config.num_ranks))
        return best, "least latency of those that keep up with the arrivals; most throughput of nearly equal ones"
    limit_per_s = (1 - NEAR_TIE) * max(e.throughput_per_s for e in estimates)
    near = [e for e in estimates if e.throughput_per_s >= limit_per_s]
    best = min(near, key=lambda e: (e.service_s, -e.throughput_per_s, e.config.num_ranks))
    why = "most throughput" if objective is Objective.THROUGHPUT else "none keeps up with the arrivals: most throughput"
    return best, why


def _clearly_better(chosen: Estimate, kept: Estimate) -> bool:
    latency_gain = 1 - chosen.service_s / kept.service_s
    throughput_gain = chosen.throughput_per_s / kept.throughput_per_s - 1
    return latency_gain >= MIN_GAIN or throughput_gain >= MIN_GAIN


def _alternatives(
    chosen: Estimate, why: str, estimates: list[Estimate], verdicts: dict[tuple[int, int, int], str]
) -> list[Alternative]:
    """The chosen one, then the largest D of each other shape, then what does not fit."""
    largest: dict[tuple[int, int], Estimate] = {}
    for estimate in estimates:
        largest[estimate.config.pipeline, estimate.config.tensor] = estimate
    largest.pop((chosen.config.pipeline, chosen.config.tensor), None)
    rejected = [
        _alternative(e, verdicts.get(_key(e)) or _comparison(e, chosen))
        for e in sorted(largest.values(), key=lambda e: e.service_s)
    ]
    return [_alternative(chosen, f"chosen: {why}"), *rejected, *_misfits(verdicts)][:MAX_ALTERNATIVES]


def _comparison(rejected: Estimate, chosen: Estimate) -> str:
    latency = rejected.service_s / chosen.service_s - 1
    throughput = rejected.throughput_per_s / chosen.throughput_per_s - 1
    return f"latency {latency:+.0%}, throughput {throughput:+.0%} against the chosen one"


def _alternative(estimate: Estimate, verdict: str) -> Alternative:
    return Alternative(
        config=estimate.config,
        latency_s=round(estimate.service_s, 4),
        throughput_per_s=round(estimate.throughput_per_s, 4),
        num_ranks=estimate.config.num_ranks,
        verdict=verdict,
    )


def _misfits(verdicts: dict[tuple[int, int, int], str]) -> list[Alternative]:
    return [
        Alternative(
            config=ParallelConfig(data=data, pipeline=pipeline, tensor=tensor, max_batch=0),
            latency_s=0.0,
            throughput_per_s=0.0,
            num_ranks=data * pipeline * tensor,
            verdict=verdict,
        )
        for (data, pipeline, tensor), verdict in verdicts.items()
        if verdict.startswith("does not fit")
    ]


def _key(estimate: Estimate) -> tuple[int, int, int]:
    return estimate.config.data, estimate.config.pipeline, estimate.config.tensor
