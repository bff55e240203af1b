"""Notices that overlap, come early, move, are cancelled or turn out false, and what hangs or fails meanwhile."""

import itertools
import math

import msgspec
import pytest

from planner.core.agenda import RETRY_DELAYS_S
from planner.core.capacity import CapacityLimits
from planner.core.effects import Severity, Tick
from planner.core.fleet import OUTLIVED_S, REQUEST_TIMEOUT_S, STARTING_TIMEOUT_S
from planner.core.load import PEAK_S
from planner.core.profile import Profile
from planner.core.rollout import REVIVE_MARGIN_S
from planner.core.setbacks import HANG_EXCLUSION_S
from planner.errors import InventoryError, MessageError
from planner.protocol import (
    InstanceInventory,
    InstanceRequested,
    InstanceStarting,
    InstanceState,
    LoadReport,
    Market,
    MeasuredStep,
    Phase,
    PreemptionNotice,
    UnitRange,
)


def state_of(world, name):
    return next(i.state for i in world.state.status(world.now_s).instances if i.id == name)


def test_cancelled_notice_takes_the_plan_back_before_anything_has_stopped(make_world):
    world = make_world()
    world.join("i1", "i2")
    before = world.ids
    world.notice("i2", 30.0)
    assert world.arranges, "its leader has been told already"
    world.advance(5.0)
    world.cancel("i2")
    assert state_of(world, "i2") is InstanceState.READY
    assert world.ids == before
    assert world.plan.retiring == []
    assert "i2 stays: its notice was cancelled" in world.plan.explanation.cause
    world.advance(60.0)
    assert world.running() == before
    assert len(world.plans) == 3


def test_cancelled_notice_of_a_stage_revives_the_old_pipeline(make_world):
    world = make_world(data=1, pipeline=3, tensor=1)
    world.join("i1", "i2", "i3")
    old = world.ids
    world.does_prepare = False
    world.notice("i3", 30.0)
    world.advance(2.0)
    world.cancel("i3")
    assert world.ids == old
    world.does_prepare = True
    world.advance(60.0)
    assert world.running() == old
    assert world.arranges == [], "the old pipeline never heard that it was to stop"


def test_cancelled_too_late_builds_a_new_pipeline_in_place(make_world):
    world = make_world()
    world.join("i1", "i2")
    world.notice("i2", 5.0)
    world.advance(5.0 - REVIVE_MARGIN_S + 0.5)
    world.cancel("i2")
    assert world.ids == ["p1", "p3"]
    assert world.plan.explanation.bytes_moved == 0
    world.advance(5.0)
    assert world.running() == world.ids


def test_a_revived_pipeline_that_had_stopped_is_built_anew(make_world):
    """It was idle, so it stopped at once, and the planner heard of it too late."""
    world = make_world()
    world.join("i1", "i2")
    world.notice("i2", 30.0)
    process = world.processes()["i2-0"]
    process.runs = None
    world.cancel("i2")
    assert world.ids == ["p1", "p2"]
    world.report("i2-0", "p2", Phase.STOPPED)
    assert world.ids == ["p1", "p3"]
    world.advance(2.0)
    assert world.running() == world.ids


def test_a_revived_pipeline_that_had_stopped_is_built_anew_when_that_message_is_lost(make_world):
    world = make_world()
    world.join("i1", "i2")
    world.notice("i2", 30.0)
    world.cancel("i2")
    world.stops.clear()
    world.processes()["i2-0"].runs = None
    world.advance(4.0)
    assert world.ids == ["p1", "p3"]
    assert world.running() == world.ids


def test_cancelling_what_was_never_noticed_changes_nothing(make_world):
    world = make_world()
    world.join("i1")
    world.cancel("i1")
    world.cancel("nobody")
    assert len(world.plans) == 1
    assert [i.id for i in world.state.status(world.now_s).instances] == ["i1"]


