"""The verdict says in words what the figures say."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from loadtest.simulator import verdict
from loadtest.simulator.metrics import Percentiles, Summary
from loadtest.simulator.tables import money


def times(mean: float, p99: float) -> Percentiles:
    return Percentiles(mean=mean, p50=mean, p90=p99, p95=p99, p96=p99, p97=p99, p98=p99, p99=p99)


OURS = Summary(
    policy="spotserve",
    scenario="small",
    num_completed=100,
    num_unfinished=0,
    num_lost=0,
    oldest_unfinished_s=0.0,
    latency=times(10.0, 30.0),
    completed_latency=times(10.0, 30.0),
    ttft=times(1.0, 2.0),
    token_gap=times(0.1, 0.2),
    longest_gap=times(1.0, 2.0),
    usd=6.4,
    usd_per_output_token=5e-5,
    usd_per_token=1e-5,
    usd_per_completed=0.064,
    num_pauses=2,
    mean_pause_s=1.5,
    longest_pause_s=2.5,
    moved_bytes=120_000_000_000,
    tokens_recomputed=77,
)


def other(policy: str = "on-demand", **fields: Any) -> Summary:
    return msgspec.structs.replace(OURS, policy=policy, **fields)


def test_ours_first_with_price_latency_and_what_changes_did():
    sentences = verdict.of_policies([other(), OURS])
    assert sentences[0] == (
        "spotserve completes all 100 requests, at 10.00 USD per million tokens; latency 10.0 s on average, "
        "30.0 s at P99."
    )
    assert sentences[1] == (
        "2 changes of the fleet interrupted requests, for 1.5 s on average and 2.5 s at most; 120 GB were moved and "
        "77 tokens computed again."
    )


def test_others_are_compared():
    beside = verdict.of_policies([OURS, other(usd_per_token=2e-5, latency=times(9.0, 15.0))])[2]
    assert beside == (
        "Beside on-demand (20.00 USD per million tokens): spotserve's cost is 50 % lower, "
        "its mean latency is 11 % higher, its P99 is 2.0 times that."
    )


def test_small_differences_are_none():
    beside = verdict.of_policies([OURS, other(usd_per_token=1.01e-5)])[2]
    assert "spotserve's cost is the same, its mean latency is the same, its P99 is the same." in beside


def test_what_is_not_done_is_said():
    bad = other(num_completed=90, num_unfinished=7, num_lost=3, oldest_unfinished_s=61.0)
    assert "it leaves 10 requests undone" in verdict.of_policies([OURS, bad])[2]
    alone = verdict.of_policies([bad])[0]
    assert "completes 90 of 100 requests, leaves 7 unfinished (the oldest 61 s old) and loses 3, at" in alone


def test_nothing_completed_has_no_price():
    nothing = other(usd_per_token=None, usd_per_completed=None, num_completed=0, num_unfinished=100)
    sentences = verdict.of_policies([OURS, nothing])
    assert "Beside on-demand (6.40 USD, nothing completed): spotserve's mean latency" in sentences[2]


def test_no_interruption_is_good_news():
    calm = msgspec.structs.replace(OURS, num_pauses=0)
    assert verdict.of_policies([calm])[1] == "No change of the fleet interrupted a running request."


@pytest.mark.parametrize(("usd", "text"), [(None, "-"), (0.0, "0.00"), (12.345, "12.35"), (0.01234, "0.0123")])
def test_money(usd: float | None, text: str):
    assert money(usd) == text
