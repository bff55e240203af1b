import math

import msgspec
import pytest

from planner.core.setbacks import (
    EXCLUSION_S,
    FORGET_FAILURES_AFTER_S,
    HANG_EXCLUSION_S,
    MAX_REFUSAL_S,
    REFUSAL_GROWTH,
    REFUSAL_S,
    RETRY_DELAYS_S,
    Attempt,
    Setbacks,
)

RANKS = frozenset({"a", "b"})
ATTEMPT = Attempt(shape=(2, 1), ranks=RANKS, culprit="b", memory_bytes=100, detail="out of memory")


def but(**changes):
    return msgspec.structs.replace(ATTEMPT, **changes)


def fail_to_the_end(setbacks, attempt, now_s):
    """All its tries; when the last one failed."""
    for delay_s in RETRY_DELAYS_S:
        assert setbacks.note_failure(attempt, now_s) == pytest.approx(now_s + delay_s)
        now_s += delay_s
    assert setbacks.note_failure(attempt, now_s) == now_s
    return now_s


def test_delays_grow_and_then_the_shape_is_refused_and_no_rank_is_given_up():
    setbacks = Setbacks()
    now_s = fail_to_the_end(setbacks, ATTEMPT, 0.0)
    assert setbacks.refused(now_s).keys() == {(2, 1)}
    assert setbacks.refused(now_s)[2, 1].why == "b: out of memory"
    assert setbacks.suspects(now_s) == {"b"}
    assert setbacks.excluded(now_s) == frozenset()
    assert setbacks.next_wakeup_s() == now_s + REFUSAL_S
    assert setbacks.pop_expired(now_s + REFUSAL_S) == ["2 stages x 1 shard"]
    assert (setbacks.refused(now_s + REFUSAL_S), setbacks.suspects(now_s + REFUSAL_S)) == ({}, frozenset())
    assert setbacks.next_wakeup_s() == math.inf


def test_a_rank_that_fails_in_another_shape_too_is_excluded_at_once():
    setbacks = Setbacks()
    now_s = fail_to_the_end(setbacks, ATTEMPT, 0.0)
    assert setbacks.note_failure(but(shape=(1, 1), ranks=frozenset({"b"})), now_s) == now_s
    assert setbacks.excluded(now_s) == {"b"}
    assert setbacks.refused(now_s).keys() == {(2, 1)}, "the other shape is not to blame"
    assert setbacks.pop_expired(now_s + EXCLUSION_S) == ["b"]
    assert setbacks.excluded(now_s) == frozenset()


def test_another_rank_that_fails_in_another_shape_has_its_tries():
    setbacks = Setbacks()
    now_s = fail_to_the_end(setbacks, ATTEMPT, 0.0)
    now_s = fail_to_the_end(setbacks, but(shape=(1, 1), ranks=frozenset({"a"}), culprit="a"), now_s)
    assert setbacks.refused(now_s).keys() == {(2, 1), (1, 1)}
    assert setbacks.excluded(now_s) == frozenset()


def test_a_shape_that_serves_elsewhere_is_not_to_blame():
    setbacks = Setbacks()
    now_s = fail_to_the_end(setbacks, but(is_proven=True), 0.0)
    assert setbacks.excluded(now_s) == {"b"}
    assert setbacks.refused(now_s) == {}


def test_a_shape_that_is_seen_to_serve_is_refused_no_more():
    setbacks = Setbacks()
    now_s = fail_to_the_end(setbacks, ATTEMPT, 0.0)
    assert setbacks.note_serving((2, 1))
    assert not setbacks.note_serving((2, 1))
    assert (setbacks.refused(now_s), setbacks.suspects(now_s)) == ({}, frozenset())


def test_a_shape_that_the_engine_names_is_refused_at_once_and_nobody_is_suspected():
    setbacks = Setbacks()
    assert setbacks.note_failure(but(names_shape=True), 0.0) == 0.0
    assert setbacks.refused(0.0).keys() == {(2, 1)}
    assert setbacks.suspects(0.0) == frozenset()
    again_at_s = setbacks.note_failure(but(names_shape=True), 1.0)
    assert again_at_s == 1.0 + EXCLUSION_S, "it was tried for want of any other"


def test_refusals_of_the_same_shape_last_longer_and_longer():
    setbacks, now_s, lasted_s = Setbacks(), 0.0, []
    for _ in range(6):
        setbacks.note_failure(but(names_shape=True), now_s)
        lasted_s.append(setbacks.next_wakeup_s() - now_s)
        now_s = setbacks.next_wakeup_s()
        setbacks.pop_expired(now_s)
    assert lasted_s[:3] == [REFUSAL_S, REFUSAL_S * REFUSAL_GROWTH, REFUSAL_S * REFUSAL_GROWTH**2]
    assert lasted_s[-1] == MAX_REFUSAL_S
    setbacks.note_serving((2, 1))
    setbacks.note_failure(but(names_shape=True), now_s)
    assert setbacks.next_wakeup_s() == now_s + REFUSAL_S


def test_breaks_without_a_culprit_only_wait_longer():
    setbacks = Setbacks()
    waits_s = [setbacks.note_break(RANKS, 0.0) for _ in range(6)]
    assert waits_s == sorted(waits_s)
    assert setbacks.excluded(0.0) == frozenset()
    assert setbacks.refused(0.0) == {}


def test_a_rank_that_hung_is_excluded_at_once():
    setbacks = Setbacks()
    assert setbacks.note_hang(RANKS, "b", 5.0) == 5.0
    assert setbacks.excluded(5.0) == {"b"}
    assert setbacks.next_wakeup_s() == 5.0 + HANG_EXCLUSION_S
    assert setbacks.note_hang(RANKS, None, 5.0) > 5.0


def test_old_failures_do_not_count():
    setbacks = Setbacks()
    setbacks.note_failure(ATTEMPT, 0.0)
    later_s = FORGET_FAILURES_AFTER_S
    assert setbacks.note_failure(ATTEMPT, later_s) == later_s + RETRY_DELAYS_S[0]
    assert setbacks.note_failure(ATTEMPT, 2 * later_s - 1.0) == 2 * later_s - 1.0 + RETRY_DELAYS_S[1]
