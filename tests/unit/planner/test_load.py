import msgspec
import pytest

from planner.core.load import Load
from planner.protocol import LoadReport


def report(gateway, arrivals_per_s, prompt=0.0, output=0.0):
    return LoadReport(
        gateway=gateway,
        arrivals_per_s=arrivals_per_s,
        running=0,
        waiting=0,
        mean_prompt_tokens=prompt,
        mean_output_tokens=output,
    )


def test_gateways_add_up_and_silent_ones_expire():
    load = Load()
    load.note(report("a", 1.0, prompt=100, output=10), 0.0)
    load.note(report("b", 3.0, prompt=200, output=20), 8.0)
    workload = load.workload(2048, 9.0)
    assert workload.arrivals_per_s == 4.0
    assert workload.prompt_tokens == pytest.approx(175)
    assert workload.output_tokens == pytest.approx(17.5)
    assert load.workload(2048, 12.0).arrivals_per_s == 3.0


def test_lengths_are_assumed_at_first_and_fit_the_model():
    assert Load().workload(2048, 0.0).prompt_tokens == 512
    assert Load().workload(64, 0.0).prompt_tokens == 32


def test_lengths_that_were_seen_are_believed_as_far_as_the_model_takes_them():
    load = Load()
    load.note(report("a", 1.0, prompt=512, output=128), 0.0)
    workload = load.workload(640, 0.0)
    assert (workload.prompt_tokens, workload.output_tokens) == (512, 128)
    workload = load.workload(600, 0.0)
    assert (workload.prompt_tokens, workload.output_tokens) == (512, 88)


def test_while_nothing_arrives_the_last_lengths_count():
    load = Load()
    load.note(report("a", 1.0, prompt=900, output=30), 0.0)
    load.note(report("a", 0.0), 1.0)
    workload = load.workload(2048, 1.0)
    assert (workload.arrivals_per_s, workload.prompt_tokens, workload.output_tokens) == (0.0, 900, 30)


def test_only_a_large_change_after_a_while_counts():
    load = Load()
    load.note_decision(1.0, 0.0)
    assert load.change(5.0, 10.0) is None
    assert load.change(1.1, 40.0) is None
    assert load.change(2.0, 40.0) == "arrivals changed from 1.00 to 2.00 per second"
    assert load.change(0.0, 40.0) is not None


def test_peak_is_that_of_the_last_five_minutes():
    load = Load()
    assert load.peak_per_s(0.0) == 0.0
    for at_s, arrivals_per_s in ((0.0, 5.0), (100.0, 2.0), (200.0, 3.0), (290.0, 1.0)):
        load.note(report("a", arrivals_per_s), at_s)
    assert [load.peak_per_s(at_s) for at_s in (300.0, 301.0, 501.0, 591.0)] == [5.0, 3.0, 1.0, 0.0]


def test_a_queue_is_demand_and_worth_a_decision():
    load = Load()
    load.note(report("a", 0.0), 100.0)
    load.note_decision(load.workload(2048, 100.0).demand_per_s, 100.0)
    waiting = msgspec.structs.replace(report("a", 0.0), waiting=60)
    load.note(waiting, 131.0)
    workload = load.workload(2048, 131.0)
    assert (workload.arrivals_per_s, workload.num_waiting, workload.demand_per_s) == (0.0, 60, 2.0)
    assert load.change(workload.demand_per_s, 131.0) is not None


@pytest.mark.parametrize(("arrivals_cv2", "expected_per_s"), [(0.0, 1.0), (1.0, 1.0), (31.0, 0.5)])
def test_of_bursty_arrivals_30_s_say_little(arrivals_cv2, expected_per_s):
    load = Load()
    for now_s in range(3000):
        load.note(msgspec.structs.replace(report("a", 0.0), arrivals_cv2=arrivals_cv2), float(now_s))
    load.note(msgspec.structs.replace(report("a", 1.0), arrivals_cv2=arrivals_cv2), 3000.0)
    workload = load.workload(2048, 3000.0)
    assert workload.arrivals_cv2 == arrivals_cv2
    assert workload.arrivals_per_s == pytest.approx(expected_per_s, abs=0.02)


def test_bursts_that_are_split_between_gateways_add_up():
    load = Load()
    for gateway in "abc":
        load.note(msgspec.structs.replace(report(gateway, 1.0), arrivals_cv2=3.0), 0.0)
    assert load.workload(2048, 0.0).arrivals_cv2 == 7.0
