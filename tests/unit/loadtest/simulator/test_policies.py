"""Every policy on random small traces: what must hold whatever happens; and what each of them is meant to do."""

import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from loadtest.errors import SimulationError
from loadtest.simulator.policies.base import Policy
from loadtest.simulator.policies.mixed import SpotServeMixed, market_limits
from loadtest.simulator.policies.on_demand import OnDemand
from loadtest.simulator.policies.replicas import Replicas, size_replicas
from loadtest.simulator.policies.rerouting_strong import ReroutingStrong
from loadtest.simulator.policies.spotserve import SpotServe, SpotServeOptions
from loadtest.simulator.policies.step_times import fleet_sizes, lone_request_s
from loadtest.simulator.result import Fate
from loadtest.simulator.scenario import CapacityEvent, CapacityTrace, Request, lifetimes
from planner.protocol import Market

ALL: list[Policy] = [
    SpotServe(),
    SpotServe(SpotServeOptions(controller=False), "no controller"),
    SpotServe(SpotServeOptions(migration_planner=False), "no migration planner"),
    SpotServe(SpotServeOptions(arranger=False), "no arranger"),
    SpotServe(SpotServeOptions(device_mapper=False), "no device mapper"),
    SpotServeMixed(),
    OnDemand(),
    Replicas(),
    ReroutingStrong(),
]
POLICIES = {policy.name: policy for policy in ALL}


def run(policy, scenario):
    return policy.run(scenario, lambda now_s: None)


def fleet_at(result, at_s):
    return [sample for sample in result.fleet if sample.at_s <= at_s][-1]


def random_trace(rng, end_s=60.0):
    """2 to 4 instances at first, then up to 6 events, some of them close together."""
    alive = [f"i{index}" for index in range(rng.randint(2, 4))]
    events, num, at_s = [CapacityEvent(at_s=0.0, added=tuple(alive))], len(alive), 0.0
    for _ in range(rng.randint(0, 6)):
        at_s += rng.choice([0.0, 0.7, 3.0, 10.0])
        if at_s >= end_s:
            break
        if len(alive) > 1 and rng.random() < 0.55:
            gone = rng.sample(alive, rng.randint(1, len(alive) - 1))
            alive = [name for name in alive if name not in gone]
            events.append(CapacityEvent(at_s=at_s, removed=tuple(gone)))
        else:
            market = rng.choice([Market.SPOT, Market.ON_DEMAND])
            events.append(CapacityEvent(at_s=at_s, added=(f"i{num}",), market=market))
            alive.append(f"i{num}")
            num += 1
    return CapacityTrace(name="random", events=tuple(events), end_s=end_s)


def random_scenario(seed, make_scenario):
    rng = random.Random(seed)
    arrivals_s = sorted(rng.uniform(0, 60) for _ in range(rng.randint(1, 80)))
    requests = tuple(
        Request(id=index, arrival_s=at_s, prompt_tokens=rng.randint(1, 120), output_tokens=rng.randint(1, 60))
        for index, at_s in enumerate(arrivals_s)
    )
    return make_scenario(
        trace=random_trace(rng),
        requests=requests,
        notice_s=rng.choice([0.0, 1.0, 5.0]),
        drain_s=rng.choice([0.0, 5.0, math.inf]),
        memory_bytes=rng.choice([130_000_000, 150_000_000, 300_000_000]),
    )


MANY = [(name, seed) for name in POLICIES for seed in range(5)]
MANY += [
    (name, seed) for name in ("spotserve", "spotserve-mixed", "replicas", "rerouting-strong") for seed in range(5, 15)
]


