import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.simulator.policies.paper import RUNS, PaperPolicy
from loadtest.simulator.policies.paper_migration import Kept, extended, first_layout, move, ranks_of
from loadtest.simulator.policies.paper_run import Overheads, PaperOptions
from loadtest.simulator.result import Fate
from loadtest.simulator.scenario import CapacityEvent, CapacityTrace, Prices, Request, Scenario
from planner.core.links import Links
from planner.core.profile import DegreeTimes, Profile
from planner.protocol import Market, ModelShape

# One pipeline on one instance of two ranks: (1, 2) is the best shape; a batch of any size takes 1 + 10 * 0.1 = 2 s.
LAYERS, OUTPUT = 4, 10
PROFILE = Profile(
    name="test",
    num_layers=LAYERS,
    degrees={
        1: DegreeTimes(batch_sizes=[1, 2, 4], decode_layer_ms=[50] * 3, prefill_layer_ms=[500] * 3),
        2: DegreeTimes(batch_sizes=[1, 2, 4], decode_layer_ms=[25] * 3, prefill_layer_ms=[250] * 3),
    },
    head_batch_sizes=[1, 2, 4],
    head_ms=[0, 0, 0],
)
MODEL = ModelShape(
    name="test",
    num_layers=LAYERS,
    num_head_groups=2,
    decoder_unit_bytes=1_000_000,
    embedding_unit_bytes=1_000_000,
    head_unit_bytes=1_000_000,
    kv_unit_bytes_per_token=1,
    kv_block_tokens=16,
    max_model_len=1024,
    hidden_bytes_per_token=8,
    tied_embeddings=False,
)
WEIGHTS_BYTES = 2 * (LAYERS + 2) * 1_000_000
PREFILL_S, STEP_S, BATCH_S = 1.0, 0.1, 2.0
OVERHEADS = Overheads(engine_start_s=3.0, daemon_restart_s=5.0)
OPTIONS = PaperOptions(overheads=OVERHEADS)


def add(at_s, *names, market=Market.SPOT):
    return CapacityEvent(at_s=at_s, added=names, market=market)


def remove(at_s, *names):
    return CapacityEvent(at_s=at_s, removed=names)


def scenario(events, arrivals_s, end_s=400.0, output_tokens=OUTPUT, **changes):
    requests = tuple(
        Request(id=i, arrival_s=at_s, prompt_tokens=512, output_tokens=output_tokens)
        for i, at_s in enumerate(arrivals_s)
    )
    base = Scenario(
        name="test",
        model=MODEL,
        profile=PROFILE,
        trace=CapacityTrace(name="test", events=tuple(events), end_s=end_s),
        requests=requests,
        ranks_per_instance=2,
        memory_bytes=10**9,
        links=Links(inter_bytes_per_s=1e6, intra_bytes_per_s=1e6, disk_bytes_per_s=1e6, fixed_s=0.5),
        required_per_s=100.0,
        min_ranks=2,
        max_batch=4,
    )
    return msgspec.structs.replace(base, **changes)


def run(name, given_scenario, options=OPTIONS):
    return PaperPolicy(name, options).run(given_scenario, lambda now_s: None)


def every(gap_s, end_s, first_s=4.0):
    return [first_s + gap_s * i for i in range(int((end_s - first_s) / gap_s))]


def test_spotserve_resumes_what_it_cut_and_the_baseline_begins_again():
    # One instance goes at 100, and there is no pipeline of it to spare. The batch that began at 97 s is cut.
    events = [add(0, "a", "b"), remove(100, "a")]
    spot = scenario(events, [97.0, 97.0], output_tokens=100)
    resumed, restarted = run("spotserve-paper", spot), run("reparallelization", spot)
    assert {o.fate for o in resumed.outcomes + restarted.outcomes} == {Fate.COMPLETED}
    assert sum(o.tokens_recomputed for o in resumed.outcomes) > 0  # one pipeline is left for two batches
    assert sum(o.tokens_recomputed for o in restarted.outcomes) > sum(o.tokens_recomputed for o in resumed.outcomes)
    assert max(o.ended_s for o in resumed.outcomes) < max(o.ended_s for o in restarted.outcomes)
    assert resumed.pauses[0].tokens_recomputed == sum(o.tokens_recomputed for o in resumed.outcomes)


