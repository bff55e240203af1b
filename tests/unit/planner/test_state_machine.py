"""Every row of the table of what must survive, at the level of the planner's decisions."""

import itertools
import math

import pytest

from planner.core.effects import Tick
from planner.core.setbacks import REFUSAL_S
from planner.errors import InventoryError, ModelMismatchError
from planner.protocol import (
    InstanceLost,
    InstanceState,
    LoadReport,
    Phase,
    UnitRange,
)


def states(world):
    return {i.id: i.state for i in world.state.status(world.now_s).instances}


def test_first_instance_gets_a_plan_soon(make_world):
    world = make_world()
    world.join("i1", settle=False)
    world.advance(0.5)
    assert world.shapes() == [(1, 1)]
    assert world.plan.epoch == 1
    assert world.running() == ["p1"]
    assert "i1 joined" in world.plan.explanation.cause


def test_instances_that_join_together_get_one_plan(make_world):
    world = make_world()
    world.join("i1", "i2", "i3")
    assert len(world.plans) == 1
    assert world.shapes() == [(1, 1)] * 3


@pytest.mark.parametrize("notice_s", [30.0, 5.0])
def test_notice_leaves_untouched_pipelines_alone(make_world, notice_s):
    world = make_world()
    world.join("i1", "i2", "i3")
    before = {p.id: p for p in world.plan.pipelines}
    victim = next(p for p in world.plan.pipelines if p.leader == "i2-0")
    world.notice("i2", notice_s)
    assert len(world.plans) == 2
    assert [before[p.id] for p in world.plan.pipelines] == world.plan.pipelines
    assert [r.pipeline.id for r in world.plan.retiring] == [victim.id]
    assert not world.plan.transfers
    # No new pipeline waits for its rank: it is arranged at once, and its leader runs as long as it can.
    assert [a.pipelines for a in world.arranges] == [[victim.id]]
    assert world.arranges[0].deadline_s == world.now_s + notice_s
    assert 0 < world.arranges[0].migration_s < 1
    world.advance(notice_s + 0.5)
    world.kill("i2")
    assert len(world.plans) == 2, "its end was planned"
    assert states(world)["i2"] is InstanceState.LOST


def test_notice_to_a_stage_builds_a_new_pipeline_first(make_world):
    world = make_world(data=1, pipeline=3, tensor=1)
    world.does_prepare = False
    world.join("i1", "i2", "i3")
    world.prepare()
    old = world.plan.pipelines[0]
    world.notice("i3", 30.0)
    assert world.shapes() == [(2, 1)]
    assert world.plan.retiring[0].pipeline == old
    assert world.plan.retiring[0].deadline_s == world.now_s + 30.0
    assert world.plan.pipelines[0].inherits == [old.id]
    assert world.arranges == [], "it serves while the new one is prepared"
    world.advance(3.0)
    world.prepare()
    assert [a.pipelines for a in world.arranges] == [[old.id]]
    world.advance(30.0)
    assert world.running() == world.ids


def test_arrange_goes_out_before_the_deadline_even_if_unprepared(make_world):
    world = make_world(data=1, pipeline=2, tensor=1)
    world.join("i1", "i2")
    world.does_prepare = False
    world.notice("i2", 10.0)
    deadline_s = world.now_s + 10.0
    world.advance(8.0)
    assert world.arranges == []
    world.advance(1.5)
    assert len(world.arranges) == 1
    assert world.now_s < deadline_s


def test_kill_without_notice_breaks_only_its_pipeline(make_world):
    world = make_world()
    world.join("i1", "i2", "i3")
    before = world.plan.pipelines
    world.kill("i1")
    assert world.plan.pipelines == [p for p in before if p.leader != "i1-0"]
    assert [r.broken for r in world.plan.retiring] == [True]
    assert world.arranges == []
    assert "connection reset" in world.plan.explanation.cause


def test_kill_of_a_stage_rebuilds_from_survivors(make_world):
    world = make_world(data=1, pipeline=3, tensor=1)
    world.join("i1", "i2", "i3")
    world.kill("i2")
    assert world.shapes() == [(2, 1)]
    assert set(world.plan.pipelines[0].ranks()) == {"i1-0", "i3-0"}
    assert world.running() == world.ids
    from_disk = [t for planned in world.plan.transfers.values() for t in planned if not t.sources]
    assert from_disk, "the dead rank's layers are nowhere else"


