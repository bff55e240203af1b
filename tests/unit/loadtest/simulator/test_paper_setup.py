import itertools
import statistics

import pytest

from loadtest.errors import InputError
from loadtest.simulator.paper_setup import (
    MODELS,
    TRACES,
    WORKLOAD_TRACES,
    Arrivals,
    bursty,
    constant_scenario,
    paper_scenario,
    workload_scenario,
)
from loadtest.simulator.policies.step_times import cost_model
from loadtest.simulator.scenario import Request, lifetimes
from planner.protocol import Market


def requests(num, gap_s=2.0):
    return tuple(Request(id=i, arrival_s=gap_s * (i + 1), prompt_tokens=8, output_tokens=4) for i in range(num))


def gaps(given):
    return [after.arrival_s - before.arrival_s for before, after in itertools.pairwise(given)]


def cv(given):
    return statistics.pstdev(gaps(given)) / statistics.mean(gaps(given))


def test_bursty_requests_are_as_many_in_the_same_time_with_the_wanted_variation():
    even = requests(20_000)
    drawn = bursty(even, 40_002.0, 6.0, seed=1)
    assert [r.id for r in drawn] == [r.id for r in even]
    assert drawn[-1].arrival_s <= 40_002.0
    assert all(gap_s >= 0 for gap_s in gaps(drawn))
    assert cv(drawn) == pytest.approx(6.0, rel=0.15)
    assert bursty(even, 40_002.0, 6.0, seed=1) == drawn
    assert bursty(even, 40_002.0, 6.0, seed=2) != drawn
    assert bursty((), 10.0, 6.0, seed=1) == ()


def test_bursty_requests_keep_the_rate_over_time():
    slow_then_fast = tuple(
        Request(id=i, arrival_s=i * 10.0 if i < 1000 else 10_000 + (i - 1000) * 1.0, prompt_tokens=8, output_tokens=4)
        for i in range(3000)
    )
    drawn = bursty(slow_then_fast, 12_000.0, 1.0, seed=3)
    assert sum(r.arrival_s < 10_000 for r in drawn) == pytest.approx(1000, rel=0.15)


@pytest.mark.parametrize(
    ("model", "gib", "least"), [("OPT-6.7B", 24.8, 1), ("GPT-20B", 75.4, 3), ("LLaMA-30B", 111.6, 4)]
)
def test_models_have_their_sizes_and_least_fleets(spotserve_data, model, gib, least):
    shape = MODELS[model].shape
    weights = shape.num_head_groups * sum(shape.unit_bytes(layer) for layer in range(-1, shape.num_layers + 1))
    assert weights / 2**30 == pytest.approx(gib, abs=0.05)
    costs = cost_model(paper_scenario(spotserve_data, model, "A_S"))
    num_ranks = min(
        pipeline * tensor
        for tensor in costs.tensor_degrees()
        for pipeline in range(1, shape.num_layers + 1)
        if costs.num_kv_blocks(pipeline, tensor)
    )
    assert -(-num_ranks // 4) == least
    assert MODELS[model].min_ranks == 4 * least


@pytest.mark.parametrize("trace", TRACES)
def test_cells_of_figure_6(spotserve_data, trace):
    scenario = paper_scenario(spotserve_data, "GPT-20B", trace)
    markets = {life.market for life in lifetimes(scenario.trace) if life.usable_s > 0}
    assert markets == ({Market.ON_DEMAND} if "O" in trace else {Market.SPOT} if markets else set())
    assert all(r.arrival_s < scenario.trace.end_s for r in scenario.requests)
    assert cv(scenario.requests) < 0.1
    drawn = paper_scenario(spotserve_data, "GPT-20B", trace, Arrivals.BURSTY, seed=4)
    assert len(drawn.requests) == len(scenario.requests)
    assert cv(drawn.requests) > 3
    assert drawn.name != scenario.name


def test_workload_and_constant_fleets(spotserve_data):
    for trace in WORKLOAD_TRACES:
        scenario = workload_scenario(spotserve_data, trace)
        assert scenario.required_per_s == 0.6
        assert [e.required_per_s for e in scenario.trace.events if e.required_per_s is not None] == [0.8, 0.6]
    constant = constant_scenario(spotserve_data, "GPT-20B", 3)
    assert [life.market for life in lifetimes(constant.trace)] == [Market.ON_DEMAND] * 3


def test_missing_data_is_told_by_its_file(tmp_path):
    with pytest.raises(InputError, match=r"trace_0304_real\.txt"):
        paper_scenario(tmp_path, "GPT-20B", "A_S")