def test_the_batch_with_most_progress_is_kept_when_pipelines_become_fewer():
    events = [add(0, "a", "b"), remove(100, "a")]
    arrivals_s = [95.0, 97.0]
    result = run("spotserve-paper", scenario(events, arrivals_s, output_tokens=100))
    first, second = result.outcomes
    assert first.tokens_recomputed == 0
    assert second.tokens_recomputed > 512
    assert first.ended_s < second.ended_s


def test_the_artifact_loses_what_has_no_place():
    events = [add(0, "a", "b"), remove(100, "a")]
    spot = scenario(events, [95.0, 97.0], output_tokens=100)
    options = msgspec.structs.replace(OPTIONS, artifact_faults=True)
    fates = [o.fate for o in run("spotserve-paper", spot, options).outcomes]
    assert fates == [Fate.COMPLETED, Fate.LOST]


def test_a_restart_takes_daemons_disk_and_engines():
    events = [add(0, "a", "b"), remove(100, "a")]
    spot = scenario(events, [])
    (pause,) = run("reparallelization", spot).pauses
    load_s = WEIGHTS_BYTES / 1e6
    stopped_early_s = PREFILL_S  # they were idle
    assert pause.pause_s == pytest.approx(OVERHEADS.daemon_restart_s + load_s + OVERHEADS.engine_start_s)
    # The engines ended when the time left was too short for a prefill and the planned stop.
    (_, after) = run("reparallelization", spot).fleet
    assert after.at_s == pytest.approx(100 - 0.5 - stopped_early_s + pause.pause_s)


def test_spotserve_starts_engines_while_context_moves():
    # b holds all that its only pipeline needs: nothing moves but the constant, and the engines' start hides it.
    events = [add(0, "a", "b"), remove(100, "a")]
    (pause,) = run("spotserve-paper", scenario(events, [])).pauses
    assert pause.pause_s == pytest.approx(OVERHEADS.engine_start_s)
    assert pause.moved_bytes == 0
    off = msgspec.structs.replace(OPTIONS, migration_planner=False)
    (serial,) = run("spotserve-paper", scenario(events, []), off).pauses
    assert serial.pause_s == pytest.approx(OVERHEADS.engine_start_s + 0.5)


def test_more_pipelines_of_the_same_shape_do_not_stop_those_that_there_are():
    events = [add(0, "a"), add(100, "b")]
    arrivals_s = every(1.0, 200)
    result = run("spotserve-paper", scenario(events, arrivals_s))
    assert [len(sample.shapes) for sample in result.fleet] == [1, 2]
    assert result.fleet[1].at_s == pytest.approx(100 + max(WEIGHTS_BYTES / 1e6 + 0.5, OVERHEADS.engine_start_s))
    assert max(o.latency_s for o in result.outcomes) < 3 * BATCH_S
    stops = msgspec.structs.replace(OPTIONS, migration_planner=False)
    assert max(o.latency_s for o in run("spotserve-paper", scenario(events, arrivals_s), stops).outcomes) > 10


def test_an_addition_and_a_removal_within_the_notice_are_one_event():
    events = [add(0, "a", "b"), add(100, "c"), remove(120, "a")]
    assert len(run("spotserve-paper", scenario(events, [])).pauses) == 1
    assert len(run("reparallelization", scenario(events, [])).pauses) == 2


def test_losing_an_idle_instance_changes_nothing():
    options = msgspec.structs.replace(OPTIONS, controller=False, controller_min_ranks=4)
    events = [add(0, "a", "b", "c"), remove(100, "c")]
    arrivals_s = every(1.0, 200)
    result = run("spotserve-paper", scenario(events, arrivals_s), options)
    assert result.pauses == ()
    assert result.fleet[0].num_ranks_used == 4


