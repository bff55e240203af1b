import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.core.cost_model import CostModel, Workload
from planner.core.refine import LEAST_FACTOR, MOST_FACTOR, WEIGHT, Corrections
from planner.protocol import MeasuredStep


@pytest.fixture
def costs(make_model, make_profile):
    return CostModel(make_model(), make_profile(), 2_000_000_000, Workload(), 16)


def report(costs, shape, ratio, num_steps, num_sequences=4.0):
    predicted_ms = costs.step_ms(*shape, num_decoding=num_sequences, context_tokens=200)
    return MeasuredStep(
        num_sequences=num_sequences, mean_context_tokens=200, mean_step_ms=predicted_ms * ratio, num_steps=num_steps
    )


def after(costs, ratios, shape=(2, 1)):
    corrections = Corrections()
    for index, ratio in enumerate(ratios):
        corrections = corrections.noted("p1", shape, report(costs, shape, ratio, 32 * (index + 1)), costs)
    return corrections


def test_nothing_measured_changes_nothing(costs):
    assert Corrections().factor(2, 1) == 1.0


def test_factor_goes_to_what_is_measured(costs):
    assert after(costs, [1.5]).factor(2, 1) == pytest.approx(1 + 0.5 * WEIGHT)
    assert after(costs, [1.5] * 20).factor(2, 1) == pytest.approx(1.5, abs=0.01)


def test_one_bad_report_fades(costs):
    assert after(costs, [1.0] * 5 + [4.0] + [1.0] * 8).factor(2, 1) == pytest.approx(1.0, abs=0.06)


def test_unseen_shapes_have_the_mean(costs):
    corrections = Corrections({(1, 1): 0.5, (2, 1): 2.0, (4, 1): 2.0})
    assert corrections.factor(8, 1) == pytest.approx(2 ** (1 / 3))
    assert corrections.factor(1, 1) == 0.5


def test_repeated_report_counts_once(costs):
    shape = (2, 1)
    once = Corrections().noted("p1", shape, report(costs, shape, 2.0, 32), costs)
    assert once.noted("p1", shape, report(costs, shape, 2.0, 32), costs) is once
    assert once.noted("p2", shape, report(costs, shape, 2.0, 32), costs).factor(2, 1) > once.factor(2, 1)


def test_leader_that_counts_anew_is_heard(costs):
    shape = (2, 1)
    first = Corrections().noted("p1", shape, report(costs, shape, 2.0, 320), costs)
    assert first.noted("p1", shape, report(costs, shape, 2.0, 32), costs).factor(2, 1) > first.factor(2, 1)


@pytest.mark.parametrize("step_ms", [0.0, -1.0, math.inf, math.nan])
def test_senseless_times_are_ignored(costs, step_ms):
    measured = MeasuredStep(num_sequences=2.0, mean_step_ms=step_ms, num_steps=100)
    assert Corrections().noted("p1", (1, 1), measured, costs) == Corrections()


def test_steps_of_no_sequence_are_ignored(costs):
    measured = MeasuredStep(num_sequences=0.0, mean_step_ms=10.0, num_steps=100)
    assert Corrections().noted("p1", (1, 1), measured, costs) == Corrections()


def test_pipelines_that_are_gone_are_forgotten_but_not_what_they_taught(costs):
    corrections = after(costs, [2.0])
    left = corrections.without({"p1"})
    assert left.num_steps == {}
    assert left.factor(2, 1) == corrections.factor(2, 1)


def test_cost_model_multiplies(costs, make_model, make_profile):
    slow = CostModel(
        make_model(), make_profile(), 2_000_000_000, Workload(), 16, corrections=Corrections({(2, 1): 2.0})
    )
    assert slow.decode_step_ms(2, 1, 4) == pytest.approx(2 * costs.decode_step_ms(2, 1, 4))
    assert slow.prefill_ms(2, 1) == pytest.approx(2 * costs.prefill_ms(2, 1))
    assert slow.throughput_per_s(2, 1) == pytest.approx(costs.throughput_per_s(2, 1) / 2)


@given(ratios=st.lists(st.floats(1e-6, 1e6), max_size=12))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_factor_stays_within_bounds(costs, ratios):
    assert LEAST_FACTOR <= after(costs, ratios).factor(2, 1) <= MOST_FACTOR
