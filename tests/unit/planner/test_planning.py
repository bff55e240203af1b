import math

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.core.config_optimizer import Objective, Targets
from planner.core.cost_model import Workload
from planner.core.invariants import check_plan
from planner.core.planning import Situation, make_plan
from planner.errors import PlanInvariantError
from planner.protocol import UnitRange

NOW_S = 1000.0


def planned(situation, now_s):
    """A plan, where one is due."""
    plan = make_plan(situation, now_s)
    assert plan is not None
    return plan


@pytest.fixture
def make_situation(make_model, make_profile, make_rank):
    def make(num_ranks=3, memory_mb=2000, load_per_s=0.0, model=None, profile=None, **changes):
        names = [f"i{number}-0" for number in range(num_ranks)]
        fields = {
            "model": model or make_model(),
            "profile": profile or make_profile(),
            "ranks": {name: make_rank(name, memory_bytes=memory_mb * 1_000_000) for name in names},
            "targets": Targets(),
            "workload": Workload(arrivals_per_s=load_per_s),
            "last": None,
            "cause": "a test",
            "cause_at_s": NOW_S,
        }
        return Situation(**(fields | changes))

    return make


def serve(situation, plan, kv_tokens=0):
    """`plan` is carried out: its ranks hold what they need, and run."""
    ranks = dict(situation.ranks)
    for pipeline in plan.pipelines:
        for stage in pipeline.stages:
            layers = plan.model.layers_of_stage(stage.first_layer, stage.last_layer)
            for shard in stage.shards:
                groups = {"first_group": shard.first_group, "last_group": shard.last_group}
                units = [UnitRange(first_layer=layer, last_layer=layer, **groups) for layer in layers]
                rank = ranks[shard.rank]
                inventory = msgspec.structs.replace(
                    rank.inventory, units=units, kv_tokens=kv_tokens, pipeline=pipeline.id
                )
                ranks[shard.rank] = msgspec.structs.replace(rank, inventory=inventory)
    settled = frozenset(p.id for p in plan.pipelines)
    return msgspec.structs.replace(situation, ranks=ranks, last=plan, settled=settled)


def change(situation, **changes):
    return msgspec.structs.replace(situation, **changes)


def with_tokens(situation, tokens):
    """KV tokens by rank."""
    ranks = {
        name: msgspec.structs.replace(
            rank, inventory=msgspec.structs.replace(rank.inventory, kv_tokens=tokens.get(name, 0))
        )
        for name, rank in situation.ranks.items()
    }
    return change(situation, ranks=ranks)


def with_notice(situation, names, deadline_s):
    ranks = {
        name: msgspec.structs.replace(rank, deadline_s=deadline_s) if name in names else rank
        for name, rank in situation.ranks.items()
    }
    return change(situation, ranks=ranks)


def shapes(plan):
    return sorted((len(p.stages), p.tensor) for p in plan.pipelines)


def test_pipelines_of_unequal_shape_leave_no_rank_idle(make_situation):
    situation = make_situation(5, memory_mb=500, targets=Targets(objective=Objective.THROUGHPUT))
    plan = planned(situation, NOW_S)
    check_plan(plan)
    assert shapes(plan) == [(2, 1), (3, 1)]
    explanation = plan.explanation
    assert [(c.data, c.pipeline) for c in [explanation.chosen, *explanation.others]] == [(1, 3), (1, 2)]
    chosen = explanation.alternatives[0]
    assert (chosen.config.pipeline, chosen.others[0].pipeline, chosen.num_ranks) == (3, 2, 5)
    assert plan.pipelines[0].num_kv_blocks > 0


def test_an_odd_pipeline_joins_beside_those_that_serve(make_situation, make_rank):
    situation = make_situation(4, memory_mb=500, load_per_s=1.0)
    first = planned(change(situation, targets=Targets(pipeline=2)), NOW_S)
    assert shapes(first) == [(2, 1), (2, 1)]
    serving = serve(situation, first)
    more = {name: make_rank(name, memory_bytes=500_000_000) for name in ("j1-0", "j2-0", "j3-0")}
    second = planned(change(serving, ranks={**serving.ranks, **more}), NOW_S)
    check_plan(second, first)
    assert second.pipelines[:2] == first.pipelines
    assert shapes(second) == [(2, 1), (2, 1), (3, 1)]
    assert second.retiring == []