def test_notice_before_it_joins(make_world):
    world = make_world()
    world.join("i1")
    world.send(InstanceStarting(instance="i2", market=Market.SPOT))
    world.notice("i2", 30.0)
    assert state_of(world, "i2") is InstanceState.GRACE
    world.join("i2")
    assert [p.leader for p in world.plan.pipelines] == ["i1-0"]
    world.cancel("i2")
    assert [p.leader for p in world.plan.pipelines] == ["i1-0", "i2-0"]


def test_notice_that_runs_out_before_it_joins(make_world):
    world = make_world()
    world.join("i1")
    world.notice("i2", 5.0)
    world.advance(5.0)
    assert state_of(world, "i2") is InstanceState.LOST
    assert len(world.plans) == 1
    world.join("i2")
    assert len(world.plan.pipelines) == 2, "it came after all"


def test_notice_cancelled_before_it_joins(make_world):
    world = make_world()
    world.join("i1")
    world.notice("i2", 60.0)
    world.cancel("i2")
    assert state_of(world, "i2") is InstanceState.STARTING
    world.join("i2")
    assert len(world.plan.pipelines) == 2


@pytest.mark.parametrize("moved_to_s", [10.0, 60.0])
def test_deadline_that_moves(make_world, moved_to_s):
    world = make_world()
    world.join("i1", "i2")
    world.notice("i2", 30.0)
    world.advance(1.0)
    world.notice("i2", moved_to_s)
    deadline_s = world.now_s + moved_to_s
    assert world.plan.retiring[0].deadline_s == deadline_s
    assert world.arranges[-1].deadline_s == deadline_s
    world.advance(moved_to_s - 2.0)
    assert world.running() == ["p1"]
    assert world.processes()["i2-0"].runs == "p2", "it serves on to its own deadline"
    world.advance(2.5)
    assert world.processes()["i2-0"].runs is None


def test_long_notice_is_looked_at_again_when_it_has_become_short(make_world):
    world = make_world()
    world.join("i1", "i2")
    world.notice("i2", 120.0)
    assert [p.leader for p in world.plan.pipelines] == ["i1-0", "i2-0"], "it serves on"
    assert world.plan.deadlines == {"i2": world.now_s + 120.0}
    world.advance(60.0)
    assert len(world.plan.pipelines) == 2
    world.advance(35.0)
    assert [p.leader for p in world.plan.pipelines] == ["i1-0"]
    assert "time has passed" in world.plan.explanation.cause


def test_false_notice(make_world):
    world = make_world()
    world.join("i1", "i2")
    world.notice("i2", 5.0)
    world.advance(5.0 + OUTLIVED_S - 0.5)
    assert state_of(world, "i2") is InstanceState.GRACE
    world.advance(1.0)
    assert state_of(world, "i2") is InstanceState.READY
    assert [p.leader for p in world.plan.pipelines] == ["i1-0", "i2-0"]
    report = next(r for r in world.reports if r.event == "notice withdrawn")
    assert "the notice was false" in report.fields["reason"]
    assert report.severity is Severity.WARNING
    world.advance(2.0)
    assert world.running() == world.ids


def test_killed_before_its_deadline(make_world):
    world = make_world(data=1, pipeline=2, tensor=1)
    world.join("i1", "i2")
    world.does_prepare = False
    world.notice("i2", 30.0)
    world.advance(2.0)
    world.kill("i2")
    assert {r.pipeline.id: r.broken for r in world.plan.retiring} == {"p1": True}
    world.does_prepare = True
    world.prepare()
    assert world.running() == world.ids
    assert world.plan.pipelines[0].ranks() == ["i1-0"]


def test_all_copies_lost_are_read_from_disk_and_the_plan_says_so(make_world):
    world = make_world(data=1, pipeline=2, tensor=1)
    world.join("i1", "i2")
    world.kill("i2")
    assert any(not t.sources for planned in world.plan.transfers.values() for t in planned)
    assert any("disk" in note for note in world.plan.explanation.notes)


