"""The layouts that were weighed, with what they promise and why they lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from planner.core.config_optimizer import Choice, Supply
from planner.core.cost_model import CostModel
from planner.core.layout import Layout, Score, Scorer, Shape, size_of
from planner.protocol import Alternative, ParallelConfig

MAX_ALTERNATIVES: Final = 16


def list_alternatives(
    costs: CostModel, choice: Choice, chosen: Score | None, why: str, supply: Supply, usd_per_instance_h: float = 0.0
) -> list[Alternative]:
    """The chosen one; the best of each other shape, and the present one if it was given up; then what is ruled out."""
    scorer = Scorer(costs)
    best_of: dict[Shape, Score] = {}
    for score in sorted(choice.weighed, key=lambda s: (s.latency_s, -s.throughput_per_s, s.service_s)):
        best_of.setdefault(score.layout.main, score)
    rivals: list[Score | None] = [
        choice.best,
        choice.stay,
        *sorted(best_of.values(), key=lambda s: (s.latency_s, s.service_s)),
    ]
    rejected = [s for s in dict.fromkeys(rivals) if chosen is not None and s is not None and s.layout != chosen.layout]

    def describe(score: Score, verdict: str) -> Alternative:
        config, *others = score.layout.configs(costs)
        return Alternative(
            config=config,
            others=others,
            latency_s=round(score.latency_s if score.keeps_up else score.service_s, 4),
            throughput_per_s=round(score.throughput_per_s, 4),
            num_ranks=score.layout.num_ranks,
            usd_per_h=round(supply.num_instances(score.layout) * usd_per_instance_h, 4),
            verdict=verdict,
        )

    refused = [
        describe(scorer.score(Layout.of({shape: supply.num_ranks // size_of(shape)})), verdict)
        for shape, verdict in list(choice.refused.items())[: MAX_ALTERNATIVES // 4]
    ]
    misfits = [_misfit(costs, shape) for shape in choice.misfits]
    ruled_out = (refused + misfits)[: MAX_ALTERNATIVES if chosen is None else MAX_ALTERNATIVES // 4]
    if chosen is None:
        return ruled_out
    listed = [
        describe(score, _verdict(score, chosen, supply, costs.workload.arrivals_per_s))
        for score in rejected[: MAX_ALTERNATIVES - 1 - len(ruled_out)]
    ]
    return [describe(chosen, f"chosen: {why}"), *listed, *ruled_out]


def _verdict(rejected: Score, chosen: Score, supply: Supply, arrivals_per_s: float) -> str:
    saved = supply.extra_instances(rejected.layout) - supply.extra_instances(chosen.layout)
    against = _against(rejected, chosen)
    if not rejected.keeps_up and chosen.keeps_up:
        return f"does not keep up with {arrivals_per_s:.2f} requests/s; {against}"
    return f"{saved} instances more; {against}" if saved > 0 else against


def _against(rejected: Score, chosen: Score) -> str:
    is_comparable = rejected.keeps_up and chosen.keeps_up
    latency_of: Callable[[Score], float] = (lambda s: s.latency_s) if is_comparable else (lambda s: s.service_s)
    latency = latency_of(rejected) / latency_of(chosen) - 1
    throughput = rejected.throughput_per_s / chosen.throughput_per_s - 1
    return f"latency {latency:+.0%}, throughput {throughput:+.0%} against the chosen one"


def _misfit(costs: CostModel, shape: Shape) -> Alternative:
    return Alternative(
        config=ParallelConfig(data=1, pipeline=shape[0], tensor=shape[1], max_batch=0),
        latency_s=0.0,
        throughput_per_s=0.0,
        num_ranks=size_of(shape),
        verdict=(
            f"does not fit: {costs.weight_bytes(*shape) / 1e6:.0f} MB of weights a rank and KV of "
            f"{costs.model.max_model_len} tokens, in {costs.memory_bytes / 1e6:.0f} MB"
        ),
    )
