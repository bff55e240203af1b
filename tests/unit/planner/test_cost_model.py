import math
import random
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.core.cost_model import CostModel, Workload, interpolate
from planner.core.measured_profile import guess_profile
from planner.core.profile import DegreeTimes, Profile
from planner.errors import ProfileError

MB = 1_000_000
TOLERANCE = 0.15
"""Of predicted latency against the simulation of one pipeline."""


@pytest.fixture
def make_costs(make_model, make_profile):
    def make(memory_bytes=2000 * MB, arrivals_per_s=0.0, profile=None, max_batch=16, prompt_tokens=512.0, **model):
        workload = Workload(arrivals_per_s=arrivals_per_s, prompt_tokens=prompt_tokens)
        return CostModel(make_model(**model), profile or make_profile(), memory_bytes, workload, max_batch)

    return make


def test_interpolation_follows_the_measured_points():
    assert interpolate((1, 4, 16), (1.0, 2.0, 8.0), 1) == 1.0
    assert interpolate((1, 4, 16), (1.0, 2.0, 8.0), 10) == 5.0
    assert interpolate((1, 4, 16), (1.0, 2.0, 8.0), 28) == 14.0
    assert interpolate((4,), (2.0,), 28) == 2.0
    # Times that were measured as falling are noise: they do not fall to zero beyond.
    assert interpolate((1, 4), (2.0, 1.5), 28) == 1.5


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


def test_chunks_of_a_prompt_follow_each_other_through_the_stages(make_costs):
    costs = make_costs()
    # Two chunks of 256 tokens, each with a step's 6 ms of embedding and head.
    assert costs.prefill_ms(1, 1) == pytest.approx(512 * 0.05 * 30 + 2 * 6.0)
    # Four turns of a third of the layers each, instead of six: the second chunk is a stage behind the first.
    assert costs.prefill_ms(3, 1) == pytest.approx(4 / 6 * costs.prefill_ms(1, 1), rel=0.1)
    assert costs.prefill_ms(3, 1) > 4 / 6 * 512 * 0.05 * 30


def test_short_prompts_are_not_cheaper_in_more_stages(make_costs):
    costs = make_costs(prompt_tokens=64)
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


def test_every_sequence_waits_for_the_turns_of_all_micro_batches(make_costs):
    # 12 sequences in 3 micro-batches of 4: layers of 1.0 ms, a head of 7.0 ms, hops of 0.4 ms.
    costs = make_costs()
    sizes = [last - first + 1 for first, last in costs.stages(3)]
    slowest_ms = max(sizes[0] * 1.0, sizes[-1] * 1.0 + 7.0) + 0.4
    assert costs.step_ms(3, 1, num_decoding=12) == pytest.approx(max(3 * slowest_ms, 30 * 1.0 + 7.0 + 2 * 0.4))


def test_prompt_beside_decodes_adds_its_work_to_every_stage(make_costs):
    costs = make_costs()
    alone_ms = costs.step_ms(1, 1, num_decoding=4)
    # 64 tokens are what was measured: 3.2 ms a layer, of which a decode step of one sequence is in the base.
    assert costs.step_ms(1, 1, num_decoding=4, prefill_tokens=64) == pytest.approx(alone_ms + 30 * (3.2 - 0.8))
    # In a pipeline it holds up the micro-batches behind it, all the way round.
    in_stages_ms = costs.step_ms(3, 1, num_decoding=12, prefill_tokens=512)
    assert in_stages_ms > 4 / 6 * 512 * 0.05 * 30
    assert in_stages_ms == pytest.approx(costs.step_ms(3, 1, num_decoding=0, prefill_tokens=512), rel=0.05)


def test_prompts_of_one_round_overlap_in_the_stages(make_costs):
    costs = make_costs()
    one, two = (costs.step_ms(3, 1, num_decoding=12, prefill_tokens=512 * n) for n in (1, 2))
    # Four chunks through three stages take six turns; two take four.
    assert two == pytest.approx(6 / 4 * one, rel=0.1)
    one, two = (costs.step_ms(1, 1, num_decoding=12, prefill_tokens=512 * n) for n in (1, 2))
    assert two > 1.8 * one


def test_context_beyond_the_measured_one_is_read_too(make_costs):
    costs = make_costs()
    short, long = (costs.step_ms(1, 1, num_decoding=4, context_tokens=tokens) for tokens in (64, 1064))
    assert costs.step_ms(1, 1, num_decoding=4) == short
    kv_ms_per_token = 0.8 * 512 / 4_700_000
    assert long - short == pytest.approx(30 * 4 * 1000 * kv_ms_per_token)
    assert costs.step_ms(1, 3, num_decoding=4, context_tokens=1064) - costs.step_ms(
        1, 3, num_decoding=4
    ) == pytest.approx((long - short) / 3)


def test_nothing_to_do_takes_no_time(make_costs):
    assert make_costs().step_ms(2, 1, num_decoding=0) == 0.0


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pipeline=st.integers(1, 30),
    tensor=st.sampled_from([1, 3]),
    num_decoding=st.integers(1, 64),
    prefill_tokens=st.integers(0, 2000),
    context_tokens=st.integers(0, 4000),
)
def test_more_work_never_takes_less_time(make_costs, pipeline, tensor, num_decoding, prefill_tokens, context_tokens):
    costs = make_costs()

    def step_ms(more_sequences=0, more_prompt=0, more_context=0):
        return costs.step_ms(
            pipeline,
            tensor,
            num_decoding=num_decoding + more_sequences,
            prefill_tokens=prefill_tokens + more_prompt,
            context_tokens=max(64, context_tokens) + more_context,
        )

    least_ms = step_ms() * (1 - 1e-9)
    assert step_ms(more_prompt=100) >= least_ms
    assert step_ms(more_context=100) >= least_ms
    if num_decoding >= pipeline:  # Below, a further sequence is a further micro-batch, and a prompt has one less.
        assert step_ms(more_sequences=1) >= least_ms


