import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.arranger import (
    KvMove,
    choose_kv_moves,
    execution_time,
    steps_before_acquisition,
    steps_before_preemption,
    steps_before_stop,
)
from engine.core.scheduler import CostEstimate, Scheduler, SchedulerLimits
from engine.protocol import GenerateRequest, KvHolder, SamplingParams

HOLDER = KvHolder(rank="r", context_address="", first_layer=0, last_layer=0, first_group=0, last_group=0)

# Multiples of 1/64 s: sums and products are exact, so that brute force and the formula see the same numbers.
ticks_s = st.integers(0, 4000).map(lambda n: n / 64)
step_times_s = st.integers(1, 64).map(lambda n: n / 64)


@st.composite
def execution_times(draw):
    """A prefill, then steps that get no faster as the context grows."""
    step_s = sorted(draw(st.lists(step_times_s, min_size=8, max_size=8)))
    prefill_s = draw(ticks_s)
    return lambda steps: prefill_s + sum(step_s[:steps]) if steps else 0.0


@given(execution_s=execution_times(), most=st.integers(0, 8), left_s=ticks_s, migration_s=ticks_s)
def test_preemption_takes_the_most_steps_that_leave_time_to_migrate(execution_s, most, left_s, migration_s):
    fitting = [steps for steps in range(most + 1) if execution_s(steps) < left_s - migration_s]
    assert steps_before_preemption(execution_s, most, left_s, migration_s) == max(fitting, default=0)


@given(execution_s=execution_times(), most=st.integers(0, 8), ready_in_s=ticks_s)
def test_acquisition_takes_the_fewest_steps_that_last_until_it_is_ready(execution_s, most, ready_in_s):
    lasting = [steps for steps in range(most + 1) if execution_s(steps) >= ready_in_s]
    assert steps_before_acquisition(execution_s, most, ready_in_s) == min(lasting, default=most)


def test_a_prefill_comes_before_the_first_step_only():
    execution_s = execution_time(step_s=0.5, prefill_s=2.0)
    assert [execution_s(steps) for steps in (0, 1, 4)] == [0.0, 2.5, 4.0]


def test_what_was_arranged_and_resumed_is_arranged_again():
    """Cut at 100 of 128 steps, resumed without its prefill, cut again: each time by what is left."""
    first = steps_before_preemption(execution_time(0.1, prefill_s=1.0), 128, left_s=14.0, migration_s=2.95)
    assert first == 100
    second = steps_before_preemption(execution_time(0.1), 128 - first, left_s=5.0, migration_s=2.95)
    assert second == 20
    assert steps_before_preemption(execution_time(0.1), 128 - first - second, left_s=30.0, migration_s=2.95) == 8


@given(now_s=ticks_s, grace_s=ticks_s, migration_s=ticks_s, margin_s=ticks_s, step_s=step_times_s)
def test_stop_leaves_room_for_the_migration(now_s, grace_s, migration_s, margin_s, step_s):
    deadline_s = now_s + grace_s
    most = 0
    while now_s + (most + 1) * step_s + migration_s + margin_s < deadline_s:
        most += 1
    assert steps_before_stop(now_s, deadline_s, migration_s, step_s, margin_s) == most


def test_acquisition_stops_at_once():
    assert steps_before_stop(100.0, None, 2.0, 0.1, 0.5) == 0


def test_too_late_stops_at_once():
    assert steps_before_stop(100.0, 102.0, migration_s=2.0, step_s=0.1, margin_s=0.5) == 0
    assert steps_before_stop(100.0, 90.0, migration_s=0.0, step_s=0.1, margin_s=0.0) == 0


@pytest.mark.parametrize("step_s", [0.0, -1.0, float("nan")])
def test_step_time_must_be_positive(step_s):
    with pytest.raises(ValueError, match="step_s"):
        steps_before_stop(100.0, 130.0, 2.0, step_s, 0.5)


def ready_s(sequences, moving, rate, prefill_s, latency_s):
    return max(
        sum(latency_s + s.num_bytes / rate for s in sequences if s.id in moving),
        sum(s.num_tokens * prefill_s for s in sequences if s.id not in moving),
    )


