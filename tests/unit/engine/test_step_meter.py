import pytest

from engine.core.step_meter import WINDOW_STEPS, StepMeter
from planner.protocol import MeasuredStep


def run(meter, num_steps, took_s=0.1, num_tokens=(1, 1), num_sequences=4):
    for _ in range(num_steps):
        meter.launched(num_tokens)
        meter.finished(num_sequences, 100.0, took_s)


def measured_after(meter, *args, **kwargs):
    run(meter, *args, **kwargs)
    return meter.measured


def test_first_window_needs_warm_stages():
    meter = StepMeter(num_stages=2)
    run(meter, 3 + WINDOW_STEPS - 1)  # Before the first three, one of the last four launches is unknown.
    assert meter.measured is None
    first = measured_after(meter, 1)
    assert first == MeasuredStep(
        num_sequences=4, mean_context_tokens=100.0, mean_step_ms=first.mean_step_ms, num_steps=WINDOW_STEPS
    )
    assert first.mean_step_ms == pytest.approx(100.0)


def test_windows_follow_each_other():
    meter = StepMeter(num_stages=1)
    run(meter, 1 + WINDOW_STEPS)
    second = measured_after(meter, WINDOW_STEPS, took_s=0.3)
    assert second.mean_step_ms == pytest.approx(300.0)
    assert second.num_steps == 2 * WINDOW_STEPS


def test_steps_that_met_a_prompt_are_not_counted():
    meter = StepMeter(num_stages=2)
    run(meter, 3 + WINDOW_STEPS - 1)
    run(meter, 1, took_s=9.0, num_tokens=(1, 64))
    run(meter, 3, took_s=9.0)  # Launched with the prompt, or right behind it.
    assert meter.measured is None
    assert measured_after(meter, 1).mean_step_ms == pytest.approx(100.0)