def test_acquisition_is_used_and_stops_at_once(make_world):
    world = make_world(data=1, pipeline=3, tensor=1)
    world.join("i1", "i2")
    old = world.plan.pipelines[0]
    assert world.shapes() == [(2, 1)]
    world.join("i3")
    assert world.shapes() == [(3, 1)]
    assert [(a.pipelines, a.deadline_s) for a in world.arranges] == [([old.id], None)]
    assert world.running() == world.ids


def test_acquisition_adds_a_pipeline_beside_the_others(make_world):
    world = make_world()
    world.join("i1", "i2")
    before = world.plan.pipelines
    world.join("i3")
    assert world.plan.pipelines[:2] == before
    assert world.plan.retiring == []
    sources = {source for t in world.plan.transfers["i3-0"] for source in t.sources}
    assert sources == {"i1-0", "i2-0"}


@pytest.mark.parametrize(
    ("targets", "shapes"),
    [
        ({"data": 1, "pipeline": 3, "tensor": 1}, [[(1, 1)], [(2, 1)], [(3, 1)]]),
        ({"data": 1, "tensor": 3, "pipeline": 1}, [[(1, 1)], [(1, 1)], [(1, 3)]]),
        ({"data": 2}, [[(1, 1)], [(1, 1)] * 2, [(1, 1)] * 2]),
        ({"data": 1, "pipeline": 1, "tensor": 1}, [[(1, 1)]] * 3),
    ],
)
def test_targets_as_the_fleet_grows_and_shrinks(make_world, targets, shapes):
    world = make_world(**targets)
    for number, expected in enumerate(shapes, start=1):
        world.join(f"i{number}")
        assert world.shapes() == expected
    for number, expected in zip((3, 2), reversed(shapes[:2]), strict=True):
        world.kill(f"i{number}")
        world.advance(1.0)
        assert world.shapes() == expected
        assert world.running() == world.ids


def test_two_notices_one_second_apart(make_world):
    world = make_world()
    world.join("i1", "i2", "i3")
    kept = next(p for p in world.plan.pipelines if p.leader == "i3-0")
    world.notice("i1", 10.0)
    world.advance(1.0)
    world.notice("i2", 10.0)
    assert world.plan.pipelines == [kept]
    assert {name for a in world.arranges for name in a.pipelines} == {"p1", "p2"}
    assert sorted(r.pipeline.id for r in world.plan.retiring) == ["p1", "p2"]


def test_kill_during_a_migration(make_world):
    world = make_world(data=1, pipeline=3, tensor=1)
    world.join("i1", "i2", "i3", "i4")
    world.does_prepare = False
    used = world.plan.pipelines[0].ranks()
    victim, second = used[2].removesuffix("-0"), used[1].removesuffix("-0")
    world.notice(victim, 20.0)
    never_started = world.ids
    world.kill(second)
    assert world.shapes() == [(2, 1)]
    assert world.ids != never_started
    assert {r.pipeline.id: r.broken for r in world.plan.retiring} == {"p1": True}
    world.prepare()
    world.advance(1.0)
    assert world.running() == world.ids


def test_joiner_dies_before_it_is_prepared_and_the_old_pipeline_goes_on(make_world):
    world = make_world(data=1, pipeline=3, tensor=1)
    world.join("i1", "i2")
    old = world.ids
    world.does_prepare = False
    world.join("i3")
    assert world.ids != old
    world.kill("i3")
    assert world.ids == old
    assert world.running() == old
    assert world.arranges == []


def test_down_to_nothing_and_up_again(make_world):
    world = make_world()
    world.join("i1", "i2")
    world.notice("i1", 5.0)
    world.notice("i2", 8.0)
    # The last one serves on until its deadline: there is nothing to replace it.
    assert [p.leader for p in world.plan.pipelines] == ["i2-0"]
    assert world.plan.deadlines == {"i2": world.now_s + 8.0}
    world.advance(5.0)
    world.kill("i1")
    world.advance(3.0)
    assert world.running() == world.ids
    world.kill("i2")
    assert world.plan.pipelines == []
    assert any("requests wait" in note for note in world.plan.explanation.notes)
    world.advance(60.0)
    world.join("i3")
    assert [p.leader for p in world.plan.pipelines] == ["i3-0"]
    assert world.running() == world.ids


def test_new_instance_takes_over_from_the_last_one_under_notice(make_world):
    world = make_world()
    world.join("i1")
    world.notice("i1", 30.0)
    assert world.ids == ["p1"]
    world.join("i2")
    assert [p.leader for p in world.plan.pipelines] == ["i2-0"]
    assert world.plan.pipelines[0].inherits == ["p1"]
    assert world.plan.retiring[0].deadline_s == pytest.approx(world.now_s + 29.0, abs=0.5)
    assert world.plan.transfers["i2-0"][0].sources == ["i1-0"]