def test_rerouting_keeps_its_shape_and_loses_only_the_pipelines_that_were_hit():
    # min_ranks 4: pipelines of two instances.
    events = [add(0, "a", "b", "c", "d"), remove(100, "a"), add(200, "e")]
    result = run("rerouting", scenario(events, every(1.0, 350), min_ranks=4))
    shapes = [sample.shapes for sample in result.fleet]
    assert shapes == [((2, 2), (2, 2)), ((2, 2),), ((2, 2), (2, 2))]
    load_s = WEIGHTS_BYTES / 2 / 1e6
    assert result.fleet[2].at_s == pytest.approx(200 + load_s + OVERHEADS.engine_start_s)
    assert {o.fate for o in result.outcomes} == {Fate.COMPLETED}


def test_rerouting_batches_as_the_solver_says_and_the_others_as_the_scripts_do():
    # A single request is soonest served alone, and one pipeline alone is fast enough: the solver takes batches of 1.
    slow = msgspec.structs.replace(
        PROFILE,
        degrees={2: DegreeTimes(batch_sizes=[1, 2, 4], decode_layer_ms=[25, 26, 27], prefill_layer_ms=[250, 260, 270])},
    )
    given_scenario = scenario([add(0, "a")], [4.0] * 4, profile=slow, required_per_s=0.1)
    alone = run("rerouting", given_scenario)
    together = run("spotserve-paper", given_scenario)
    assert len({o.ended_s for o in alone.outcomes}) == 4
    assert len({o.ended_s for o in together.outcomes}) < 4


def test_without_enough_instances_nothing_is_served_and_requests_wait():
    events = [add(0, "a"), add(100, "b")]
    for name in RUNS:
        result = run(name, scenario(events, [10.0], min_ranks=4))
        assert result.fleet[0].shapes == (), name
        assert result.outcomes[0].fate is Fate.COMPLETED, name
        assert result.outcomes[0].ended_s > 100, name


def test_a_fleet_that_never_suffices_leaves_everything_unfinished():
    for name in RUNS:
        result = run(name, scenario([add(0, "a")], [10.0], min_ranks=64))
        (outcome,) = result.outcomes
        assert (outcome.fate, outcome.ended_s) == (Fate.UNFINISHED, 400.0), name


def test_a_cut_at_the_end_of_the_trace_counts_what_is_under_way():
    for name in RUNS:
        result = run(name, scenario([add(0, "a")], [399.5, 401.0], drain_s=0.0))
        assert [o.fate for o in result.outcomes] == [Fate.UNFINISHED] * 2, name
        assert result.outcomes[0].ended_s == 400.0, name


def test_rent_is_paid_from_the_request_to_the_end():
    events = [add(0, "a"), add(200, "b", market=Market.ON_DEMAND), remove(300, "a")]
    prices = Prices(spot_per_h=3600.0, on_demand_per_h=7200.0)
    result = run("spotserve-paper", scenario(events, [], prices=prices, acquisition_s=120.0))
    assert result.instance_hours_spot * 3600 == pytest.approx(300)
    assert result.instance_hours_on_demand * 3600 == pytest.approx(400 - 80)
    assert result.cost_usd == pytest.approx(300 + 2 * 320)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'spotserve' is none of spotserve-paper"):
        PaperPolicy("spotserve")


