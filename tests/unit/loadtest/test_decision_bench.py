import pytest

from loadtest.decision_bench import EVENTS, growth_exponent, run


def test_growth_is_the_slope_on_logarithmic_axes():
    assert growth_exponent({10: 0.5, 20: 2.0, 40: 8.0}) == pytest.approx(2.0)
    assert growth_exponent({10: 0.5}) is None


def test_a_small_fleet_is_timed_on_every_event():
    report = run([16], num_rounds=1)
    assert [timing.event for timing in report.figures.timings] == list(EVENTS)
    assert all(timing.decide_s > 0 and timing.num_pipelines > 0 for timing in report.figures.timings)
    assert report.figures.timings[-1].num_new > 0, "another shape builds every pipeline anew"
    assert report.checks == [], "no target is set for this size"
    assert "16 preemption" in str(report)


def test_targets_stand_beside_what_was_measured():
    [check] = run([48], num_rounds=1).checks
    assert (check.target, check.unit) == (0.05, "s")
    assert check.value is not None