def test_model_that_needs_two_ranks_waits_for_the_second(make_world):
    world = make_world(memory_bytes=500_000_000)
    world.join("i1")
    assert world.plan.pipelines == []
    assert any("does not fit" in note for note in world.plan.explanation.notes)
    world.join("i2")
    assert world.shapes() == [(2, 1)]


def test_broken_pipeline_with_all_ranks_alive_is_rebuilt(make_world):
    world = make_world(data=1, pipeline=2, tensor=1)
    world.join("i1", "i2")
    world.report("i1-0", "p1", Phase.BROKEN)
    assert sorted(world.probes) == ["i1", "i2"]
    world.advance(0.2)
    assert world.ids == ["p1"]
    world.advance(0.8)
    assert world.ids == ["p2"]
    assert world.plan.pipelines[0].ranks() == world.numbers_seen["p1"].ranks()
    assert world.plan.retiring[0].broken
    assert world.running() == ["p2"]


def test_broken_pipeline_is_explained_by_a_lost_instance(make_world):
    world = make_world(data=1, pipeline=2, tensor=1)
    world.join("i1", "i2")
    world.report("i1-0", "p1", Phase.BROKEN)
    world.kill("i2")
    assert world.shapes() == [(1, 1)]
    world.advance(2.0)
    assert len(world.plans) == 2, "one event, one plan"