@pytest.fixture
def sharding(make_profile):
    """Steps that tensor shards make much faster."""
    return make_profile(all_reduce_ms=0.001, prefill_layer_ms_per_token=0.001)


def test_a_change_waits_for_calm(make_situation, sharding):
    situation = make_situation(3, profile=sharding, load_per_s=0.3, targets=Targets(tensor=1, pipeline=1))
    serving = serve(situation, planned(situation, NOW_S), kv_tokens=1000)
    free = change(serving, targets=Targets())
    assert make_plan(change(free, expected_calm_s=2.0), NOW_S) is None
    plan = planned(change(free, expected_calm_s=3600.0), NOW_S)
    assert shapes(plan) == [(1, 3)]
    assert any("in the 3600 s to the next event" in note for note in plan.explanation.notes)
    chosen, *rejected = plan.explanation.alternatives
    assert chosen.bytes_moved == plan.explanation.bytes_moved
    assert chosen.pause_s > 0
    assert rejected[0].bytes_moved == 0, "nothing moves if all stays"
    assert rejected[0].pause_s == 0
    assert all(a.pause_s == chosen.pause_s for a in rejected[1:]), "all others stop all pipelines"


def test_engines_that_must_be_built_anew_make_a_change_dearer(make_situation, sharding):
    situation = make_situation(3, profile=sharding, load_per_s=0.3, targets=Targets(tensor=1, pipeline=1))
    serving = serve(situation, planned(situation, NOW_S), kv_tokens=1000)
    ranks = {
        name: msgspec.structs.replace(rank, inventory=msgspec.structs.replace(rank.inventory, rebuild_s=60.0))
        for name, rank in serving.ranks.items()
    }
    free = change(serving, targets=Targets(), ranks=ranks)
    assert make_plan(change(free, expected_calm_s=90.0), NOW_S) is None
    assert make_plan(change(serving, targets=Targets(), expected_calm_s=90.0), NOW_S) is not None
    plan = planned(change(free, expected_calm_s=36000.0), NOW_S)
    assert shapes(plan) == [(1, 3)]
    assert plan.explanation.alternatives[0].pause_s > 60.0


def test_ranks_stay_idle_where_a_slow_pipeline_would_not_help(make_situation, make_model, sharding):
    situation = make_situation(3, profile=sharding, model=make_model(num_head_groups=2), load_per_s=0.01)
    plan = planned(situation, NOW_S)
    assert shapes(plan) == [(1, 2)]
    assert any(note.startswith("1 ranks without a position, as spares") for note in plan.explanation.notes)


