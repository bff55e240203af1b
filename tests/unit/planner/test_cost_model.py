import math
from typing import Any

import msgspec
import pytest

from planner.core.cost_model import CostModel, Workload, guess_profile, interpolate
from planner.core.profile import Profile

MB = 1_000_000


@pytest.fixture
def make_costs(make_model, make_profile):
    def make(memory_bytes=2000 * MB, arrivals_per_s=0.0, profile=None, max_batch=16, **model):
        workload = Workload(arrivals_per_s=arrivals_per_s)
        return CostModel(make_model(**model), profile or make_profile(), memory_bytes, workload, max_batch)

    return make


def test_interpolation_follows_the_measured_points():
    assert interpolate((1, 4, 16), (1.0, 2.0, 8.0), 1) == 1.0
    assert interpolate((1, 4, 16), (1.0, 2.0, 8.0), 10) == 5.0
    assert interpolate((1, 4, 16), (1.0, 2.0, 8.0), 28) == 14.0
    assert interpolate((4,), (2.0,), 28) == 2.0


def test_one_stage_step_is_layers_and_head(make_costs):
    assert make_costs().step_ms(1, 1, num_decoding=1) == pytest.approx(30 * 0.8 + 6.0)


def test_stages_add_hops_to_one_sequence_and_overlap_many(make_costs):
    costs = make_costs()
    one = costs.decode_step_ms(1, 1, 1)
    assert costs.decode_step_ms(3, 1, 1) == pytest.approx(one + 2 * 0.4)
    # 3 sequences in 3 micro-batches: three turns of the slowest stage, about one way through all stages.
    assert costs.decode_step_ms(3, 1, 3) < 1.3 * one


def test_tensor_shards_pay_for_all_reduces(make_costs, make_profile):
    cheap = make_costs(profile=make_profile(all_reduce_ms=0.0))
    assert cheap.decode_step_ms(1, 3, 1) == pytest.approx(cheap.decode_step_ms(1, 1, 1) / 3)
    assert make_costs().decode_step_ms(1, 3, 1) > make_costs().decode_step_ms(1, 1, 1)


def test_prefill_is_not_cheaper_with_more_micro_batches(make_costs):
    costs = make_costs()
    assert costs.prefill_ms(1, 1) == pytest.approx(512 * 0.05 * 30 + 6.0)
    assert costs.prefill_ms(3, 1) > costs.prefill_ms(1, 1)


def test_kv_blocks_fill_what_the_weights_leave(make_costs):
    costs = make_costs(memory_bytes=1000 * MB)
    weights = 3 * (30 * 4_700_000 + 37_700_000 + 768)
    block_bytes = 30 * 3 * 512 * 16
    assert costs.weight_bytes(1, 1) == weights
    assert costs.num_kv_blocks(1, 1) == (1000 * MB - weights) // 2 // block_bytes
    assert costs.num_kv_blocks(1, 3) > costs.num_kv_blocks(1, 1)


def test_kv_blocks_are_no_more_than_all_sequences_can_use(make_costs):
    assert make_costs(memory_bytes=10**12).num_kv_blocks(1, 1) == 16 * 128


def test_tied_head_weighs_on_the_first_and_the_last_stage(make_costs):
    tied, untied = make_costs(), make_costs(tied_embeddings=False)
    last = tied.stages(2)[1]
    layers = last[1] - last[0] + 1
    assert tied.weight_bytes(2, 1) >= 3 * (layers * 4_700_000 + 37_700_000 + 768)
    assert untied.weight_bytes(2, 1) <= tied.weight_bytes(2, 1)


def test_model_that_does_not_fit_has_no_estimate(make_costs):
    costs = make_costs(memory_bytes=350 * MB)
    assert costs.num_kv_blocks(1, 1) == 0
    assert costs.estimate(1, 1, 1) is None
    assert costs.estimate(1, 3, 1) is not None


def test_one_longest_sequence_must_fit(make_costs):
    costs = make_costs()
    least = costs.weight_bytes(1, 1) + 128 * 30 * 3 * 512 * 16
    assert make_costs(memory_bytes=least - 1).num_kv_blocks(1, 1) == 0
    assert make_costs(memory_bytes=least).num_kv_blocks(1, 1) == 128


def test_throughput_grows_with_pipelines_and_latency_with_load(make_costs):
    idle, busy, flooded = make_costs(), make_costs(arrivals_per_s=0.5), make_costs(arrivals_per_s=100.0)
    one, two = idle.estimate(1, 1, 1), idle.estimate(2, 1, 1)
    assert two.throughput_per_s == pytest.approx(2 * one.throughput_per_s)
    assert busy.estimate(1, 1, 1).latency_s > one.latency_s
    assert flooded.estimate(1, 1, 1).latency_s == math.inf


def test_unusable_profile_is_replaced_by_a_guess(make_model, make_profile):
    unusable: list[dict[str, Any]] = [{"batch_sizes": []}, {"decode_layer_ms": [1.0]}, {"transfer_bytes_per_s": 0.0}]
    for changes in unusable:
        costs = CostModel(make_model(), make_profile(**changes), 10**9, Workload(), 16)
        assert costs.profile == Profile.from_steps(guess_profile(make_model()), make_model())


def test_guess_counts_a_tied_embedding_as_the_head(make_model):
    tied, untied = guess_profile(make_model()), guess_profile(make_model(tied_embeddings=False))
    assert tied.decode_head_ms[0] > untied.decode_head_ms[0]
    assert msgspec.structs.replace(tied, decode_head_ms=[]) == msgspec.structs.replace(untied, decode_head_ms=[])