@settings(max_examples=30, deadline=None)
@given(
    changes=st.lists(st.tuples(st.floats(1, 60), st.booleans(), st.integers(1, 3)), max_size=6),
    first=st.integers(1, 5),
    gap_s=st.floats(0.4, 5),
)
def test_whatever_happens_no_request_is_lost_and_all_end_where_a_fleet_is_left(changes, first, gap_s):
    alive = [f"a{i}" for i in range(first)]
    events, at_s = [add(0, *alive)], 0.0
    for number, (after_s, grows, num) in enumerate(changes):
        at_s += after_s
        if grows:
            names = [f"b{number}-{i}" for i in range(num)]
            alive += names
            events.append(add(at_s, *names))
        elif alive[num:]:
            events.append(remove(at_s, *alive[:num]))
            alive = alive[num:]
    given_scenario = scenario(events, every(gap_s, at_s + 20), end_s=at_s + 60)
    for name in RUNS:
        result = run(name, given_scenario)
        assert len(result.outcomes) == len(given_scenario.requests)
        assert {o.fate for o in result.outcomes} <= {Fate.COMPLETED}, name
        assert all(o.tokens_done == OUTPUT for o in result.outcomes), name
        assert result == run(name, given_scenario)


# --- Matching and bytes ---


def layouts(shape, instances, given_scenario, **kwargs):
    old = first_layout(shape, ranks_of(["a", "b"], 2))
    return old, move(given_scenario, old, shape, instances, **kwargs)


def test_nothing_moves_if_nothing_changes():
    given_scenario = scenario([add(0, "a", "b")], [])
    old, moved = layouts((1, 2, 2), ["a", "b"], given_scenario)
    assert moved.layout.places == old.places
    assert (moved.moved_bytes, moved.seconds) == (0, 0.5)


def test_a_new_instance_gets_what_the_lost_one_had():
    given_scenario = scenario([add(0, "a", "b")], [])
    old, moved = layouts((1, 2, 2), ["c", "b"], given_scenario)
    assert all(moved.layout.places[rank] == old.places[rank] for rank in ranks_of(["b"], 2))
    assert moved.moved_bytes == WEIGHTS_BYTES / 2
    assert moved.seconds == pytest.approx(0.5 + WEIGHTS_BYTES / 2 / 1e6)


def test_without_a_mapper_positions_are_dealt_out_in_order():
    given_scenario = scenario([add(0, "a", "b")], [])
    _, moved = layouts((1, 2, 2), ["b", "c"], given_scenario, matched=False)
    assert moved.moved_bytes == WEIGHTS_BYTES


def test_kv_is_matched_and_counted():
    given_scenario = scenario([add(0, "a", "b")], [])
    old = first_layout((2, 1, 2), ranks_of(["a", "b"], 2))
    kept = [Kept(old_replica=1, new_replica=0, num_tokens=100)]
    stays = move(given_scenario, old, (1, 1, 2), ["a", "b"], kept)
    assert {rank.instance for rank in stays.layout.places} == {"b"}
    assert stays.moved_bytes == 0
    moves = move(given_scenario, old, (1, 1, 2), ["a", "b"], kept, matched=False)
    assert moves.moved_bytes == 100 * 2 * LAYERS


def test_weights_that_a_neighbour_holds_move_inside_the_instance():
    # Two one-rank replicas of the whole model become one of two stages: nothing moves. Back again: half the model each.
    given_scenario = scenario([add(0, "a")], [])
    ranks = ranks_of(["a"], 2)
    split = move(given_scenario, first_layout((2, 1, 1), ranks), (1, 2, 1), ["a"])
    assert split.moved_bytes == 0
    whole = move(given_scenario, split.layout, (2, 1, 1), ["a"])
    assert whole.moved_bytes == WEIGHTS_BYTES
    assert whole.seconds == pytest.approx(0.5 + WEIGHTS_BYTES / 1e6)


def test_more_pipelines_leave_the_others_where_they_are():
    given_scenario = scenario([add(0, "a", "b")], [])
    old = first_layout((1, 1, 2), ranks_of(["a"], 2))
    moved = extended(given_scenario, old, 2, ["a", "b"])
    assert moved.layout.replicas() == [frozenset({"a"}), frozenset({"b"})]
    assert moved.moved_bytes == WEIGHTS_BYTES
    assert not math.isinf(moved.seconds)
