import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.core.capacity import (
    CapacityLimits,
    FleetCount,
    desired_capacity,
    expected_calm_s,
    instances_to_release,
)
from planner.core.config_optimizer import Objective, Targets
from planner.core.cost_model import CostModel, Workload
from planner.protocol import (
    DesiredCapacity,
    Explanation,
    InstanceState,
    InstanceStatus,
    Market,
    Pipeline,
    Plan,
    Shard,
    Stage,
)

PRICES = {"spot_usd_per_h": 2.0, "on_demand_usd_per_h": 4.0}


@pytest.fixture
def desire(make_model, make_profile):
    def run(load, fleet=None, *, peak=0.0, targets=None, memory_mb=2000, ranks_per_instance=1, **limits):
        """`load`: arrivals in full single-rank pipelines; an instance is a rank unless told otherwise."""
        one = CostModel(make_model(), make_profile(), 2_000_000_000, Workload(), 16)
        arrivals_per_s = load * one.throughput_per_s(1, 1)
        workload = Workload(arrivals_per_s=arrivals_per_s)
        costs = CostModel(make_model(), make_profile(), memory_mb * 1_000_000, workload, 16)
        # Meeting a loose target with the fewest instances makes the need plain: as many as the load.
        targets = targets or Targets(objective=Objective.SLO, latency_s=1e6, pipeline=1, tensor=1)
        return desired_capacity(
            costs,
            targets,
            ranks_per_instance,
            fleet or FleetCount(),
            CapacityLimits(**limits),
            peak_per_s=peak / load * arrivals_per_s if load else 0.0,
        )

    return run


def counts(desired):
    return desired.spot, desired.on_demand


def test_calm_is_expected_from_what_was_seen():
    assert expected_calm_s([], 100.0, since_s=100.0) == 300.0
    assert expected_calm_s([], 700.0, since_s=100.0) == 900.0
    assert expected_calm_s([650.0, 660.0, 699.0], 700.0, since_s=100.0) == 225.0
    assert expected_calm_s([1.0] * 50, 10_000.0, since_s=0.0) == 3900.0, "too old to count"
    assert expected_calm_s([5.0], 1.0, since_s=2.0) == 300.0, "a clock that went back"


def test_both_markets_are_asked_at_once_and_on_demand_goes_first(desire):
    limits = {"max_spot": 10, "max_on_demand": 4, "candidate_pool": 2}
    assert counts(desire(2.5, **limits)) == (5, 3)
    requested = FleetCount(starting_spot=5, starting_on_demand=3)
    assert counts(desire(2.5, requested, **limits)) == (5, 3), "asking once more changes nothing"
    on_demand_came = FleetCount(ready_on_demand=3, starting_spot=5)
    assert counts(desire(2.5, on_demand_came, **limits)) == (5, 3)
    some_spot = FleetCount(ready_on_demand=3, ready_spot=2, starting_spot=3)
    assert desire(2.5, some_spot, **limits).on_demand == 2
    assert desire(2.5, FleetCount(ready_spot=5, ready_on_demand=2), **limits).on_demand == 0
    preempted = FleetCount(ready_spot=1)
    desired = desire(2.5, preempted, **limits)
    assert counts(desired) == (5, 2)
    assert "2 short: spot and on-demand asked for at once" in desired.reason


def test_a_fleet_with_a_margin_stays_as_it_is(desire):
    limits = {"max_spot": 20, "candidate_pool": 2}
    assert [desire(4.0 * 0.99, FleetCount(ready_spot=n), **limits).spot for n in (3, 6, 7, 8, 12)] == [6, 6, 7, 7, 7]
    assert desire(2.0, FleetCount(ready_spot=12), peak=8.5, **limits).spot == 11, "a lull is no reason to shrink"
    assert desire(2.0, FleetCount(ready_spot=3), peak=8.5, **limits).spot == 5, "nor a reason to grow"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    load=st.floats(0.0, 12.0),
    ready=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    starting=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    max_spot=st.integers(0, 10),
    max_on_demand=st.integers(0, 6),
    pool=st.integers(0, 3),
    max_usd_per_h=st.none() | st.floats(8.0, 40.0),
)
def test_limits_hold_and_the_answer_is_stable(
    desire, load, ready, starting, max_spot, max_on_demand, pool, max_usd_per_h
):
    limits = {
        "min_spot": min(1, max_spot),
        "max_spot": max_spot,
        "min_on_demand": min(1, max_on_demand),
        "max_on_demand": max_on_demand,
        "candidate_pool": pool,
        "max_usd_per_h": max_usd_per_h,
        **PRICES,
    }
    fleet = FleetCount(
        ready_spot=ready[0], ready_on_demand=ready[1], starting_spot=starting[0], starting_on_demand=starting[1]
    )
    desired = desire(load, fleet, **limits)
    assert limits["min_spot"] <= desired.spot <= max_spot
    assert limits["min_on_demand"] <= desired.on_demand <= max_on_demand
    if max_usd_per_h is not None:
        assert 2.0 * desired.spot + 4.0 * desired.on_demand <= max_usd_per_h + 1e-6
    for _ in range(3):  # the cloud gives what was asked for
        fleet = FleetCount(ready_spot=desired.spot, ready_on_demand=desired.on_demand)
        desired = desire(load, fleet, **limits)
    settled = FleetCount(ready_spot=desired.spot, ready_on_demand=desired.on_demand)
    assert counts(desire(load, settled, **limits)) == counts(desired), "it flaps"
    needed = math.ceil(load) if load > 0 else 1
    if max_usd_per_h is None and needed < max_spot + max_on_demand:
        assert desired.spot + desired.on_demand >= needed