@pytest.mark.parametrize(("name", "seed"), MANY)
def test_every_request_ends_once_and_with_its_tokens(name, seed, make_scenario):
    scenario = random_scenario(seed, make_scenario)
    result = run(POLICIES[name], scenario)
    end_s = scenario.trace.end_s
    assert [o.id for o in result.outcomes] == [r.id for r in scenario.requests]
    for request, outcome in zip(scenario.requests, result.outcomes, strict=True):
        assert outcome.fate in (Fate.COMPLETED, Fate.UNFINISHED)
        assert outcome.arrival_s == request.arrival_s
        assert outcome.ended_s <= result.end_s + 1e-9
        assert outcome.ended_s >= outcome.arrival_s
        if outcome.fate is Fate.COMPLETED:
            assert outcome.tokens_done == request.output_tokens
            assert outcome.arrival_s < outcome.first_token_s <= outcome.ended_s
            assert 0 <= outcome.longest_gap_s <= outcome.ended_s - outcome.arrival_s
        else:
            assert outcome.tokens_done < request.output_tokens
            assert outcome.ended_s == pytest.approx(result.end_s)
    if scenario.drain_s == 0:
        assert result.end_s == end_s
    assert result.end_s >= min(end_s, scenario.requests[-1].arrival_s)
    assert [s.at_s for s in result.fleet] == sorted({s.at_s for s in result.fleet})
    hours = result.instance_hours_spot, result.instance_hours_on_demand
    prices = scenario.prices
    assert result.cost_usd == pytest.approx(hours[0] * prices.spot_per_h + hours[1] * prices.on_demand_per_h)


@pytest.mark.parametrize("name", ["spotserve", "rerouting-strong", "no arranger"])
@pytest.mark.parametrize("seed", range(6))
def test_those_that_rent_the_whole_trace_pay_for_it(name, seed, make_scenario):
    scenario = random_scenario(seed, make_scenario)
    result = run(POLICIES[name], scenario)
    hours: Counter[Market] = Counter()
    for life in lifetimes(scenario.trace):
        gone_s = scenario.trace.end_s if life.gone_s is None else life.gone_s
        hours[life.market] += (gone_s - max(0.0, life.usable_s - scenario.acquisition_s)) / 3600
    assert result.instance_hours_spot == pytest.approx(hours[Market.SPOT])
    assert result.instance_hours_on_demand == pytest.approx(hours[Market.ON_DEMAND])


@pytest.mark.parametrize("name", ["spotserve", "rerouting-strong"])
@pytest.mark.parametrize("seed", range(6))
def test_the_fleet_is_that_of_the_trace_and_no_more_ranks_are_used(name, seed, make_scenario):
    scenario = random_scenario(seed, make_scenario)
    result = run(POLICIES[name], scenario)
    for sample in result.fleet:
        alive = [
            life.market
            for life in lifetimes(scenario.trace)
            if life.usable_s <= sample.at_s and (life.gone_s is None or life.gone_s > sample.at_s)
        ]
        assert (sample.num_spot, sample.num_on_demand) == (
            alive.count(Market.SPOT),
            alive.count(Market.ON_DEMAND),
        )
        assert sample.num_ranks_used <= len(alive) * scenario.ranks_per_instance


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_the_same_scenario_gives_the_same_result_to_the_byte(policy, make_scenario):
    scenario = random_scenario(3, make_scenario)
    first, second = (msgspec.json.encode(run(policy, scenario)) for _ in range(2))
    assert first == second


DIGEST = """
import hashlib, msgspec, conftest, test_policies
scenario = test_policies.random_scenario(7, conftest.build_scenario)
results = [test_policies.run(policy, scenario) for policy in test_policies.ALL]
print(hashlib.sha256(msgspec.json.encode(results)).hexdigest())
"""


def test_another_process_gives_the_same_result_to_the_byte():
    """Sets of names have another order there."""
    here = Path(__file__).parent
    digests = set()
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": f"{here}:{here.parents[3]}"}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True, timeout=60
        )
        digests.add(done.stdout)
    assert len(digests) == 1


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_with_room_to_spare_and_nothing_happening_all_requests_take_the_same(
    policy, make_scenario, make_trace, make_requests
):
    scenario = make_scenario(trace=make_trace((0, "+", "a b c")), requests=make_requests(10, 6.0))
    result = run(policy, scenario)
    assert {o.fate for o in result.outcomes} == {Fate.COMPLETED}
    latencies_s = [o.latency_s for o in result.outcomes]
    assert max(latencies_s) == pytest.approx(min(latencies_s))
    assert result.pauses == ()