def test_most_progress_is_handed_on_and_the_rest_requeued(make_situation, make_model):
    model = make_model(num_layers=3, max_model_len=64)
    situation = make_situation(4, model=model)
    serving = serve(situation, planned(situation, NOW_S))
    assert len(serving.last.pipelines) == 4
    leaders = {p.id: p.leader for p in serving.last.pipelines}
    room = 16 * 64
    serving = with_tokens(serving, dict(zip(leaders.values(), [10, room // 2, room, 20], strict=True)))
    plan = planned(change(serving, targets=Targets(pipeline=3, tensor=1, data=1)), NOW_S)
    check_plan(plan, serving.last)
    (new,) = plan.pipelines
    assert new.num_kv_blocks * model.kv_block_tokens == room
    assert new.inherits == ["p3"]
    assert sorted(r.pipeline.id for r in plan.retiring) == ["p1", "p2", "p3", "p4"]
    assert "sequences of p1, p2, p4 go back to the queue with their log: no new pipeline has room" in (
        plan.explanation.notes
    )


def test_a_long_notice_is_served_out_and_reviewed(make_situation):
    targets = Targets(pipeline=3, tensor=1, data=1)
    situation = make_situation(3, targets=targets, reviews_notices=True)
    serving = serve(situation, planned(situation, NOW_S))
    assert serving.review_at_s(NOW_S) == math.inf
    deadline_s = NOW_S + 120.0
    noticed = with_notice(serving, {"i1-0"}, deadline_s)
    plan = planned(noticed, NOW_S)
    assert [p.id for p in plan.pipelines] == ["p1"], "it serves on"
    assert plan.deadlines == {"i1": deadline_s}
    review_at_s = noticed.review_at_s(NOW_S)
    assert deadline_s - 40.0 < review_at_s <= deadline_s - 30.0
    later = change(noticed, last=plan)
    assert make_plan(later, review_at_s - 0.01) is None
    final = planned(later, review_at_s)
    assert shapes(final) == [(2, 1)]
    assert final.retiring[0].deadline_s == deadline_s
    assert noticed.review_at_s(review_at_s) == math.inf
    unwatched = planned(change(noticed, reviews_notices=False), NOW_S)
    assert shapes(unwatched) == [(2, 1)], "nobody would come back to it"


def test_costs_are_told_where_prices_are_known(make_situation):
    plan = planned(make_situation(4, num_ranks_per_instance=2, usd_per_rank_h=1.5), NOW_S)
    assert plan.explanation.alternatives[0].usd_per_h == 6.0
    assert planned(make_situation(4), NOW_S).explanation.alternatives[0].usd_per_h == 0.0


def test_instances_that_can_be_released_stay_unused_where_they_gain_little(make_situation):
    used = planned(make_situation(4, load_per_s=0.02, can_release=True), NOW_S)
    assert len(used.pipelines) < 4
    paid = planned(make_situation(4, load_per_s=0.02, can_release=True, num_paid_instances=4), NOW_S)
    assert len(paid.pipelines) == 4


event = st.tuples(
    st.sampled_from(["join", "leave", "notice", "load", "calm"]), st.integers(0, 9), st.sampled_from([0.0, 0.5, 2, 9])
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    events=st.lists(event, max_size=8),
    memory_mb=st.sampled_from([200, 330, 500, 2000]),
    hop_ms=st.floats(0.01, 2),
    reduce_ms=st.floats(0.001, 1),
    objective=st.sampled_from(list(Objective)),
)
def test_every_plan_holds_what_plans_promise(
    make_situation, make_profile, make_rank, events, memory_mb, hop_ms, reduce_ms, objective
):
    profile = make_profile(stage_hop_ms=hop_ms, all_reduce_ms=reduce_ms)
    targets = Targets(objective=objective, latency_s=5.0)
    situation = make_situation(6, memory_mb=memory_mb, profile=profile, targets=targets, reviews_notices=True)
    now_s = NOW_S
    for kind, number, value in [("calm", 0, 2.0), *events]:
        now_s += 1.0
        name, ranks = f"i{number}-0", dict(situation.ranks)
        if kind == "join":
            ranks.setdefault(name, make_rank(name, memory_bytes=memory_mb * 1_000_000))
        elif kind == "leave":
            ranks.pop(name, None)
        elif kind == "load":
            situation = change(situation, workload=Workload(arrivals_per_s=value))
        elif kind == "calm":
            situation = change(situation, expected_calm_s=100 * value)
        situation = change(situation, ranks=ranks)
        if kind == "notice":
            situation = with_notice(situation, {name}, now_s + 60 * value)
        plan = make_plan(situation, now_s)
        if plan is None:
            continue
        check_plan(plan, situation.last)
        named = [rank for p in plan.pipelines for rank in p.ranks()]
        assert set(named) <= set(situation.ranks)
        assert plan == make_plan(situation, now_s), "the same situation, another plan"
        if situation.last is not None and not plan.pipelines:
            assert not any(situation.is_intact(p) for p in situation.last.pipelines)
        situation = serve(situation, plan, kv_tokens=100)


def test_a_plan_that_hands_a_pipeline_on_twice_or_too_early_is_refused(make_situation):
    situation = make_situation(4, memory_mb=500)
    serving = serve(situation, planned(change(situation, targets=Targets(pipeline=2)), NOW_S))
    lost = change(serving, ranks={name: rank for name, rank in serving.ranks.items() if name != "i3-0"})
    plan = planned(change(lost, targets=Targets(pipeline=3)), NOW_S)
    (ended,) = (r.pipeline.id for r in plan.retiring if not r.broken)
    assert plan.pipelines[0].inherits == [ended]
    check_plan(plan, serving.last)
    for inherits in ([ended, ended], ["p99"]):
        heir = msgspec.structs.replace(plan.pipelines[0], inherits=inherits)
        wrong = msgspec.structs.replace(plan, pipelines=[heir, *plan.pipelines[1:]])
        with pytest.raises(PlanInvariantError, match=r"heirs|handed on"):
            check_plan(wrong, serving.last)