def test_degrees_are_those_that_were_measured(make_model, make_costs):
    assert make_costs().tensor_degrees() == [1, 3]
    times = DegreeTimes(batch_sizes=[1], decode_layer_ms=[1.0], prefill_layer_ms=[9.0])
    measured = Profile(
        name="mine", num_layers=30, degrees={1: times, 2: times}, head_batch_sizes=[1], head_ms=[1.0], fix_factor=1.1
    )
    costs = CostModel(make_model(), measured, 10**9, Workload(), 4)
    assert costs.tensor_degrees() == [1]
    assert costs.step_ms(1, 1, num_decoding=1) == pytest.approx(1.1 * 31.0)
    with pytest.raises(ProfileError, match="profile mine: degrees: tensor degree 3 was not measured, only 1, 2"):
        costs.latency_s(1, 3, 0.1)
    with pytest.raises(ProfileError, match="profile mine: num_layers: 30, but tiny has 12"):
        CostModel(make_model(num_layers=12), measured, 10**9, Workload(), 4)


def test_shapes_that_do_not_fit_serve_nothing(make_costs):
    costs = make_costs(memory_bytes=350 * MB)
    assert costs.throughput_per_s(1, 1) == 0.0
    assert costs.latency_s(1, 1, 0.1) == math.inf
    assert costs.service_s(1, 1, 0.1) == math.inf


def test_latency_of_a_lone_request_is_its_prompt_and_steps(make_costs):
    costs = make_costs()
    expected_ms = costs.prefill_ms(2, 1) + 127 * costs.decode_step_ms(2, 1, 1)
    assert 1000 * costs.latency_s(2, 1, 1e-6) == pytest.approx(expected_ms, rel=0.01)
    assert costs.service_s(2, 1, 0.0) == pytest.approx(costs.latency_s(2, 1, 1e-6), rel=0.01)


def test_overloaded_pipeline_serves_full_batches(make_costs):
    costs = make_costs()
    most_per_s = costs.throughput_per_s(1, 1)
    assert costs.latency_s(1, 1, most_per_s) == math.inf
    assert costs.service_s(1, 1, 2 * most_per_s) == pytest.approx(costs.batch(1, 1) / most_per_s)


def test_more_pipelines_wait_less_at_the_same_load(make_costs):
    one_per_s = make_costs().throughput_per_s(1, 1)
    waits = []
    for data in (1, 2, 8):
        estimate = make_costs(arrivals_per_s=0.9 * data * one_per_s).estimate(data, 1, 1)
        waits.append(estimate.latency_s - estimate.service_s)
    assert waits[0] > 1.8 * waits[1] > 1.8 * 1.8 * waits[2] > 0


def simulate_pipeline(costs, shape, arrivals_per_s, num_requests, lengths):
    """Mean latency of Poisson arrivals at one pipeline, step by step; whole prompts beside the decodes."""
    rng = random.Random(1)
    arrivals: list[float] = []
    at_s = 0.0
    for _ in range(num_requests):
        at_s += rng.expovariate(arrivals_per_s)
        arrivals.append(at_s)
    workload, batch = costs.workload, costs.batch(*shape)
    context_tokens = workload.prompt_tokens + workload.output_tokens / 2
    now_s, num_admitted = 0.0, 0
    latencies_s: list[float] = []
    running: list[list[float]] = []  # [arrival, tokens left]
    while len(latencies_s) < num_requests:
        if not running and arrivals[num_admitted] > now_s:
            now_s = arrivals[num_admitted]
        num_decoding = len(running)
        while len(running) < batch and num_admitted < num_requests and arrivals[num_admitted] <= now_s:
            running.append([arrivals[num_admitted], lengths(rng)])
            num_admitted += 1
        prompt_tokens = int(workload.prompt_tokens) * (len(running) - num_decoding)
        now_s += (
            costs.step_ms(
                *shape, num_decoding=num_decoding, prefill_tokens=prompt_tokens, context_tokens=context_tokens
            )
            / 1000
        )
        for sequence in running:
            sequence[1] -= 1
        latencies_s += [now_s - arrived_s for arrived_s, left in running if left <= 0]
        running = [sequence for sequence in running if sequence[1] > 0]
    return sum(latencies_s) / num_requests


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
@pytest.mark.parametrize(("pipeline", "tensor", "max_batch"), [(1, 1, 16), (3, 1, 8), (4, 1, 16)])
@pytest.mark.parametrize("lengths_cv", [0.0, 1.0])
def test_latency_is_that_of_a_simulated_pipeline(
    make_model, make_profile, pipeline, tensor, max_batch, load, lengths_cv
):
    workload = Workload(prompt_tokens=64, output_tokens=32, lengths_cv=lengths_cv)
    costs = CostModel(make_model(), make_profile(), 2000 * MB, workload, max_batch)
    arrivals_per_s = load * costs.throughput_per_s(pipeline, tensor)

    def lengths(rng):
        return 32 if lengths_cv == 0 else max(1, round(rng.expovariate(1 / 32)))

    simulated_s = simulate_pipeline(costs, (pipeline, tensor), arrivals_per_s, 3000, lengths)
    assert costs.latency_s(pipeline, tensor, arrivals_per_s) == pytest.approx(simulated_s, rel=TOLERANCE)