# --- spotserve ---


def preempted(make_scenario, make_trace, make_requests, **changes):
    """Both pipelines of two instances are busy when one instance goes, and another one comes."""
    fields = {
        "trace": make_trace((0, "+", "a b"), (20, "-", "a"), (30, "+", "c")),
        "requests": make_requests(100, 0.5, output_tokens=100),
    }
    return make_scenario(**(fields | changes))


def test_with_notice_no_token_is_computed_twice_that_need_not_be(make_scenario, make_trace, make_requests):
    scenario = preempted(make_scenario, make_trace, make_requests)
    ours = run(SpotServe(), scenario)
    without = run(SpotServe(SpotServeOptions(arranger=False)), scenario)
    assert {o.fate for o in ours.outcomes} == {Fate.COMPLETED}
    recomputed = [sum(o.tokens_recomputed for o in result.outcomes) for result in (ours, without)]
    assert recomputed[0] < recomputed[1]


def test_without_notice_tokens_survive_and_kv_does_not(make_scenario, make_trace, make_requests):
    scenario = preempted(make_scenario, make_trace, make_requests, notice_s=0.0)
    result = run(SpotServe(), scenario)
    assert {o.fate for o in result.outcomes} == {Fate.COMPLETED}
    hit = [o for o in result.outcomes if o.tokens_recomputed]
    assert hit
    assert any("lost" in pause.cause and pause.tokens_recomputed for pause in result.pauses)
    # None began again: what was computed a second time is at most prompt and tokens.
    assert all(o.tokens_recomputed <= 164 for o in hit)


def test_when_all_instances_go_requests_wait_for_the_next_one(make_scenario, make_trace, make_requests):
    trace = make_trace((0, "+", "a"), (10, "-", "a"), (20, "+", "b"))
    scenario = make_scenario(trace=trace, requests=make_requests(12, 1.0))
    result = run(SpotServe(), scenario)
    assert {o.fate for o in result.outcomes} == {Fate.COMPLETED}
    waited = [o for o in result.outcomes if o.arrival_s < 20 < o.ended_s]
    assert waited
    # All weights come from the disk of the new instance.
    assert min(o.ended_s for o in waited) > 21
    assert any(sample.shapes == () for sample in result.fleet)


def test_at_the_end_of_a_trace_without_instances_requests_stay_unfinished(make_scenario, make_trace, make_requests):
    scenario = make_scenario(trace=make_trace((0, "+", "a"), (30, "-", "a")), requests=make_requests(50, 1.0))
    result = run(SpotServe(), scenario)
    assert Counter(o.fate for o in result.outcomes)[Fate.UNFINISHED] >= 20
    assert all(o.ended_s == result.end_s for o in result.outcomes if o.fate is Fate.UNFINISHED)


def test_a_model_that_fits_nowhere_serves_nothing_and_says_so(make_scenario):
    scenario = make_scenario(memory_bytes=1_000_000, drain_s=0.0)
    assert {o.fate for o in run(SpotServe(), scenario).outcomes} == {Fate.UNFINISHED}
    for policy in (ReroutingStrong(), Replicas()):
        with pytest.raises(SimulationError, match="does not fit"):
            run(policy, scenario)


def test_a_request_that_is_too_long_is_refused_before_anything_runs(make_scenario, make_requests):
    scenario = make_scenario(requests=make_requests(3, 1.0, prompt_tokens=250))
    for policy in POLICIES.values():
        with pytest.raises(SimulationError, match="request 0 has 290 tokens"):
            run(policy, scenario)


def test_progress_is_reported_in_virtual_time(make_scenario):
    scenario = make_scenario()
    seen: list[float] = []
    SpotServe().run(scenario, seen.append)
    assert seen == sorted(seen)
    assert seen[0] == 0.0
    assert seen[-1] >= scenario.trace.end_s - 1


# --- on-demand, replicas, rerouting ---


