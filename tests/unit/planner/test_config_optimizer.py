import pytest

from planner.core.config_optimizer import Objective, Targets, choose_config
from planner.core.cost_model import CostModel, Workload

MB = 1_000_000


@pytest.fixture
def choose(make_model, make_profile):
    def run(num_ranks, memory_bytes=2000 * MB, arrivals_per_s=0.0, present=None, profile=None, **targets):
        costs = CostModel(
            make_model(), profile or make_profile(), memory_bytes, Workload(arrivals_per_s=arrivals_per_s), 16
        )
        return choose_config(costs, num_ranks, Targets(**targets), present)

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


def test_present_shape_stays_unless_another_is_clearly_better(choose, make_profile):
    # Two stages cost one hop of 0.01 ms: by far less than the least gain.
    # Prompts are short of work, since they hold up all micro-batches of a pipeline.
    times = {"decode_layer_ms": [0.8, 1.6, 6.4], "decode_head_ms": [0.01] * 3, "prefill_layer_ms_per_token": 0.001}
    near = make_profile(stage_hop_ms=0.01, **times)
    assert shape(choose(2, profile=near, data=None)) == (2, 1, 1)
    kept = choose(2, profile=near, present=(2, 1))
    gains = {a.config.pipeline: a for a in kept.alternatives}
    one, two = gains[1], gains[2]
    worth_it = 1 - one.latency_s / two.latency_s >= 0.1 or one.throughput_per_s / two.throughput_per_s >= 1.1
    assert shape(kept) == ((2, 1, 1) if worth_it else (1, 2, 1))
    assert not worth_it


def test_throughput_objective(choose, make_profile):
    fast = make_profile(all_reduce_ms=0.05)
    assert shape(choose(3, profile=fast, objective=Objective.THROUGHPUT)) == (3, 1, 1)


def test_alternatives_say_why(choose):
    choice = choose(3, memory_bytes=500 * MB)
    assert choice.alternatives[0].config == choice.config
    assert choice.alternatives[0].verdict.startswith("chosen: ")
    assert any(a.verdict.startswith("does not fit") for a in choice.alternatives[1:])
    assert any("against the chosen one" in a.verdict for a in choice.alternatives[1:])
    pinned = choose(3, pipeline=1)
    assert any("asks for pipeline 1" in a.verdict for a in pinned.alternatives)


def test_nothing_fits(choose):
    choice = choose(2, memory_bytes=10 * MB)
    assert choice.config is None
    assert choice.alternatives
    assert all("does not fit" in a.verdict for a in choice.alternatives)
    assert choose(0).config is None