def test_price_limit_takes_candidates_first(desire):
    limits = {"max_spot": 10, "max_on_demand": 4, "candidate_pool": 3, **PRICES}
    assert counts(desire(2.5, **limits)) == (6, 3)
    limited = desire(2.5, max_usd_per_h=14.0, **limits)
    assert counts(limited) == (3, 2)
    assert "14.00 USD/h do not pay for 6 spot and 3 on-demand" in limited.reason
    # What serves and is needed is not given up for instances that may not come.
    serving = FleetCount(ready_on_demand=3)
    assert counts(desire(2.5, serving, max_usd_per_h=12.0, **limits)) == (0, 3)


def test_pipelines_of_several_instances(desire):
    desired = desire(
        0.5, targets=Targets(pipeline=3, tensor=1, data=1), memory_mb=500, ranks_per_instance=2, max_spot=9
    )
    assert counts(desired) == (4, 0), "3 ranks are 2 instances, and 2 candidates"


def test_model_that_fits_on_nothing_allowed_changes_nothing(desire):
    desired = desire(1.0, FleetCount(ready_spot=2), memory_mb=10, max_spot=5)
    assert counts(desired) == (2, 0)
    assert "does not fit on 5 instances of 1 ranks" in desired.reason


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        ({"min_spot": 3, "max_spot": 2}, "min_spot"),
        ({"min_on_demand": -1}, "min_on_demand"),
        ({"candidate_pool": -1}, "candidate_pool"),
        ({"max_usd_per_h": 5.0}, "max_usd_per_h"),
        ({"max_usd_per_h": 5.0, "min_spot": 3, **PRICES}, "max_usd_per_h"),
        ({"spot_usd_per_h": math.nan}, "spot_usd_per_h"),
    ],
)
def test_limits_that_make_no_sense_are_named(limits, field):
    with pytest.raises(ValueError, match=f"^{field}"):
        CapacityLimits(**limits)


def status(name, market=Market.SPOT, state=InstanceState.READY):
    return InstanceStatus(id=name, market=market, state=state, deadline_s=None, ranks=[])


def test_release_begins_with_on_demand_and_those_that_serve_least(make_model):
    shards = [Shard(rank=f"{name}-0", instance=name, first_group=0, last_group=2) for name in ("busy", "calm", "od")]
    pipelines = [
        Pipeline(
            id=f"p{number}",
            stages=[Stage(first_layer=0, last_layer=29, shards=[shard])],
            max_batch=1,
            num_kv_blocks=1,
        )
        for number, shard in enumerate(shards)
    ]
    explanation = Explanation(
        cause="", cause_at_s=0.0, decided_at_s=0.0, arrivals_per_s=0.0, num_ranks=3, chosen=None, alternatives=[]
    )
    plan = Plan(
        epoch=1,
        model=make_model(),
        pipelines=pipelines,
        retiring=[],
        transfers={},
        addresses={},
        explanation=explanation,
        next_pipeline_number=4,
    )
    statuses = [
        status("busy"),
        status("calm"),
        status("idle"),
        status("coming", state=InstanceState.STARTING),
        status("od", Market.ON_DEMAND),
        status("going", state=InstanceState.GRACE),
        status("gone", state=InstanceState.LOST),
    ]
    kv_tokens = {"busy": 900, "calm": 10, "idle": 0}

    def release(spot, on_demand):
        desired = DesiredCapacity(spot=spot, on_demand=on_demand, reason="")
        return instances_to_release(desired, statuses, plan, kv_tokens)

    assert release(0, 0) == ["od", "coming", "idle", "calm", "busy"]
    assert release(2, 1) == ["coming", "idle"]
    assert release(9, 9) == []
    assert FleetCount.of(statuses) == FleetCount(ready_spot=3, starting_spot=1, ready_on_demand=1)