def test_on_demand_pays_on_demand_for_its_number_of_instances(make_scenario):
    scenario = make_scenario()
    result = run(OnDemand(2), scenario)
    assert result.policy == "on-demand-2"
    assert (result.instance_hours_spot, result.instance_hours_on_demand) == (0, pytest.approx(2 * 60 / 3600))
    assert {sample.num_on_demand for sample in result.fleet} == {2}


def test_on_demand_needs_a_number(make_scenario, make_trace):
    with pytest.raises(ValueError, match="num_instances"):
        OnDemand(0)
    with pytest.raises(SimulationError, match="without instances"):
        run(OnDemand(), make_scenario(trace=make_trace((5, "+", "a"))))


def test_replicas_fall_back_to_on_demand_while_spot_is_short(make_scenario, make_trace, make_requests):
    trace = make_trace((0, "+", "a b c"), (20, "-", "a b"), (100, "+", "d e"), end_s=200.0)
    scenario = make_scenario(trace=trace, requests=make_requests(750, 0.25), memory_bytes=300_000_000)
    sizing = size_replicas(scenario)
    assert (sizing.instances, sizing.num_wanted) == (1, 2)
    result = run(Replicas(), scenario)
    assert {o.fate for o in result.outcomes} == {Fate.COMPLETED}
    # Spot: 3, one, and 3 again.
    assert [fleet_at(result, at_s).num_on_demand for at_s in (10, 50, 199)] == [0, 2, 0]
    interrupted = [o for o in result.outcomes if o.tokens_recomputed]
    # From the first token on, prompt included.
    assert all(o.tokens_recomputed >= 64 for o in interrupted)


def test_replicas_do_not_rent_more_than_they_need(make_scenario, make_trace, make_requests):
    scenario = make_scenario(
        trace=make_trace((0, "+", "a b c d e f")), requests=make_requests(6, 10.0), memory_bytes=300_000_000
    )
    sizing = size_replicas(scenario)
    result = run(Replicas(), scenario)
    assert result.fleet[-1].num_spot == sizing.instances * (sizing.num_wanted + 1) < 6


def test_mixed_falls_back_to_on_demand_while_spot_is_short(make_scenario, make_trace, make_requests):
    trace = make_trace((0, "+", "a b c d e f"), (20, "-", "a b c d e"), (100, "+", "g h i j k"), end_s=200.0)
    scenario = make_scenario(trace=trace, requests=make_requests(750, 0.25), memory_bytes=300_000_000)
    result = run(SpotServeMixed(), scenario)
    assert {o.fate for o in result.outcomes} == {Fate.COMPLETED}
    during = [fleet_at(result, at_s) for at_s in (10, 50, 199)]
    assert [sample.num_on_demand > 0 for sample in during] == [False, True, False]
    assert [sample.num_spot for sample in during] == [6, 1, 6]


def test_mixed_does_not_rent_more_than_it_needs(make_scenario, make_trace, make_requests):
    scenario = make_scenario(
        trace=make_trace((0, "+", "a b c d e f g h")), requests=make_requests(6, 10.0), memory_bytes=300_000_000
    )
    result = run(SpotServeMixed(), scenario)
    assert result.fleet[-1].num_spot < 8
    assert result.instance_hours_on_demand == 0


@pytest.mark.parametrize("seed", range(8))
def test_mixed_never_costs_more_than_it_may(seed, make_scenario):
    scenario = random_scenario(seed, make_scenario)
    limit_usd_per_h = 5.0
    result = run(SpotServeMixed(limit_usd_per_h), scenario)
    prices = scenario.prices
    usd_per_h = [s.num_spot * prices.spot_per_h + s.num_on_demand * prices.on_demand_per_h for s in result.fleet]
    assert max(usd_per_h) <= limit_usd_per_h
    assert result.cost_usd <= limit_usd_per_h * scenario.trace.end_s / 3600