def test_requested_and_never_launched(make_world):
    world = make_world()
    world.send(InstanceRequested(instance="i1", market=Market.ON_DEMAND))
    world.send(InstanceRequested(instance="i2", market=Market.SPOT))
    assert state_of(world, "i1") is InstanceState.REQUESTED
    world.send(InstanceStarting(instance="i2", market=Market.SPOT))
    world.advance(REQUEST_TIMEOUT_S)
    assert (state_of(world, "i1"), state_of(world, "i2")) == (InstanceState.LOST, InstanceState.STARTING)
    world.advance(STARTING_TIMEOUT_S - REQUEST_TIMEOUT_S + 1.0)
    assert state_of(world, "i2") is InstanceState.LOST
    assert sum(r.event == "instance lost" for r in world.reports) == 2


# --- Ranks that hang -----------------------------------------------------------------------------------------------


def test_rank_that_hangs_in_prepare_is_named_and_left_out(make_world):
    world = make_world(data=1, pipeline=2, tensor=1, options={"prepare_timeout_s": 20.0})
    world.join("i1")
    world.hung.add("i2-0")
    world.join("i2")
    assert world.shapes() == [(2, 1)]
    world.advance(18.0)
    assert world.shapes() == [(2, 1)]
    world.advance(6.0)
    assert world.ids == ["p1"], "the old one goes on"
    assert "i2-0 did not prepare p2 in time" in world.plan.explanation.cause
    assert [r.fields["waits_for"] for r in world.reports if r.event == "prepare hangs"] == ["i2-0"]
    assert world.arranges == []
    world.hung.clear()
    world.advance(HANG_EXCLUSION_S + 5.0)
    assert world.shapes() == [(2, 1)], "it gets another chance"
    assert world.running() == world.ids


def test_weights_that_come_in_are_progress(make_world):
    world = make_world(data=1, pipeline=2, tensor=1, options={"prepare_timeout_s": 20.0})
    world.join("i1")
    world.hung.add("i2-0")
    world.join("i2")
    for layer in range(5):
        world.advance(15.0)
        world.processes()["i2-0"].units.add((layer, 0))
        world.announce("i2")
    assert world.shapes() == [(2, 1)]
    world.advance(25.0)
    assert world.shapes() == [(1, 1)]


def test_pipeline_revived_before_it_had_started_is_prepared_again(make_world):
    """Its ranks have discarded what they had prepared: the pipeline that serves must not be arranged for it yet."""
    world = make_world(data=1, pipeline=3, tensor=1)
    world.join("i1", "i2", "i3")
    world.does_prepare = False
    world.notice("i3", 30.0)
    world.held = []
    world.prepare()
    late = [progress for progress in world.held if progress.phase is Phase.PREPARED]
    world.held = None
    for progress in late[:1]:  # i1-0 is prepared, i2-0 nearly
        world.send(progress)
    world.cancel("i3")
    assert world.ids == ["p1"]
    world.notice("i3", 25.0)
    assert world.shapes() == [(2, 1)]
    for progress in late:
        world.send(progress)
    world.advance(3.0)
    assert world.processes()["i1-0"].runs == "p1", "it serves until the new one is prepared"
    assert not any("p1" in arrange.pipelines for arrange in world.arranges)
    world.prepare()
    assert world.arranges[-1].pipelines == ["p1"]


# --- Decisions that fail -------------------------------------------------------------------------------------------


def test_last_good_plan_stands_when_a_decision_fails(make_world, make_model, make_profile):
    world = make_world(options={"profile": Profile.from_steps(make_profile(), make_model())})
    world.join("i1")
    before = world.plan
    world.model = make_model(num_layers=31)
    world.announce("i1")
    world.join("i2")
    status = world.state.status(world.now_s)
    assert status.plan == before
    assert status.num_failed_decisions == 1
    assert "num_layers: 30, but tiny has 31" in status.last_failure
    report = next(r for r in world.reports if r.severity is Severity.ERROR)
    assert "i2 joined" in report.fields["cause"]
    assert report.fields["ranks"] == "i1-0,i2-0"
    assert ".py:" in report.fields["at"]
    world.advance(RETRY_DELAYS_S[0] + RETRY_DELAYS_S[1] + 0.5)
    assert world.state.status(world.now_s).num_failed_decisions == 3, "it is tried again, but not all the time"
    world.kill("i2")
    assert world.state.status(world.now_s).num_failed_decisions == 4, "what happens next is decided at once"
    world.model = make_model()
    world.announce("i1")
    world.join("i3")
    status = world.state.status(world.now_s)
    assert [p.leader for p in world.plan.pipelines] == ["i1-0", "i3-0"]
    assert all(text in world.plan.explanation.cause for text in ("i2 joined", "i2 lost", "i3 joined"))
    assert status.last_failure == ""
    assert world.state.next_wakeup_s(world.now_s) == math.inf


