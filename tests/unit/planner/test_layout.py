import itertools
import math

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from planner.core import layout_search
from planner.core.config_optimizer import NEAR_TIE, SAME_THROUGHPUT, Objective, Supply, Targets, choose_layout, pick
from planner.core.cost_model import CostModel, Workload
from planner.core.layout import Layout, Scorer, feasible_shapes
from planner.core.layout_search import Knapsack, fewest_pipelines, weigh

MB = 1_000_000


@pytest.fixture
def build_costs(make_model, make_profile):
    def build(memory_mb=2000, arrivals_per_s=0.0, layers=30, groups=4, max_batch=16, **profile):
        model = make_model(num_layers=layers, num_head_groups=groups, max_model_len=1024)
        workload = Workload(arrivals_per_s=arrivals_per_s)
        return CostModel(model, make_profile(**profile), memory_mb * MB, workload, max_batch)

    return build


def best_of(*args):
    """The chosen layout, where there is one."""
    best = choose_layout(*args).best
    assert best is not None
    return best


def with_load(costs, num_ranks, load):
    """The same with arrivals of `load` times the most that `num_ranks` ranks can serve."""
    most_per_s = max((s.throughput_per_s for s in brute_force(costs, num_ranks)), default=1.0)
    workload = Workload(arrivals_per_s=load * most_per_s)
    return CostModel(costs.model, costs.profile, costs.memory_bytes, workload, costs.max_batch)


def brute_force(costs, num_ranks):
    """Scores of all multisets of shapes on up to `num_ranks` ranks."""
    scorer = Scorer(costs)
    shapes = feasible_shapes(costs, num_ranks)[0]
    found = set()

    def extend(chosen, free):
        for shape in shapes:
            if shape[0] * shape[1] <= free:
                layout = Layout.of([*chosen, shape])
                if layout not in found:
                    found.add(layout)
                    extend([*chosen, shape], free - shape[0] * shape[1])

    extend([], num_ranks)
    return [scorer.score(layout) for layout in found]


costs_fields = st.fixed_dictionaries(
    {
        "memory_mb": st.sampled_from([150, 300, 600, 2000]),
        "layers": st.sampled_from([3, 6, 30]),
        "groups": st.sampled_from([2, 4]),
        "decode_layer_ms": st.tuples(st.floats(0.5, 1), st.floats(1, 2), st.floats(2, 9)).map(list),
        "stage_hop_ms": st.floats(0.01, 3),
        "all_reduce_ms": st.floats(0.001, 1),
        "prefill_layer_ms_per_token": st.floats(0.001, 0.1),
    }
)
loads = st.sampled_from([0.0, 0.2, 0.6, 0.9, 0.99, 1.1])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=costs_fields, num_ranks=st.integers(1, 8), load=loads)
def test_the_choice_is_the_best_of_all_layouts(build_costs, fields, num_ranks, load):
    costs = with_load(build_costs(**fields), num_ranks, load)
    every = brute_force(costs, num_ranks)
    best = choose_layout(costs, Supply(num_ranks=num_ranks), Targets()).best
    if best is None:
        assert not every
        return
    assert best.layout.num_ranks <= num_ranks
    assert best_of(costs, Supply(num_ranks=num_ranks), Targets()) == best
    enough = [s for s in every if s.throughput_per_s > costs.workload.arrivals_per_s]
    if not enough:
        most_per_s = max(s.throughput_per_s for s in every)
        assert best.throughput_per_s >= (1 - NEAR_TIE) * most_per_s
        assert best.service_s == min(s.service_s for s in every if s.throughput_per_s >= (1 - NEAR_TIE) * most_per_s)
        return
    assert best.keeps_up, "overloaded, and another layout would not be"
    limit_s = (1 + NEAR_TIE) * min(s.latency_s for s in enough)
    assert best.latency_s <= limit_s
    most_per_s = max(s.throughput_per_s for s in enough if s.latency_s <= limit_s)
    assert best.throughput_per_s >= (1 - SAME_THROUGHPUT) * most_per_s


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=costs_fields, num_ranks=st.integers(2, 9), load=loads)
def test_large_fleets_get_nearly_the_best_without_looking_at_all_layouts(build_costs, fields, num_ranks, load):
    costs = with_load(build_costs(**fields), num_ranks, load)
    every = brute_force(costs, num_ranks)
    assume(every)
    scorer = Scorer(costs)
    shapes = feasible_shapes(costs, num_ranks)[0]
    built = [scorer.score(x) for x in layout_search._constructed(scorer, shapes, num_ranks, num_ranks)]
    assert max(s.throughput_per_s for s in built) == pytest.approx(max(s.throughput_per_s for s in every))
    assert any(s.keeps_up for s in built) == any(s.keeps_up for s in every)
    if any(s.keeps_up for s in every):
        assert min(s.latency_s for s in built) <= 1.05 * min(s.latency_s for s in every)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=costs_fields)