def test_mixed_buys_on_demand_with_the_money_that_the_market_has_no_spot_for(make_scenario, make_trace, make_requests):
    trace = make_trace((0, "+", "a b c d e f"), (10, "-", "b c d e f"), end_s=100.0)
    scenario = make_scenario(trace=trace, requests=make_requests(1000, 0.1), memory_bytes=300_000_000)
    result = run(SpotServeMixed(7.0), scenario)
    assert (fleet_at(result, 60).num_spot, fleet_at(result, 60).num_on_demand) == (1, 2)
    assert market_limits(scenario).max_usd_per_h == 6 * scenario.prices.on_demand_per_h


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("policy", [SpotServe(), SpotServeMixed(), Replicas()], ids=lambda policy: policy.name)
def test_no_request_is_faster_than_one_that_is_alone(policy, seed, make_scenario):
    scenario = random_scenario(seed, make_scenario)
    done = [o.latency_s for o in run(policy, scenario).outcomes if o.fate is Fate.COMPLETED]
    assert min(done, default=math.inf) >= lone_request_s(scenario) - 1e-9


def test_a_request_that_is_alone_takes_what_it_takes_alone(make_scenario, make_trace, make_requests):
    scenario = make_scenario(trace=make_trace((0, "+", "a b c")), requests=make_requests(1, 1.0))
    (outcome,) = run(SpotServe(), scenario).outcomes
    assert outcome.latency_s == pytest.approx(lone_request_s(scenario), rel=0.1)


@pytest.mark.parametrize("policy", [Replicas(), ReroutingStrong()], ids=["replicas", "rerouting"])
def test_without_recovery_a_lost_request_begins_again(policy, make_scenario, make_trace, make_requests):
    trace = make_trace((0, "+", "a b c d"), (20.05, "-", "a"))
    scenario = make_scenario(trace=trace, requests=make_requests(100, 0.5), notice_s=0.0, memory_bytes=300_000_000)
    result = run(policy, scenario)
    assert {o.fate for o in result.outcomes} == {Fate.COMPLETED}
    hit = [o for o in result.outcomes if o.tokens_recomputed]
    assert hit
    assert all(o.arrival_s < 20.05 < o.first_token_s for o in hit)
    assert [pause.cause for pause in result.pauses] == ["a lost"]


def test_replicas_on_demand_go_when_spot_comes_back_before_they_are_up(make_scenario, make_trace, make_requests):
    trace = make_trace((0, "+", "a b"), (20, "-", "b"), (28, "+", "c"), end_s=60.0)
    scenario = make_scenario(
        trace=trace, requests=make_requests(100, 0.5), acquisition_s=9.0, notice_s=0.0, memory_bytes=300_000_000
    )
    result = run(Replicas(), scenario)
    assert {o.fate for o in result.outcomes} == {Fate.COMPLETED}
    assert 0 < result.instance_hours_on_demand < 15 / 3600
    assert result.fleet[-1].num_on_demand == 0


def test_kv_that_nobody_took_in_time_is_computed_again(make_scenario, make_trace, make_requests):
    """The old instance goes before there is a new one: no heir could take the sequences."""
    trace = make_trace((0, "+", "a"), (20, "-", "a"), (25, "+", "b"))
    scenario = make_scenario(trace=trace, requests=make_requests(40, 0.5, output_tokens=180))
    result = run(SpotServe(), scenario)
    assert {o.fate for o in result.outcomes} == {Fate.COMPLETED}
    assert any(o.tokens_recomputed > 64 for o in result.outcomes)


def test_an_instance_that_goes_while_others_pull_from_it_is_replaced_as_a_source(
    make_scenario, make_trace, make_requests
):
    slow = msgspec.structs.replace(make_scenario().links, inter_bytes_per_s=2e7, disk_bytes_per_s=1e7)
    trace = make_trace((0, "+", "a b"), (5, "+", "c"), (8, "-", "a"), (9, "-", "b"), (11, "+", "d"), (13, "-", "c"))
    for notice_s in (0.0, 1.0):
        scenario = make_scenario(trace=trace, requests=make_requests(30, 0.5), links=slow, notice_s=notice_s)
        result = run(SpotServe(), scenario)
        assert {o.fate for o in result.outcomes} == {Fate.COMPLETED}


