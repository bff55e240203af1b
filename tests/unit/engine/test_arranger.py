import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.arranger import steps_before_stop, stop_at_s

# Multiples of 1/64 s: sums and products are exact, so that brute force and the formula see the same numbers.
ticks_s = st.integers(0, 4000).map(lambda n: n / 64)


@given(
    now_s=ticks_s,
    grace_s=ticks_s,
    migration_s=ticks_s,
    margin_s=ticks_s,
    step_s=st.integers(1, 64).map(lambda n: n / 64),
)
def test_steps_are_the_most_that_leave_room_for_the_migration(now_s, grace_s, migration_s, margin_s, step_s):
    deadline_s = now_s + grace_s
    most = 0
    while now_s + (most + 1) * step_s + migration_s + margin_s <= deadline_s:
        most += 1
    assert steps_before_stop(now_s, deadline_s, migration_s, step_s, margin_s) == most


@given(now_s=ticks_s, deadline_s=ticks_s, migration_s=ticks_s, margin_s=ticks_s)
def test_stop_leaves_room_or_is_now(now_s, deadline_s, migration_s, margin_s):
    stop_s = stop_at_s(now_s, deadline_s, migration_s, margin_s)
    if now_s + migration_s + margin_s <= deadline_s:
        assert stop_s + migration_s + margin_s == deadline_s
    else:
        assert stop_s == now_s


def test_acquisition_stops_at_once():
    assert steps_before_stop(100.0, None, 2.0, 0.1, 0.5) == 0
    assert stop_at_s(100.0, None, 2.0, 0.5) == 100.0


def test_too_late_stops_at_once():
    assert steps_before_stop(100.0, 102.0, migration_s=2.0, step_s=0.1, margin_s=0.5) == 0
    assert steps_before_stop(100.0, 90.0, migration_s=0.0, step_s=0.1, margin_s=0.0) == 0


@pytest.mark.parametrize("step_s", [0.0, -1.0, float("nan")])
def test_step_time_must_be_positive(step_s):
    with pytest.raises(ValueError, match="step_s"):
        steps_before_stop(100.0, 130.0, 2.0, step_s, 0.5)
