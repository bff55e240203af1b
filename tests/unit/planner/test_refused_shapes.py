"""Preparations that fail because of the shape, or because of a rank, until the fleet serves."""

import pytest

from planner.core.setbacks import REFUSAL_S
from planner.protocol import InstanceState, Phase


def excluded(world):
    return world.state._faults.excluded(world.now_s)


def test_too_few_stages_for_the_memory_that_there_really_is(make_world):
    world = make_world()
    world.refused = {(1, 1), (2, 1), (1, 3), (2, 3)}
    world.join("i1", "i2", "i3", "i4")
    world.advance(40.0)
    assert world.running() == world.ids != []
    assert set(world.shapes()) <= {(3, 1), (4, 1)}
    assert excluded(world) == frozenset(), "no rank is given up"


def test_a_shape_that_the_engine_names_is_not_tried_twice(make_world):
    world = make_world(data=1, pipeline=2, tensor=1)
    world.refused, world.names_shape = {(2, 1)}, True
    started_s = world.now_s
    world.join("i1", "i2", "i3")
    assert world.now_s - started_s < 2
    assert world.running() == world.ids != []
    assert (2, 1) not in world.shapes()
    tried = [p.id for plan in world.plans for p in plan.pipelines if len(p.stages) == 2]
    assert len(tried) == 1
    refused = [r for r in world.reports if r.event == "shape refused"]
    assert [r.fields["shape"] for r in refused] == ["2 stages x 1 shard"]
    alternative = next(a for a in world.plan.explanation.alternatives if a.config.pipeline == 2)
    assert "too large" in alternative.verdict
    assert any("too large" in note for note in world.plan.explanation.notes)


@pytest.mark.parametrize("targets", [{}, {"pipeline": 2, "tensor": 1}, {"pipeline": 1, "tensor": 1}])
def test_a_bad_rank_costs_itself_and_no_other(make_world, targets):
    world = make_world(**targets)
    world.faulty = {"i2-0"}
    world.join("i1", "i2", "i3", "i4")
    world.advance(25.0)
    assert world.running() == world.ids != []
    used = {rank for p in world.plan.pipelines for rank in p.ranks()}
    assert used <= {"i1-0", "i3-0", "i4-0"}
    assert len(used) >= 2
    assert excluded(world) <= {"i2-0"}


def test_the_rank_that_failed_comes_last_in_the_next_shape(make_world):
    world = make_world(data=1, pipeline=2, tensor=1)
    world.faulty = {"i1-0"}
    world.join("i1", "i2")
    world.advance(10.0)
    assert world.running() == world.ids
    assert world.plan.pipelines[0].ranks() == ["i2-0"]
    assert excluded(world) == frozenset(), "it had no second chance to fail"


def test_the_only_possible_shape_is_tried_again_and_again(make_world):
    world = make_world(memory_bytes=480_000_000, pipeline=2, tensor=1)
    world.refused = {(2, 1)}
    world.join("i1", "i2")
    world.advance(120.0)
    tries = len(world.plans)
    assert world.running() == []
    assert 6 <= tries < 40, "it must not try without a pause"
    world.refused.clear()
    world.advance(35.0)
    assert world.running() == world.ids != []
    assert world.state._faults.refused(world.now_s) == {}


def test_what_serves_in_the_same_shape_serves_on(make_world):
    world = make_world(pipeline=1, tensor=1)
    world.join("i1", "i2")
    before = world.ids
    world.faulty = {"i3-0"}
    world.join("i3")
    world.advance(20.0)
    assert world.running() == world.ids == before
    assert excluded(world) == {"i3-0"}


def test_an_engine_that_is_still_being_built_proves_nothing(make_world):
    world = make_world(pipeline=1, tensor=1)
    world.does_prepare = False
    world.join("i1", "i2")
    _, second = world.ids
    for _ in range(4):
        world.processes()["i2-0"].runs = second  # its rank runs its part, and has not said that it serves
        world.announce("i2")
        failing = next(p for p in world.plan.pipelines if p.ranks() == ["i1-0"])
        epoch = world.plan.epoch
        world.report("i1-0", failing.id, Phase.PREPARE_FAILED, "no engine can be built")
        while world.plan.epoch == epoch:
            world.advance(0.05)
    assert world.state._faults.refused(world.now_s).keys() == {(1, 1)}


def test_shapes_are_tried_again_and_instances_stay_ready(make_world):
    world = make_world(data=1, pipeline=2, tensor=1)
    world.refused = {(2, 1)}
    world.join("i1", "i2")
    world.advance(10.0)
    world.refused.clear()
    assert world.shapes() == [(1, 1)]
    world.advance(REFUSAL_S)
    assert world.shapes() == [(2, 1)]
    assert {i.state for i in world.state.status(world.now_s).instances} == {InstanceState.READY}
