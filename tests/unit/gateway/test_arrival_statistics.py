import numpy as np
import pytest

from gateway.core.arrival_statistics import GAPS_WINDOW_S, ArrivalStatistics


def statistics_of(gaps_s):
    statistics, now_s = ArrivalStatistics(), 0.0
    statistics.note(now_s)
    for gap_s in gaps_s:
        now_s += float(gap_s)
        statistics.note(now_s)
    return statistics, now_s


def test_evenly_spaced_random_and_bursty_arrivals_are_told_apart():
    rng = np.random.default_rng(1)
    even, random, bursts = (statistics_of(gaps) for gaps in (
        [0.1] * 1000, rng.exponential(0.1, 1000), rng.gamma(1 / 36, 3.6, 1000)
    ))  # fmt: skip
    assert even[0].squared_cv(even[1]) < 0.1
    assert random[0].squared_cv(random[1]) == pytest.approx(1.0, abs=0.3)
    assert bursts[0].squared_cv(bursts[1]) > 10


def test_nothing_known_is_taken_for_random():
    statistics = ArrivalStatistics()
    assert statistics.squared_cv(5.0) == 1.0
    statistics.note(5.0)
    assert statistics.squared_cv(6.0) == 1.0
    for _ in range(3):
        statistics.note(5.0)
    assert statistics.squared_cv(5.0) == 1.0


def test_a_lull_after_a_burst_counts_while_it_lasts():
    statistics, now_s = statistics_of([0.01] * 50)
    assert statistics.squared_cv(now_s) < 1.0
    assert statistics.squared_cv(now_s + 100.0) > 10.0


def test_old_arrivals_are_forgotten():
    statistics, now_s = statistics_of([0.01, 60.0] * 10)
    for _ in range(1000):
        now_s += GAPS_WINDOW_S / 500
        statistics.note(now_s)
    assert statistics.squared_cv(now_s) < 0.1