def test_replicas_follow_the_load_up(make_scenario, make_trace, make_requests):
    quiet = make_requests(20, 5.0)
    busy = [Request(id=100 + n, arrival_s=100 + 0.15 * n, prompt_tokens=64, output_tokens=40) for n in range(600)]
    trace = make_trace((0, "+", "a b c d e f"), end_s=200.0)
    scenario = make_scenario(trace=trace, requests=(*quiet, *busy), memory_bytes=300_000_000)
    sizing = size_replicas(scenario)
    assert (sizing.instances, sizing.num_wanted, sizing.most_wanted) == (2, 1, 3)
    result = run(Replicas(), scenario)
    # One and an extra one, then two and an extra one.
    assert [fleet_at(result, at_s).num_spot for at_s in (10, 199)] == [4, 6]


def test_rerouting_keeps_its_shape_and_waits_until_a_pipeline_is_whole(make_scenario, make_trace, make_requests):
    trace = make_trace((0, "+", "a b c d"), (20, "-", "a"), (40, "-", "b"), end_s=80.0)
    # Two ranks with 100 MB each do not hold 200 MB of weights: a pipeline spans two instances.
    scenario = make_scenario(trace=trace, requests=make_requests(60, 1.0), memory_bytes=85_000_000)
    result = run(ReroutingStrong(), scenario)
    assert {shape for sample in result.fleet for shape in sample.shapes} == {result.fleet[0].shapes[0]}
    assert [len(sample.shapes) for sample in result.fleet if sample.at_s < 20] == [2]
    assert [len(s.shapes) for s in result.fleet if 20 <= s.at_s < 40] == [1]
    # c and d: one pipeline of a and b is gone for good, and c's and d's own goes on.
    assert len(result.fleet[-1].shapes) == 1
    assert {o.fate for o in result.outcomes} == {Fate.COMPLETED}


def test_rerouting_loads_a_new_pipeline_from_disk(make_scenario, make_trace, make_requests):
    trace = make_trace((0, "+", "a b c d"), (20, "-", "a"), (40, "+", "e"), end_s=80.0)
    scenario = make_scenario(trace=trace, requests=make_requests(60, 1.0), memory_bytes=85_000_000)
    result = run(ReroutingStrong(), scenario)
    changes = [(s.at_s, len(s.shapes)) for s in result.fleet if s.at_s > 0]
    whole_again_s = next(at_s for at_s, num in changes if at_s >= 40 and num == 2)
    # b still has its weights; e reads its share of the 200 MB at 100 MB/s.
    assert 40.5 < whole_again_s < 41.5


def test_rerouting_takes_the_smallest_fleet_that_holds_the_model(make_scenario, make_trace, make_requests):
    trace = make_trace((0, "+", "a b"), (20, "-", "a"), (40, "+", "c"), end_s=80.0)
    scenario = make_scenario(trace=trace, requests=make_requests(60, 1.0), memory_bytes=85_000_000)
    result = run(ReroutingStrong(), scenario)
    assert [len(fleet_at(result, at_s).shapes) for at_s in (10, 30, 79)] == [1, 0, 1]


def test_fleet_sizes(make_trace):
    assert fleet_sizes(make_trace((0, "+", "a b"), (5, "-", "a"), (5, "+", "c d"), (9, "-", "b"))) == [2, 3]
    assert fleet_sizes(make_trace((0, "+", "a b"), (60, "-", "a b"))) == [2]
    mixed = CapacityTrace(
        name="mixed",
        events=(
            CapacityEvent(at_s=0.0, added=("a",)),
            CapacityEvent(at_s=0.0, added=("b",), market=Market.ON_DEMAND),
            CapacityEvent(at_s=9.0, removed=("b",)),
        ),
        end_s=20.0,
    )
    assert (fleet_sizes(mixed), fleet_sizes(mixed, {Market.SPOT})) == ([1, 2], [1])
