"""Percentiles, and the matching of gaps to the events that caused them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import ResumeStats
from loadtest.pauses import (
    Event,
    Gap,
    Heard,
    Kind,
    StreamLog,
    gaps_within,
    longest_gap,
    longest_untouched_gaps,
    pauses_of,
    percentile,
    spread,
)
from planner.protocol import Explanation, ModelShape, Phase, Plan, RankProgress

MODEL = ModelShape(
    name="m",
    num_layers=2,
    num_head_groups=1,
    decoder_unit_bytes=1,
    embedding_unit_bytes=1,
    head_unit_bytes=1,
    kv_unit_bytes_per_token=1,
    kv_block_tokens=16,
    max_model_len=64,
    hidden_bytes_per_token=1,
    tied_embeddings=True,
)


def plan(epoch: int, cause: str, cause_at_s: float, decided_at_s: float) -> Plan:
    explanation = Explanation(
        cause=cause,
        cause_at_s=cause_at_s,
        decided_at_s=decided_at_s,
        arrivals_per_s=0.0,
        num_ranks=2,
        chosen=None,
        alternatives=[],
    )
    return Plan(
        epoch=epoch,
        model=MODEL,
        pipelines=[],
        retiring=[],
        transfers={},
        addresses={},
        explanation=explanation,
        next_pipeline_number=1,
    )


def event(kind: Kind = Kind.KILL, at_s: float = 10.0, until_s: float = 20.0) -> Event:
    return Event(kind=kind, instance="i1", at_s=at_s, until_s=until_s)


def log(name: str, *times_s: float) -> StreamLog:
    return StreamLog(request_id=name, num_tokens=len(times_s), chunk_times_s=list(times_s))


def test_percentile_is_the_nearest_rank() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [percentile(values, p) for p in (0, 50, 90, 99, 100)] == [1.0, 50.0, 90.0, 99.0, 100.0]
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([3.0, 1.0, 2.0], 99) == 3.0
    assert percentile([], 50) is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 100))
def test_percentile_is_a_value_that_enough_do_not_exceed(values: list[float], percent: float) -> None:
    found = percentile(values, percent)
    assert found is not None
    assert found in values
    assert sum(value <= found for value in values) * 100 >= percent * len(values) * (1 - 1e-9)
    smaller = [value for value in values if value < found]
    # The next smaller value would leave out too many.
    assert not smaller or len(smaller) * 100 < percent * len(values) * (1 + 1e-9)


def test_spread_of_nothing() -> None:
    assert spread([]).num == 0
    assert spread([]).p99_s is None


def test_the_longest_gap_overlaps_the_window() -> None:
    times_s = [0.0, 5.0, 6.0, 8.0, 8.5, 20.0]
    assert longest_gap(times_s, 5.5, 8.2) == Gap(6.0, 8.0)
    assert longest_gap(times_s, 8.5, 9.0) == Gap(8.5, 20.0)
    assert longest_gap([1.0], 0.0, 2.0) is None
    assert longest_gap(times_s, 20.0, 30.0) is None


def test_undisturbed_gaps_lie_wholly_in_a_window() -> None:
    assert gaps_within([0.0, 1.0, 2.0, 4.0, 4.5, 6.0], [(0.5, 2.5), (4.0, 5.0)]) == [1.0, 0.5]


def test_a_kill_is_split_into_its_parts() -> None:
    heard = Heard(
        plans=[(10.25, plan(2, "instance i1 lost: gone", 10.1, 10.2))],
        progress=[
            (
                10.3,
                RankProgress(
                    rank="i2-0", epoch=2, pipeline="p2", phase=Phase.PREPARED, at_s=10.3, pull_s=0.02, regroup_s=0.01
                ),
            )
        ],
        resumes=[(11.0, "a", ResumeStats(recomputed_tokens=40, waited_s=0.5))],
    )
    (pause,) = pauses_of(event(), [log("a", 9.0, 9.9, 11.1, 11.2)], heard)
    assert pause.pause_s == pytest.approx(1.2)
    assert pause.recomputed_tokens == 40
    parts = pause.parts
    assert parts.arrange_s is None
    found = (parts.since_token_s, parts.detect_s, parts.plan_s, parts.publish_s, parts.hand_over_s, parts.first_token_s)
    assert found == pytest.approx((0.1, 0.1, 0.1, 0.05, 0.25, 0.6))
    assert parts.transfer_s == 0.0
    assert sum(value for value in found if value is not None) == pytest.approx(pause.pause_s)
    assert (parts.weights_s, parts.regroup_s) == (0.02, 0.01)


def test_a_notice_is_split_into_its_parts() -> None:
    heard = Heard(
        plans=[(10.01, plan(2, "i1 will be preempted in 5.0 s", 10.0, 10.0))],
        interruptions=[(13.1, "a")],
        resumes=[(13.5, "a", ResumeStats(pulled_tokens=40, pull_s=0.2, waited_s=0.3))],
    )
    (pause,) = pauses_of(event(Kind.NOTICE), [log("a", 12.9, 13.0, 13.6)], heard)
    parts = pause.parts
    assert parts.since_token_s is None
    found = (parts.arrange_s, parts.hand_over_s, parts.transfer_s, parts.first_token_s)
    assert found == pytest.approx((0.1, 0.1, 0.2, 0.2))
    assert sum(value for value in found if value is not None) == pytest.approx(pause.pause_s)


def test_other_streams_and_other_times_do_not_count() -> None:
    logs = [log("a", 9.9, 12.0), log("b", 9.9, 10.5), log("early", 5.0, 8.0), log("first token later", 15.0)]
    resumed = ResumeStats(recomputed_tokens=1, waited_s=0.1)
    heard = Heard(
        resumes=[
            (11.9, "a", resumed),
            (7.9, "early", resumed),
            (14.9, "first token later", resumed),
            (12.0, "somebody else's", resumed),
        ]
    )
    pauses = pauses_of(event(), logs, heard)
    assert [pause.request_id for pause in pauses] == ["a"]
    assert pauses[0].parts.detect_s is None
    assert longest_untouched_gaps(event(), logs, pauses) == [pytest.approx(0.6)]


def test_the_resume_that_ended_the_longest_gap_counts() -> None:
    heard = Heard(
        resumes=[
            (10.4, "a", ResumeStats(recomputed_tokens=1, waited_s=0.1)),
            (12.9, "a", ResumeStats(recomputed_tokens=2, waited_s=0.1)),
        ]
    )
    (pause,) = pauses_of(event(), [log("a", 9.9, 10.5, 13.0, 13.1)], heard)
    assert pause.recomputed_tokens == 2


def test_the_parts_are_those_of_the_gap_that_the_resume_ended() -> None:
    heard = Heard(
        interruptions=[(12.05, "a")],
        resumes=[(12.5, "a", ResumeStats(pulled_tokens=1, pull_s=0.1, waited_s=0.3))],
    )
    (pause,) = pauses_of(event(Kind.NOTICE), [log("a", 10.1, 11.9, 12.0, 12.6)], heard)
    assert pause.pause_s == pytest.approx(1.8)
    assert pause.parts.arrange_s == pytest.approx(0.05)
    assert pause.parts.first_token_s == pytest.approx(0.3)


def test_a_plan_for_another_cause_is_not_taken() -> None:
    heard = Heard(
        plans=[
            (10.1, plan(2, "arrivals changed", 10.05, 10.1)),
            (10.2, plan(3, "instance i1 lost: gone", 10.15, 10.2)),
        ],
        resumes=[(11.0, "a", ResumeStats(recomputed_tokens=1, waited_s=0.5))],
    )
    (pause,) = pauses_of(event(), [log("a", 9.9, 11.1)], heard)
    assert pause.parts.detect_s == pytest.approx(0.15)
