import math

import pytest

from planner.core.rollout import ARRANGE_MARGIN_S, MAX_SENDS, RESEND_S, REVIVE_MARGIN_S, Retirement, Rollout
from planner.protocol import (
    Explanation,
    InstanceInventory,
    Market,
    Phase,
    Pipeline,
    Plan,
    RankInventory,
    RankProgress,
    Retiring,
    Shard,
    Stage,
)


@pytest.fixture
def make_retirement():
    def make(deadline_s=None, shares_ranks=True, **fields):
        pipeline = Pipeline(id="p1", stages=[], max_batch=1, num_kv_blocks=1)
        retiring = Retiring(pipeline=pipeline, reason="", deadline_s=deadline_s)
        return Retirement(retiring=retiring, shares_ranks=shares_ranks, migration_s=2.0, **fields)

    return make


def test_acquisition_waits_for_the_new_ranks(make_retirement):
    assert make_retirement().arrange_at_s(False, 10.0) == math.inf
    assert make_retirement().arrange_at_s(True, 10.0) == 10.0


def test_preemption_waits_no_longer_than_it_can(make_retirement):
    assert make_retirement(deadline_s=40.0).arrange_at_s(False, 10.0) == 40.0 - 2.0 - ARRANGE_MARGIN_S
    assert make_retirement(deadline_s=40.0).arrange_at_s(True, 10.0) == 10.0
    assert make_retirement(deadline_s=40.0, shares_ranks=False).arrange_at_s(False, 10.0) == 10.0


def test_it_is_asked_again_after_it_should_have_stopped(make_retirement):
    assert make_retirement(num_sent=1, sent_at_s=10.0).arrange_at_s(True, 10.5) == 10.0 + RESEND_S
    with_deadline = make_retirement(deadline_s=40.0, num_sent=1, sent_at_s=10.0)
    assert with_deadline.arrange_at_s(True, 10.5) == 38.0 + RESEND_S
    assert make_retirement(num_sent=MAX_SENDS, sent_at_s=10.0).arrange_at_s(True, 99.0) == math.inf


# --- What was prepared, from plan to plan ---


def build_pipeline(name, *ranks):
    shards = [[Shard(rank=rank, instance=rank, first_group=0, last_group=0)] for rank in ranks]
    stages = [Stage(first_layer=n, last_layer=n, shards=one) for n, one in enumerate(shards)]
    return Pipeline(id=name, stages=stages, max_batch=1, num_kv_blocks=1)


P1, P2, P3 = build_pipeline("p1", "a", "b"), build_pipeline("p2", "a", "b"), build_pipeline("p3", "c")


class Followed(Rollout):
    """Plans and messages in few words; an epoch is also the time."""

    def follow(self, model, epoch, pipelines, retiring=()):
        plan = Plan(
            epoch=epoch,
            model=model,
            pipelines=pipelines,
            retiring=list(retiring),
            transfers={},
            addresses={},
            explanation=Explanation(
                cause="", cause_at_s=0, decided_at_s=0, arrivals_per_s=0, num_ranks=0, chosen=None, alternatives=[]
            ),
            next_pipeline_number=9,
        )
        self.adopt(plan, {}, float(epoch))

    def hear(self, rank, pipeline, phase, epoch):
        self.note_progress(RankProgress(rank=rank, epoch=epoch, pipeline=pipeline, phase=phase, at_s=0.0), float(epoch))


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def rollout():
    return Followed()


def retire(pipeline, deadline_s=None):
    return Retiring(pipeline=pipeline, reason="", deadline_s=deadline_s)


def test_what_a_revived_pipeline_prepared_before_it_started_does_not_count(rollout, model):
    rollout.follow(model, 1, [P1])
    for rank in "ab":
        rollout.hear(rank, "p1", Phase.STARTED, 1)
    rollout.follow(model, 2, [P2], [retire(P1)])
    for rank in "ab":
        rollout.hear(rank, "p2", Phase.PREPARED, 2)
    assert rollout.settled() == {"p2"}
    rollout.follow(model, 3, [P1, P3], [retire(P2)])
    assert rollout.settled() == {"p1"}, "it runs on: nothing to prepare"
    assert rollout.revivable(3.0, ()) == {"p2"}, "p3 is not prepared, so nobody was told to stop"
    rollout.follow(model, 4, [P2], [retire(P1)])
    assert rollout.settled() == frozenset()
    rollout.hear("a", "p2", Phase.PREPARED, 4)
    rollout.hear("b", "p2", Phase.PREPARED, 2)  # from before it discarded that
    assert not rollout.is_all_prepared
    assert rollout.due_arranges(4.0) == []
    rollout.hear("b", "p2", Phase.PREPARED, 4)
    assert rollout.is_all_prepared
    assert [arrange.pipelines for arrange in rollout.due_arranges(4.0)] == [["p1"]]


