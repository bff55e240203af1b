"""The figures of a run. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from loadtest.simulator.result import Fate, Outcome, Result
from loadtest.simulator.scenario import Scenario


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """In seconds; NaN is not used: a set without values is None where one may be missing."""

    mean: float
    p50: float
    p90: float
    p95: float
    p96: float
    p97: float
    p98: float
    p99: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    policy: str
    scenario: str
    num_completed: int
    num_unfinished: int
    num_lost: int
    oldest_unfinished_s: float
    """Age of the oldest unfinished request; 0 if there is none."""
    latency: Percentiles | None
    """Of all requests; those that are unfinished or lost count with their age, which is less than they would take."""
    completed_latency: Percentiles | None
    """Of completed requests only: the artifact's way, which flatters who cannot keep up."""
    ttft: Percentiles | None
    """Time to first token, of requests that have one."""
    token_gap: Percentiles | None
    """Mean time between tokens of each request that has more than one."""
    longest_gap: Percentiles | None
    """Longest time between two tokens of each request that has more than one."""
    usd: float
    usd_per_output_token: float | None
    """All output tokens, of unfinished requests too."""
    usd_per_token: float | None
    """Input and output tokens of completed requests, as the artifact counts."""
    usd_per_completed: float | None
    num_pauses: int
    """Changes that interrupted a sequence."""
    mean_pause_s: float
    longest_pause_s: float
    moved_bytes: int
    tokens_recomputed: int


def summarize(result: Result, scenario: Scenario) -> Summary:
    """Raises ValueError if `result` is of another scenario."""
    if result.scenario != scenario.name or len(result.outcomes) != len(scenario.requests):
        raise ValueError(
            f"result of {result.scenario!r} with {len(result.outcomes)} requests, not of {scenario.name!r}"
        )
    outcomes = result.outcomes
    completed = [o for o in outcomes if o.fate is Fate.COMPLETED]
    unfinished = [o for o in outcomes if o.fate is Fate.UNFINISHED]
    streams = [o for o in outcomes if o.first_token_s is not None and o.tokens_done > 1]
    pauses_s = [p.pause_s for p in result.pauses if p.pause_s > 0]
    num_output = sum(o.tokens_done for o in outcomes)
    num_tokens = sum(o.prompt_tokens + o.tokens_done for o in completed)
    return Summary(
        policy=result.policy,
        scenario=result.scenario,
        num_completed=len(completed),
        num_unfinished=len(unfinished),
        num_lost=len(outcomes) - len(completed) - len(unfinished),
        oldest_unfinished_s=max((o.latency_s for o in unfinished), default=0.0),
        latency=percentiles([o.latency_s for o in outcomes]),
        completed_latency=percentiles([o.latency_s for o in completed]),
        ttft=percentiles([o.first_token_s - o.arrival_s for o in outcomes if o.first_token_s is not None]),
        token_gap=percentiles([_mean_gap_s(o) for o in streams if o.fate is Fate.COMPLETED]),
        longest_gap=percentiles([o.longest_gap_s for o in streams]),
        usd=result.cost_usd,
        usd_per_output_token=result.cost_usd / num_output if num_output else None,
        usd_per_token=result.cost_usd / num_tokens if num_tokens else None,
        usd_per_completed=result.cost_usd / len(completed) if completed else None,
        num_pauses=len(pauses_s),
        mean_pause_s=math.fsum(pauses_s) / len(pauses_s) if pauses_s else 0.0,
        longest_pause_s=max(pauses_s, default=0.0),
        moved_bytes=sum(p.moved_bytes for p in result.pauses),
        tokens_recomputed=sum(o.tokens_recomputed for o in outcomes),
    )


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """The p-th is sorted[int(n * p / 100)], as in the artifact; None of no values."""
    if not values:
        return None
    ordered = sorted(values)

    def at(percent: int) -> float:
        return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]

    return Percentiles(
        mean=math.fsum(ordered) / len(ordered),
        **{f"p{percent}": at(percent) for percent in (50, 90, 95, 96, 97, 98, 99)},
    )


def _mean_gap_s(outcome: Outcome) -> float:
    assert outcome.first_token_s is not None, "it has tokens"
    return (outcome.ended_s - outcome.first_token_s) / (outcome.tokens_done - 1)