def test_more_ranks_never_give_less_throughput(build_costs, fields):
    costs = build_costs(**fields)
    shapes = feasible_shapes(costs, 24)[0]
    assume(shapes)
    most_per_s = list(Knapsack(Scorer(costs), shapes, 24).throughput_per_s)
    assert most_per_s == sorted(most_per_s)
    targets = Targets(objective=Objective.THROUGHPUT)
    for num_ranks, limit_per_s in enumerate(most_per_s):
        best = choose_layout(costs, Supply(num_ranks=num_ranks), targets).best
        assert (best.throughput_per_s if best else 0.0) >= (1 - NEAR_TIE) * limit_per_s


@pytest.mark.parametrize("load", [0.0, 0.7])
def test_equal_pipelines_score_as_the_cost_model_says(build_costs, load):
    costs = with_load(build_costs(), 4, load)
    score = Scorer(costs).score(Layout.of({(2, 1): 2}))
    estimate = costs.estimate(2, 2, 1)
    assert score.throughput_per_s == pytest.approx(estimate.throughput_per_s)
    assert score.latency_s == pytest.approx(estimate.latency_s)
    assert score.service_s == pytest.approx(estimate.service_s)


def test_arrivals_weigh_the_latency_of_unequal_pipelines(build_costs):
    costs = build_costs(arrivals_per_s=0.2)
    scorer = Scorer(costs)
    score = scorer.score(Layout.of([(1, 1), (3, 1)]))
    shares = [scorer.throughput_per_s(s) / score.throughput_per_s for s in [(1, 1), (3, 1)]]
    parts = [costs.service_s(*s, 0.2 * share) for s, share in zip([(1, 1), (3, 1)], shares, strict=True)]
    assert score.service_s == pytest.approx(sum(a * b for a, b in zip(shares, parts, strict=True)))
    assert scorer.score(Layout.of([(1, 1)])).keeps_up
    assert not Scorer(build_costs(arrivals_per_s=50.0)).score(Layout.of([(1, 1), (3, 1)])).keeps_up


GPUS = {
    "decode_layer_ms": [3.0, 3.2, 4.0],
    "decode_head_ms": [2.0, 2.1, 2.5],
    "prefill_layer_ms_per_token": 0.02,
    "stage_hop_ms": 0.1,
    "all_reduce_ms": 0.02,
}


def test_44_ranks_do_not_idle_where_pipelines_of_16_leave_12(build_costs):
    costs = build_costs(memory_mb=300, groups=8, layers=60, **GPUS)
    shapes = feasible_shapes(costs, 44)[0]
    assert (2, 8) in shapes
    assert (1, 8) not in shapes
    scorer = Scorer(costs)
    two = scorer.score(Layout.of({(2, 8): 2}))
    best, _ = pick(weigh(scorer, shapes, 44), Supply(num_ranks=44), Targets(objective=Objective.THROUGHPUT))
    assert best.layout.num_ranks > 32
    assert best.throughput_per_s > 1.2 * two.throughput_per_s
    around = list(layout_search._around(scorer, two.layout, [], set(shapes), 44, Knapsack(scorer, shapes, 44)))
    assert any(dict(x.counts).get((2, 8)) == 2 and x.num_ranks > 40 for x in around)
    assert any(dict(x.counts).get((3, 8)) == 1 and dict(x.counts).get((2, 8)) == 1 for x in around), "a stage more"


def test_a_slow_odd_pipeline_is_not_used_unless_the_load_needs_it(build_costs):
    slow_alone = build_costs(memory_mb=2000, groups=2, all_reduce_ms=0.001, prefill_layer_ms_per_token=0.001)
    supply = Supply(num_ranks=3)
    calm = best_of(slow_alone, supply, Targets())
    assert calm.layout == Layout.of([(1, 2)])
    busy = best_of(with_load(slow_alone, 3, 0.97), supply, Targets())
    assert busy.layout.num_ranks == 3
    assert busy.keeps_up