def test_told_to_stop_at_once_is_final(rollout, model):
    rollout.follow(model, 1, [P1])
    rollout.follow(model, 2, [], [retire(P1)])
    assert rollout.revivable(2.0, ()) == {"p1"}
    assert [arrange.deadline_s for arrange in rollout.due_arranges(2.0)] == [None]
    rollout.follow(model, 3, [], [retire(P1, deadline_s=100.0)])
    rollout.due_arranges(3.0)
    assert rollout.revivable(3.0, ()) == frozenset()


def test_told_to_stop_later_can_be_taken_back_until_shortly_before(rollout, model):
    rollout.follow(model, 1, [P1])
    rollout.follow(model, 2, [], [retire(P1, deadline_s=100.0)])
    assert rollout.due_arranges(2.0)
    assert rollout.revivable(50.0, ()) == {"p1"}
    assert rollout.revivable(50.0, {"b"}) == frozenset(), "the notice still holds"
    assert rollout.revivable(100.0 - REVIVE_MARGIN_S, ()) == frozenset()


def test_preparation_that_stands_still_is_reported_once(rollout, model):
    rollout.follow(model, 1, [P1])
    rollout.hear("a", "p1", Phase.PREPARED, 1)
    assert rollout.next_wakeup_s(1.0, 20.0) == 21.0
    assert rollout.hung(20.9, 20.0) == []
    assert rollout.hung(21.0, 20.0) == [(P1, ["b"])]
    assert rollout.hung(99.0, 20.0) == []
    assert rollout.next_wakeup_s(99.0, 20.0) == math.inf
    rollout.hear("b", "p1", Phase.PREPARED, 1)
    assert rollout.settled() == {"p1"}


def prepare_all(rollout, epoch, pipeline):
    for rank in pipeline.ranks():
        rollout.note_progress(
            RankProgress(rank=rank, epoch=epoch, pipeline=pipeline.id, phase=Phase.PREPARED, at_s=float(epoch)), epoch
        )


def test_pipelines_that_one_new_pipeline_waits_for_stop_together(model):
    rollout = Followed()
    old, under_notice, new = build_pipeline("p1", "a"), build_pipeline("p2", "b", "x"), build_pipeline("p3", "a", "b")
    rollout.follow(model, 1, [old, under_notice])
    rollout.follow(model, 2, [new], [retire(old), retire(under_notice, deadline_s=30.0)])
    assert rollout.due_arranges(2.0) == []
    prepare_all(rollout, 2, new)
    (arrange,) = rollout.due_arranges(3.0)
    assert (arrange.pipelines, arrange.deadline_s) == (["p1", "p2"], None)


def test_a_pipeline_that_holds_up_nobody_else_serves_to_its_deadline(model):
    rollout = Followed()
    under_notice, new = build_pipeline("p1", "a", "x"), build_pipeline("p2", "a")
    rollout.follow(model, 1, [under_notice])
    rollout.follow(model, 2, [new], [retire(under_notice, deadline_s=30.0)])
    prepare_all(rollout, 2, new)
    (arrange,) = rollout.due_arranges(3.0)
    assert arrange.deadline_s == 30.0


def test_a_pipeline_whose_members_start_before_their_leader_is_not_over(model):
    rollout = Followed()
    rollout.follow(model, 1, [P1])

    def seen(rank, runs):
        one = RankInventory(
            rank=rank, device="cpu", memory_bytes=1, context_address="", store_address="", units=[], pipeline=runs
        )
        inventory = InstanceInventory(
            instance=rank, market=Market.SPOT, liveness_address="", model=model, ranks=[one], epoch=1
        )
        return rollout.note_inventory(inventory, 1.0)

    assert seen("b", "p1") == []
    assert seen("a", None) == [], "the leader is still preparing"
    assert seen("a", "p1") == []
    assert seen("a", None) == ["p1"]
