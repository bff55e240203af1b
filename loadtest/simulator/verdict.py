"""What an operator should take away from a simulation, in plain sentences with figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from loadtest.simulator.metrics import Summary
from loadtest.simulator.scenario import Scenario
from loadtest.simulator.tables import money
from loadtest.simulator.what_if import Fit, FleetRow, describe_gib

OURS: Final = "spotserve"
SAME: Final = 0.03
"""Differences below it are called none."""


def of_policies(summaries: Sequence[Summary]) -> list[str]:
    """How `spotserve` did, and then each other policy beside it; of runs without it, how each one did."""
    ours = next((summary for summary in summaries if summary.policy == OURS), None)
    if ours is None:
        return [_alone(summary) for summary in summaries]
    others = [_beside(other, ours) for other in summaries if other is not ours]
    return [_alone(ours), _of_changes(ours), *others]


def of_fleet(fit: Fit, rows: Sequence[FleetRow], scenario: Scenario, arrivals_per_s: float) -> list[str]:
    """Where the model fits, and whether the trace's fleets can do the work."""
    instances = -(-fit.num_ranks // scenario.ranks_per_instance)
    sentences = [
        (
            f"{scenario.model.name} needs at least {_many(fit.num_ranks, 'GPU')} ({_many(instances, 'instance')}): "
            f"{_many(fit.pipeline, 'stage')}, tensor degree {fit.tensor}, {describe_gib(fit.rank_bytes)} of "
            f"{describe_gib(scenario.memory_bytes)} on each before KV."
        )
    ]
    too_small = sum(row.share for row in rows if row.score is None or not row.score.keeps_up)
    if too_small == 0:
        sentences.append(f"Every fleet of the trace can serve {arrivals_per_s:.2g} requests/s.")
    else:
        sentences.append(
            f"For {too_small * 100:.0f} % of the trace the fleet is too small for {arrivals_per_s:.2g} requests/s: "
            "requests wait then, or on-demand instances must help."
        )
    return sentences


def _alone(summary: Summary) -> str:
    num = summary.num_completed + summary.num_unfinished + summary.num_lost
    done = f"completes all {num} requests" if summary.num_completed == num else _fates(summary, num)
    if summary.latency is None:
        return f"{summary.policy} is given no request."
    return (
        f"{summary.policy} {done}, at {_price(summary)}; latency {summary.latency.mean:.1f} s on average, "
        f"{summary.latency.p99:.1f} s at P99."
    )


def _fates(summary: Summary, num: int) -> str:
    parts = [f"completes {summary.num_completed} of {num} requests"]
    if summary.num_unfinished:
        parts.append(f"leaves {summary.num_unfinished} unfinished (the oldest {summary.oldest_unfinished_s:.0f} s old)")
    if summary.num_lost:
        parts.append(f"loses {summary.num_lost}")
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _of_changes(summary: Summary) -> str:
    if not summary.num_pauses:
        return "No change of the fleet interrupted a running request."
    return (
        f"{_many(summary.num_pauses, 'change')} of the fleet interrupted requests, for {summary.mean_pause_s:.1f} s on "
        f"average and {summary.longest_pause_s:.1f} s at most; {summary.moved_bytes / 1e9:.0f} GB were moved and "
        f"{summary.tokens_recomputed} tokens computed again."
    )


def _beside(other: Summary, ours: Summary) -> str:
    parts = [_cost(other.usd_per_token, ours.usd_per_token)]
    if other.latency is not None and ours.latency is not None:
        parts.append(f"mean latency is {_compared(other.latency.mean, ours.latency.mean)}")
        parts.append(f"P99 is {_compared(other.latency.p99, ours.latency.p99)}")
    missing = other.num_unfinished + other.num_lost
    tail = f"; it leaves {_many(missing, 'request')} undone" if missing else ""
    return (
        f"Beside {other.policy} ({_price(other)}): {OURS}'s "
        + ", its ".join(part for part in parts if part)
        + tail
        + "."
    )


def _cost(other: float | None, ours: float | None) -> str:
    return "" if other is None or ours is None else f"cost is {_compared(other, ours)}"


def _compared(other: float, ours: float) -> str:
    """`40 % lower`."""
    change = ours / other - 1 if other else 0.0
    if abs(change) < SAME:
        return "the same"
    if change < 0:
        return f"{-change * 100:.0f} % lower"
    return f"{change * 100:.0f} % higher" if change < 1 else f"{ours / other:.1f} times that"


def _price(summary: Summary) -> str:
    if summary.usd_per_token is None:
        return f"{summary.usd:.2f} USD, nothing completed"
    return f"{money(summary.usd_per_token * 1e6)} USD per million tokens"


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