def test_pinned_degrees_forbid_odd_pipelines(build_costs):
    costs = build_costs()
    best = best_of(costs, Supply(num_ranks=7), Targets(pipeline=2, tensor=1))
    assert best.layout == Layout.of({(2, 1): 3})
    best = best_of(costs, Supply(num_ranks=7), Targets(data=2))
    assert best.layout.num_pipelines == 2


def test_fewest_pipelines_that_are_enough(build_costs):
    scorer = Scorer(build_costs())
    one_per_s = scorer.throughput_per_s((1, 1))
    found = fewest_pipelines(scorer, (1, 1), 100, lambda s: s.throughput_per_s >= 6.5 * one_per_s)
    assert found is not None
    assert found.layout == Layout.of({(1, 1): 7})
    assert fewest_pipelines(scorer, (1, 1), 6, lambda s: s.throughput_per_s >= 6.5 * one_per_s) is None
    assert fewest_pipelines(scorer, (1, 1), 0, lambda s: True) is None


def test_layouts_count_and_speak():
    layout = Layout.of([(2, 8), (3, 4), (2, 8)])
    assert layout == Layout.of({(3, 4): 1, (2, 8): 2, (9, 9): 0})
    assert (layout.num_ranks, layout.num_pipelines, layout.main) == (44, 3, (2, 8))
    assert layout.shapes() == [(2, 8), (2, 8), (3, 4)]
    assert str(layout) == "2 pipelines of 2 stages x 8 shards and 1 pipeline of 3 stages x 4 shards"
    assert layout.missing_from(Layout.of([(2, 8)])) == Layout.of([(2, 8), (3, 4)])
    assert str(Layout.of([])) == "no pipelines"


def test_the_cheapest_meets_a_latency_target(build_costs):
    costs = with_load(build_costs(groups=2), 8, 0.4)
    free = Supply(num_ranks=8, num_paid_instances=0)
    scores = brute_force(costs, 8)
    for latency_s in sorted({s.latency_s for s in scores if s.keeps_up})[:: max(1, len(scores) // 10)]:
        targets = Targets(objective=Objective.SLO, latency_s=latency_s)
        best = best_of(costs, free, targets)
        assert best.latency_s <= latency_s
        assert best.layout.num_ranks == min(s.layout.num_ranks for s in scores if s.latency_s <= latency_s)
    hopeless = choose_layout(costs, free, Targets(objective=Objective.SLO, latency_s=1e-3))
    assert hopeless.best is not None
    assert hopeless.best.latency_s <= (1 + NEAR_TIE) * min(s.latency_s for s in scores)
    assert "none has a latency" in hopeless.why


def test_near_ties_go_to_the_fewest_instances_that_must_be_paid(build_costs):
    costs = with_load(build_costs(), 8, 0.1)
    paid = best_of(costs, Supply(num_ranks=8), Targets())
    extra = best_of(costs, Supply(num_ranks=8, num_paid_instances=0), Targets())
    assert extra.layout.num_ranks < paid.layout.num_ranks
    assert extra.latency_s <= (1 + NEAR_TIE) * paid.latency_s
    some = best_of(costs, Supply(num_ranks=8, num_paid_instances=5), Targets())
    assert some.layout.num_ranks >= extra.layout.num_ranks


def test_slo_needs_a_latency():
    with pytest.raises(ValueError, match="latency_s"):
        Targets(objective=Objective.SLO)


@pytest.mark.parametrize("num_ranks", [48, 4096])
def test_large_fleets_have_a_choice(build_costs, num_ranks):
    costs = build_costs(memory_mb=300, groups=8, layers=80, max_batch=64, **GPUS)
    for arrivals_per_s, objective in itertools.product((0.0, 3.0, 1e6), (Objective.LATENCY, Objective.SLO)):
        workload = Workload(arrivals_per_s=arrivals_per_s)
        costs = CostModel(costs.model, costs.profile, costs.memory_bytes, workload, costs.max_batch)
        supply = Supply(num_ranks=num_ranks, num_ranks_per_instance=4, num_paid_instances=0)
        choice = choose_layout(costs, supply, Targets(objective=objective, latency_s=60.0))
        assert choice.best is not None
        assert choice.best.layout.num_ranks <= num_ranks
        assert choice.best.latency_s < math.inf or arrivals_per_s > 0
