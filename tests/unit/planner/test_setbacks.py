import math

from planner.core.setbacks import EXCLUSION_S, RETRY_DELAYS_S, Setbacks

RANKS = frozenset({"a", "b"})


def test_delays_grow_and_then_the_culprit_is_excluded():
    setbacks, now_s = Setbacks(), 0.0
    for delay_s in RETRY_DELAYS_S:
        assert setbacks.note_failure(RANKS, "b", now_s) == now_s + delay_s
        now_s += delay_s
    assert setbacks.note_failure(RANKS, "b", now_s) == now_s
    assert setbacks.excluded(now_s) == {"b"}
    assert setbacks.next_wakeup_s() == now_s + EXCLUSION_S
    assert setbacks.pop_expired(now_s + EXCLUSION_S) == ["b"]
    assert setbacks.next_wakeup_s() == math.inf
    assert setbacks.excluded(now_s) == frozenset()


def test_without_a_culprit_it_only_waits_longer():
    setbacks = Setbacks()
    waits_s = [setbacks.note_failure(RANKS, None, 0.0) for _ in range(6)]
    assert waits_s == sorted(waits_s)
    assert setbacks.excluded(0.0) == frozenset()


def test_old_failures_do_not_count():
    setbacks = Setbacks()
    setbacks.note_failure(RANKS, "b", 0.0)
    assert setbacks.note_failure(RANKS, "b", 100.0) == 100.0 + RETRY_DELAYS_S[0]
