"""What can be said before anything is simulated: memory, and what each fleet size could do."""

from __future__ import annotations

import msgspec
import pytest

from loadtest.errors import InputError
from loadtest.simulator.scenario import CapacityEvent, CapacityTrace, Prices
from loadtest.simulator.what_if import (
    check_fit,
    fleet_rows,
    fleet_sizes,
    sensible_arrivals_per_s,
    smallest_fit,
    weights_bytes,
)
from planner.core.config_optimizer import Targets
from planner.core.cost_model import CostModel, Workload
from planner.protocol import ModelShape

MODEL = ModelShape(
    name="small",
    num_layers=8,
    num_head_groups=4,
    decoder_unit_bytes=1_000_000,
    embedding_unit_bytes=500_000,
    head_unit_bytes=500_000,
    kv_unit_bytes_per_token=100,
    kv_block_tokens=16,
    max_model_len=1024,
    hidden_bytes_per_token=1024,
    tied_embeddings=False,
)
TRACE = CapacityTrace(
    name="shrinking",
    events=(
        CapacityEvent(at_s=0, added=("a", "b", "c")),
        CapacityEvent(at_s=60, removed=("a",)),
        CapacityEvent(at_s=80, removed=("b", "c")),
        CapacityEvent(at_s=90, added=("d", "e")),
    ),
    end_s=100,
)
PRICES = Prices(spot_per_h=2.0, on_demand_per_h=4.0)


def costs(memory_bytes: int, arrivals_per_s: float = 1.0) -> CostModel:
    workload = Workload(arrivals_per_s=arrivals_per_s, prompt_tokens=100, output_tokens=20)
    return CostModel(MODEL, None, memory_bytes, workload, max_batch=4)


def test_fleet_sizes_are_weighted_by_time():
    assert fleet_sizes(TRACE) == [(0, 0.1), (2, pytest.approx(0.3)), (3, 0.6)]


def test_weights_bytes_counts_every_unit_once():
    assert weights_bytes(MODEL) == 4 * (8 * 1_000_000 + 500_000 + 500_000)


def test_smallest_fit_needs_as_many_ranks_as_memory_says():
    one = smallest_fit(costs(40_000_000), 8)
    assert one is not None
    assert one.num_ranks == 1
    two = smallest_fit(costs(22_000_000), 8)
    assert two is not None
    assert two.num_ranks == 2
    assert two.rank_bytes <= 22_000_000
    assert smallest_fit(costs(22_000_000), 1) is None


def test_a_model_that_fits_nowhere_says_how_much_it_needs():
    with pytest.raises(InputError) as error:
        check_fit(costs(11_000_000), TRACE, ranks_per_instance=1)
    assert "small fits on no fleet of this trace" in str(error.value)
    assert "its largest one has 3 ranks" in str(error.value)
    assert "or 4 ranks of this memory" in str(error.value)
    assert error.value.field == "fleet"


def test_what_it_needs_is_enough_and_not_too_much():
    large = msgspec.structs.replace(
        MODEL,
        decoder_unit_bytes=10**9,
        embedding_unit_bytes=10**9,
        head_unit_bytes=10**9,
        kv_unit_bytes_per_token=10**5,
    )

    def with_memory(num_bytes: float) -> CostModel:
        return CostModel(large, None, int(num_bytes), Workload(), max_batch=4)

    with pytest.raises(InputError) as error:
        check_fit(with_memory(5e9), TRACE, ranks_per_instance=1)
    said = float(str(error.value).split("every rank would need ")[1].split(" GiB")[0]) * 2**30
    assert smallest_fit(with_memory(said + 0.06 * 2**30), 3) is not None
    assert smallest_fit(with_memory(said - 0.06 * 2**30), 3) is None


def test_a_profile_without_a_degree_that_divides_the_head_groups():
    whole = costs(10**9)
    three = msgspec.structs.replace(whole.profile, degrees={3: whole.profile.degrees[1]})
    with pytest.raises(InputError, match="degrees: none of 3 divides the 4 head groups of small"):
        check_fit(CostModel(MODEL, three, 10**9, Workload(), 4), TRACE, ranks_per_instance=1)


def test_a_trace_without_instances_is_no_fleet():
    with pytest.raises(InputError, match="never has an instance"):
        check_fit(costs(10**9), CapacityTrace(name="empty", events=(), end_s=10), ranks_per_instance=1)


def test_fleet_rows_say_what_the_planner_would_do():
    rows = fleet_rows(costs(22_000_000), Targets(max_batch=4), TRACE, 1, PRICES)
    assert [row.num_instances for row in rows] == [0, 2, 3]
    none, two, three = rows
    assert none.score is None
    assert none.usd_per_million_tokens is None
    assert two.score is not None
    assert two.score.layout.num_ranks == 2
    assert two.usd_per_h == 4.0
    assert two.usd_per_million_tokens == pytest.approx(4.0 / (120 * 3600) * 1e6)
    assert three.score is not None
    assert three.score.throughput_per_s >= two.score.throughput_per_s


def test_more_arrivals_than_it_can_serve_have_no_price():
    rows = fleet_rows(costs(40_000_000, arrivals_per_s=1e6), Targets(max_batch=4), TRACE, 1, PRICES)
    assert all(row.usd_per_million_tokens is None for row in rows)


def test_sensible_arrivals_are_what_the_median_fleet_can_serve():
    rows = fleet_rows(costs(22_000_000, arrivals_per_s=0.0), Targets(max_batch=4), TRACE, 1, PRICES)
    arrivals_per_s = sensible_arrivals_per_s(costs(22_000_000, arrivals_per_s=0.0), TRACE, 1)
    largest = rows[-1].score
    assert largest is not None
    assert arrivals_per_s == pytest.approx(0.6 * largest.throughput_per_s, rel=0.1)