@pytest.mark.parametrize("field", ["arrivals_per_s", "mean_prompt_tokens", "waiting"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_impossible_load_is_refused(make_world, field, value):
    world = make_world()
    world.join("i1")
    report = {"gateway": "g", "arrivals_per_s": 1.0, "running": 0, "waiting": 0} | {field: value}
    with pytest.raises(MessageError, match=f"LoadReport of g: {field}"):
        world.send(LoadReport(**report))


@pytest.mark.parametrize(
    ("of_model", "of_rank", "message"),
    [
        ({"kv_block_tokens": 0}, {}, r"model\.kv_block_tokens: 0 is below 1"),
        ({"num_layers": -3}, {}, r"model\.num_layers: -3 is below 1"),
        ({}, {"memory_bytes": -1}, "memory_bytes: -1 of i1-0"),
        ({}, {"rebuild_s": float("inf")}, "rebuild_s: inf of i1-0"),
        (
            {},
            {"measured_step": MeasuredStep(num_sequences=float("nan"), mean_step_ms=1.0, num_steps=9)},
            r"measured_step\.num_sequences: nan of i1-0",
        ),
        (
            {},
            {"units": [UnitRange(first_layer=3, last_layer=2, first_group=0, last_group=0)]},
            "units: i1-0 names a range that ends before it begins",
        ),
    ],
)
def test_impossible_inventory_is_refused_and_the_field_named(make_world, of_model, of_rank, message):
    world = make_world()
    world.join("i1", "i2")
    good = world.inventory("i1")
    ranks = [msgspec.structs.replace(good.ranks[0], **of_rank)]
    bad = msgspec.structs.replace(good, model=msgspec.structs.replace(good.model, **of_model), ranks=ranks)
    before = world.state.status(world.now_s)
    with pytest.raises(InventoryError, match=f"inventory of i1: {message}"):
        world.state.handle(bad, world.now_s)
    assert world.state.status(world.now_s) == before


def test_impossible_deadline_is_refused(make_world):
    world = make_world()
    world.join("i1")
    with pytest.raises(MessageError, match="deadline_s"):
        world.send(PreemptionNotice(instance="i1", deadline_s=math.nan))
    assert state_of(world, "i1") is InstanceState.READY


def test_rank_of_another_instance_is_refused(make_world):
    world = make_world()
    world.join("i1")
    inventory = world.inventory("i1")
    stolen = InstanceInventory(
        instance="i2",
        market=inventory.market,
        liveness_address="live-elsewhere",
        model=inventory.model,
        ranks=inventory.ranks,
    )
    with pytest.raises(InventoryError, match="i1-0 exists already"):
        world.send(stolen)


# --- Advice --------------------------------------------------------------------------------------------------------


def test_advisory_mode_acts_only_where_it_must(make_world):
    world = make_world(options={"is_advisory": True})
    world.join("i1")
    assert world.running() == ["p1"], "the first plan"
    world.join("i2")
    assert world.ids == ["p1"]
    assert [a.chosen.data for a in world.advice] == [2]
    assert all(a.advisory for a in world.advice)
    status = world.state.status(world.now_s)
    assert status.advisory
    assert [e.advisory for e in status.history] == [True, False]
    world.kill("i1")
    assert [p.leader for p in world.plan.pipelines] == ["i2-0"], "without it nothing would serve"
    epochs = [plan.epoch for plan in world.plans]
    assert all(later > sooner for sooner, later in itertools.pairwise(epochs))


def test_advisory_mode_heeds_notices(make_world):
    world = make_world(options={"is_advisory": True})
    world.join("i1", "i2")
    world.notice("i2", 30.0)
    assert [p.leader for p in world.plan.pipelines] == ["i1-0"]
    world.cancel("i2")
    assert [p.leader for p in world.plan.pipelines] == ["i1-0"], "to use it again is advice"
    assert world.advice[-1].chosen.data == 2


# --- Capacity and measured steps -----------------------------------------------------------------------------------


def test_desired_capacity_follows_the_load_within_its_limits(make_world):
    limits = CapacityLimits(min_spot=1, max_spot=4, max_on_demand=1, candidate_pool=0)
    world = make_world(options={"limits": limits})
    world.send(Tick())
    assert [(d.spot, d.on_demand) for d in world.desired] == [(1, 0)], "one shows the model"
    world.join("i1", "i2", "i3")
    world.send(LoadReport(gateway="g", arrivals_per_s=0.0, running=0, waiting=0))
    assert (world.desired[-1].spot, world.desired[-1].release) == (3, []), "the load may have been away only now"
    world.advance(PEAK_S)
    world.send(LoadReport(gateway="g", arrivals_per_s=0.0, running=0, waiting=0))
    assert (world.desired[-1].spot, world.desired[-1].release) == (1, ["i1", "i2"])
    assert world.state.status(world.now_s).desired == world.desired[-1]
    for _ in range(40):
        world.send(LoadReport(gateway="g", arrivals_per_s=500.0, running=9, waiting=9))
        world.advance(1.0)
    assert (world.desired[-1].spot, world.desired[-1].on_demand) == (4, 1)
    assert world.desired[-1].release == []
    num_answers = len(world.desired)
    world.advance(20.0)
    assert len(world.desired) <= num_answers + 1, "the load is forgotten once, and nothing else changes"


def test_limits_may_change_while_it_runs(make_world):
    limits = CapacityLimits(max_spot=4, candidate_pool=0)
    world = make_world(options={"limits": limits})
    world.join("i1")
    world.advance(10.0)
    world.send(LoadReport(gateway="g", arrivals_per_s=500.0, running=9, waiting=9))
    assert (world.desired[-1].spot, world.desired[-1].on_demand) == (4, 0)
    world.state.set_limits(CapacityLimits(max_spot=1, max_on_demand=2, candidate_pool=0))
    world.send(LoadReport(gateway="g", arrivals_per_s=500.0, running=9, waiting=9))
    assert (world.desired[-1].spot, world.desired[-1].on_demand) == (1, 2)


def test_candidates_serve_as_they_are_paid_for_anyway(make_world):
    def num_pipelines(pool):
        limits = CapacityLimits(max_spot=6, candidate_pool=pool)
        world = make_world(options={"limits": limits})
        world.send(Tick())
        world.advance(PEAK_S)
        world.send(LoadReport(gateway="g", arrivals_per_s=0.001, running=0, waiting=0))
        world.join("i1", "i2", "i3")
        world.advance(1.0)
        return len(world.plan.pipelines)

    assert num_pipelines(2) > num_pipelines(0)


def test_no_limits_no_desired_capacity(make_world):
    world = make_world()
    world.join("i1", "i2")
    assert world.desired == []
    assert world.state.status(world.now_s).desired is None


def test_steps_slower_than_the_profile_make_estimates_longer(make_world):
    def latency_s(step_ms):
        world = make_world(data=2)
        world.join("i1")
        if step_ms is not None:
            for num_steps in range(100, 2000, 100):
                measured = MeasuredStep(num_sequences=1.0, mean_step_ms=step_ms, num_steps=num_steps)
                world.processes()["i1-0"].measured_step = measured
                world.announce("i1")
        world.join("i2")
        return world.plan.explanation.alternatives[0].latency_s

    assert latency_s(200.0) > 1.5 * latency_s(None)