def test_prepare_failures_are_retried_then_another_shape_is_planned(make_world):
    world = make_world(data=1, pipeline=2, tensor=1)
    world.does_prepare = False
    world.join("i1", "i2")
    tries = []
    for _ in range(4):
        tries.append((world.now_s, world.ids[0]))
        epoch = world.plan.epoch
        world.report("i2-0", world.ids[0], Phase.PREPARE_FAILED, "out of memory")
        while world.plan.epoch == epoch:
            world.advance(0.05)
    assert len({name for _, name in tries}) == 4
    gaps = [later - sooner for (sooner, _), (later, _) in itertools.pairwise(tries)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 1
    assert world.plan.pipelines[0].ranks() == ["i1-0"]
    assert any("i2-0" in note for note in world.plan.explanation.notes)
    world.does_prepare = True
    world.prepare()
    world.advance(REFUSAL_S + 5.0)
    assert world.shapes() == [(2, 1)], "it gets another chance"


def test_restart_with_the_fleet_as_it_was_plans_nothing(make_world):
    world = make_world()
    world.join("i1", "i2", "i3")
    world.restart_planner()
    world.advance(10.0)
    assert len(world.plans) == 1
    assert world.state.status(world.now_s).epoch == 1
    world.notice("i1", 10.0)
    assert world.plan.epoch == 2
    assert world.ids == ["p2", "p3"]


def test_kill_while_the_planner_is_down(make_world):
    world = make_world()
    world.join("i1", "i2", "i3")
    world.restart_planner(meanwhile="i2")
    world.advance(0.5)
    assert world.ids == ["p1", "p3"]
    assert world.plan.retiring[0].broken


def test_instance_that_nobody_saw_die_is_lost_after_a_while(make_world):
    world = make_world()
    world.join("i1", "i2")
    world.vanish("i2")
    world.restart_planner()
    world.advance(1.0)
    assert len(world.plans) == 1
    world.advance(5.0)
    assert world.ids == ["p1"]


def test_restarted_rank_breaks_its_pipeline(make_world):
    world = make_world()
    world.join("i1", "i2")
    world.alive["i2"][0].address = "host-i2-0:99"
    world.alive["i2"][0].runs = None
    world.announce("i2")
    world.advance(1.0)
    assert world.ids == ["p1", "p3"]
    assert world.plan.addresses["i2-0"].context_address == "host-i2-0:99"


def test_lost_instance_rejoins(make_world):
    world = make_world()
    world.join("i1", "i2")
    world.send(InstanceLost(instance="i2", reason="silent"))
    assert world.ids == ["p1"]
    world.send(InstanceLost(instance="i2", reason="silent"))
    assert len(world.plans) == 2
    world.processes()["i2-0"].runs = None
    world.announce("i2")
    world.advance(1.0)
    assert world.ids == ["p1", "p3"]


def test_late_inventory_of_a_dead_instance_changes_nothing(make_world):
    world = make_world()
    world.join("i1", "i2")
    late = world.inventory("i2")
    world.kill("i2")
    num_plans = len(world.plans)
    world.send(late)
    world.advance(5.0)
    assert len(world.plans) == num_plans
    assert states(world)["i2"] is InstanceState.LOST


def test_arrange_is_repeated_until_the_pipeline_has_stopped(make_world):
    world = make_world(data=1, pipeline=2, tensor=1)
    world.join("i1")
    world.take_arrange = world.arranges.append
    world.join("i2")
    world.advance(3.5)
    assert 3 <= len(world.arranges) <= 5
    assert {tuple(a.pipelines) for a in world.arranges} == {("p1",)}
    world.report("i1-0", "p1", Phase.STOPPED)
    num_sent = len(world.arranges)
    world.advance(5.0)
    assert len(world.arranges) == num_sent


def test_lost_progress_messages_are_made_good_by_inventories(make_world):
    world = make_world(data=1, pipeline=2, tensor=1)
    world.join("i1")
    world.does_prepare = False
    world.join("i2")
    for process in world.processes().values():
        process.prepared.add("p2")
    world.advance(2.5)
    assert [a.pipelines for a in world.arranges] == [["p1"]]


def test_restarted_planner_forgets_retirements_that_ended_meanwhile(make_world):
    world = make_world()
    world.join("i1", "i2")
    world.notice("i2", 5.0)
    num_sent = len(world.arranges)
    world.advance(6.0)
    world.restart_planner(meanwhile="i2")
    world.advance(10.0)
    assert len(world.plans) == 2
    assert len(world.arranges) <= num_sent + 4
    num_sent = len(world.arranges)
    world.advance(10.0)
    assert len(world.arranges) == num_sent


def test_arranging_goes_on_after_a_restart(make_world):
    world = make_world(data=1, pipeline=2, tensor=1)
    world.join("i1")
    world.does_prepare = False
    world.join("i2")
    world.restart_planner()
    assert world.arranges == []
    world.prepare()
    assert [a.pipelines for a in world.arranges] == [["p1"]]
    world.advance(3.0)
    assert world.running() == ["p2"]


def test_rank_with_too_little_memory_is_left_out(make_world):
    world = make_world()
    world.join("i1", "i2")
    before = world.plan.pipelines
    world.memory_bytes = 10_000_000
    world.join("i3")
    assert world.plan.pipelines == before
    world.kill("i1")
    assert [p.leader for p in world.plan.pipelines] == ["i2-0"]
    assert any("left out" in note for note in world.plan.explanation.notes)


def test_idle_spare_under_notice_is_no_news(make_world):
    world = make_world(data=1, pipeline=1, tensor=1)
    world.join("i1", "i2")
    spare = ({"i1-0", "i2-0"} - set(world.plan.pipelines[0].ranks())).pop()
    world.notice(spare.removesuffix("-0"), 30.0)
    assert len(world.plans) == 1


def test_load_changes_the_shape_only_after_a_while(make_world):
    world = make_world(objective="latency", data=None)
    world.join("i1", "i2", "i3")
    for second in range(40):
        world.send(LoadReport(gateway="g", arrivals_per_s=5.0, running=1, waiting=0))
        world.advance(1.0)
        assert len(world.plans) == 1 or second >= 29
    assert world.state.status(world.now_s).epoch >= 1


def test_instance_of_another_model_is_refused(make_world, make_model):
    world = make_world()
    world.join("i1")
    other = make_model(num_layers=12)
    world.model = other
    with pytest.raises(ModelMismatchError, match="i2"):
        world.join("i2")
    assert "i2-0" not in {r for p in world.plan.pipelines for r in p.ranks()}


def test_inventory_with_units_outside_the_model_is_refused(make_world):
    world = make_world()
    world.join("i1")
    inventory = world.inventory("i1")
    inventory.ranks[0].units.append(UnitRange(first_layer=0, last_layer=10**9, first_group=0, last_group=0))
    with pytest.raises(InventoryError, match="i1-0"):
        world.send(inventory)


def test_status_tells_states_and_history(make_world):
    world = make_world()
    world.join("i1", "i2")
    world.notice("i1", 30.0)
    world.kill("i2")
    status = world.state.status(world.now_s)
    assert {i.id: i.state for i in status.instances} == {"i1": InstanceState.GRACE, "i2": InstanceState.LOST}
    assert status.history[0].cause.startswith("instance i2 lost")
    assert len(status.history) == len(world.plans)
    world.state.handle(Tick(), world.now_s + 61.0)
    assert {i.id for i in world.state.status(world.now_s + 61.0).instances} == {"i1"}


def test_nothing_to_wait_for_when_calm(make_world):
    world = make_world()
    assert world.state.next_wakeup_s(world.now_s) == math.inf
    world.join("i1")
    assert world.state.next_wakeup_s(world.now_s) == math.inf