@given(
    lengths=st.lists(st.integers(1, 500), max_size=6),
    rate=st.sampled_from([1e3, 1e4, 1e5, 1e6]),
    latency_s=st.sampled_from([0.0, 0.1]),
    left_s=st.sampled_from([math.inf, 5.0, 0.5]),
)
def test_moves_are_as_good_as_any_and_end_in_time(lengths, rate, latency_s, left_s):
    sequences = [KvMove(n, length, length * 100) for n, length in enumerate(lengths)]
    moving = choose_kv_moves(sequences, rate, 0.01, left_s, latency_s=latency_s)
    assert sum(latency_s + s.num_bytes / rate for s in sequences if s.id in moving) <= left_s
    best_s = min(
        ready_s(sequences, set(chosen), rate, 0.01, latency_s)
        for count in range(len(lengths) + 1)
        for chosen in combinations(range(len(lengths)), count)
        if sum(latency_s + sequences[n].num_bytes / rate for n in chosen) <= left_s
    )
    assert ready_s(sequences, moving, rate, 0.01, latency_s) == pytest.approx(best_s)


def test_both_ways_work_side_by_side():
    equal = [KvMove(name, 100, 1000) for name in "abcd"]
    assert len(choose_kv_moves(equal, kv_bytes_per_s=1000.0, prefill_s_per_token=0.01)) == 2
    assert len(choose_kv_moves(equal, kv_bytes_per_s=3000.0, prefill_s_per_token=0.01)) == 3
    busy = choose_kv_moves(equal, 1000.0, 0.01, link_busy_s=9.0)
    assert busy == set()
    assert choose_kv_moves(equal, 1000.0, 0.01, prefill_busy_s=9.0) == set("abcd")


@given(lengths=st.lists(st.integers(1, 500), min_size=9, max_size=40), rate=st.sampled_from([1e4, 1e5]))
def test_many_moves_are_nearly_balanced(lengths, rate):
    sequences = [KvMove(n, length, length * 100) for n, length in enumerate(lengths)]
    moving = choose_kv_moves(sequences, rate, 0.01)
    # If any sequence could be divided, both ways would end at once.
    ideal_s = sum(lengths) / (rate / 100 + 100)
    assert ready_s(sequences, moving, rate, 0.01, 0.0) <= ideal_s + 0.01 * max(lengths)


def test_always_and_never():
    sequences = [KvMove("a", 5, 50), KvMove("b", 0, 0)]
    assert choose_kv_moves(sequences, 1.0, math.inf) == {"a"}
    assert choose_kv_moves(sequences, 1.0, math.inf, left_s=1.0) == set()
    assert choose_kv_moves([*sequences, KvMove("c", 4, 40)], 1.0, math.inf, left_s=60.0) == {"a"}, "as many as can"
    assert choose_kv_moves(sequences, 1e12, 0.0, latency_s=0.005) == set()


def test_a_resumed_sequence_is_cut_and_resumed_again_on_live_pipelines():
    """Each pipeline commits as many steps as its arrangement leaves, and hands its KV on; nothing is computed twice."""
    committed: list[int] = []
    source, num_computed = None, 0
    for pipeline, left_s in enumerate([14.0, 5.0, 30.0]):
        scheduler = Scheduler(SchedulerLimits(64, 16, 4, 512), CostEstimate(1.0, 1e9, 0.0, 1), f"p{pipeline}")
        sampling = SamplingParams(max_tokens=128)
        request = GenerateRequest(
            request_id="a",
            gateway="g",
            attempt=pipeline,
            prompt_ids=[1, 2, 3],
            committed_ids=committed,
            sampling=sampling,
            kv_source=source,
        )
        assert scheduler.submit(request, 0.0).accepted
        for order in scheduler.tick(0.0)[0]:
            scheduler.pull_done(order.key, True, 0.1, 0.0)
        for _ in range(steps_before_preemption(execution_time(0.1), 128, left_s, migration_s=2.95)):
            step = scheduler.schedule(0.0)
            if step is not None:
                num_computed += len(step.slices[0].token_ids)
                scheduler.commit(step.step_id, [len(committed) + 5], 0.0)
                committed = [*committed, len(committed) + 5]
        scheduler.drain()
        for out in scheduler.park("preempted", [HOLDER], None):
            assert out.entry.interruption is not None
            source = out.entry.interruption.kv_source
        scheduler.check_invariants()
    assert committed == list(range(5, 133))
    assert num_computed == 3 + 127
