import pytest

from planner.core.alternatives import list_alternatives
from planner.core.config_optimizer import Objective, Supply, Targets, choose_config, choose_layout
from planner.core.cost_model import CostModel, Workload

MB = 1_000_000


@pytest.fixture
def make_costs(make_model, make_profile):
    def make(memory_bytes=2000 * MB, arrivals_per_s=0.0, profile=None, model=None):
        workload = Workload(arrivals_per_s=arrivals_per_s)
        return CostModel(model or make_model(), profile or make_profile(), memory_bytes, workload, 16)

    return make


@pytest.fixture
def choose(make_costs):
    def run(num_ranks, memory_bytes=2000 * MB, arrivals_per_s=0.0, profile=None, **targets):
        return choose_config(make_costs(memory_bytes, arrivals_per_s, profile), num_ranks, Targets(**targets))

    return run


def shape(choice):
    config = choice.config
    return config and (config.data, config.pipeline, config.tensor)


def test_ranks_that_exist_serve(choose):
    assert shape(choose(1)) == (1, 1, 1)
    assert shape(choose(3)) == (3, 1, 1)
    assert shape(choose(16)) == (16, 1, 1)


def test_memory_forces_stages(choose):
    assert shape(choose(1, memory_bytes=300 * MB)) is None
    _, pipeline, tensor = shape(choose(4, memory_bytes=300 * MB))
    assert pipeline * tensor > 1


def test_tensor_shards_when_reductions_are_cheap(choose, make_profile):
    fast = make_profile(all_reduce_ms=0.05)
    assert shape(choose(3, profile=fast)) == (1, 1, 3)
    assert shape(choose(3, profile=fast, arrivals_per_s=50.0))[0] == 3, "overloaded: throughput counts"


@pytest.mark.parametrize(
    ("targets", "num_ranks", "expected"),
    [
        ({"data": 1, "pipeline": 3, "tensor": 1}, 1, (1, 1, 1)),
        ({"data": 1, "pipeline": 3, "tensor": 1}, 2, (1, 2, 1)),
        ({"data": 1, "pipeline": 3, "tensor": 1}, 5, (1, 3, 1)),
        ({"data": 1, "pipeline": 1, "tensor": 3}, 2, (1, 1, 1)),
        ({"data": 1, "tensor": 3}, 3, (1, 1, 3)),
        ({"data": 2}, 2, (2, 1, 1)),
        ({"data": 2}, 1, (1, 1, 1)),
        ({"data": 2, "pipeline": 3}, 5, (1, 3, 1)),
    ],
)
def test_targets_are_met_or_nearly(choose, targets, num_ranks, expected):
    assert shape(choose(num_ranks, **targets)) == expected


def test_target_below_what_memory_allows_gives_the_closest_that_fits(choose):
    assert shape(choose(4, memory_bytes=500 * MB, pipeline=1, tensor=1, data=1)) == (1, 2, 1)


def test_throughput_objective(choose, make_profile):
    fast = make_profile(all_reduce_ms=0.05)
    assert shape(choose(3, profile=fast, objective=Objective.THROUGHPUT)) == (3, 1, 1)


def explain(costs, num_ranks, **targets):
    supply = Supply(num_ranks=num_ranks)
    choice = choose_layout(costs, supply, Targets(**targets))
    return choice, list_alternatives(costs, choice, choice.best, choice.why, supply)


def test_alternatives_say_why(make_costs):
    choice, alternatives = explain(make_costs(500 * MB), 3)
    assert alternatives[0].config == choice.config
    assert alternatives[0].verdict.startswith("chosen: ")
    assert any(a.verdict.startswith("does not fit") for a in alternatives[1:])
    assert any("against the chosen one" in a.verdict for a in alternatives[1:])
    _, pinned = explain(make_costs(), 3, pipeline=1)
    assert any("asks for pipeline 1" in a.verdict for a in pinned)
    _, loaded = explain(make_costs(arrivals_per_s=1.9), 3)
    assert any(a.verdict.startswith("does not keep up with 1.90 requests/s") for a in loaded)


def test_nothing_fits(make_costs):
    choice, alternatives = explain(make_costs(10 * MB), 2)
    assert choice.config is None
    assert alternatives
    assert all("does not fit" in a.verdict for a in alternatives)
    assert explain(make_costs(), 0)[0].config is None
