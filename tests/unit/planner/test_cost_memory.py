"""GPT-20B on T4s: 12 are enough with a migration in memory-bounded order, 16 are needed without (SpotServe, Table 1
and section 3.4).

The accounting of a rank, with one set of constants:
- 15.84 GB of memory (16 GB less error correction), of which 0.9 is ours: the rest is CUDA's contexts and workspaces;
- its weights in float32 (74.5 GiB in all, embedding apart);
- KV of 8 requests of 640 tokens, twice: during a migration the old and the new context coexist;
- activations of a step that prefills 8 prompts of 512 tokens;
- the migration buffer: 1 GB (two layers on a rank of four) in bounded order; without bound the order may be so unlucky
  that a rank has received its whole new shard before it releases anything of the old one.
"""

import pytest

from planner.core.cost_model import CostModel, Workload
from planner.core.profile import DegreeTimes, Profile
from planner.protocol import ModelShape

HIDDEN = 6144
NUM_HEADS = 48
FLOAT_BYTES = 4
GPT_20B = ModelShape(
    name="GPT-20B",
    num_layers=44,
    num_head_groups=NUM_HEADS,
    decoder_unit_bytes=12 * HIDDEN**2 * FLOAT_BYTES // NUM_HEADS,
    embedding_unit_bytes=51200 * HIDDEN * FLOAT_BYTES // NUM_HEADS,
    head_unit_bytes=HIDDEN * FLOAT_BYTES,
    kv_unit_bytes_per_token=2 * HIDDEN // NUM_HEADS * FLOAT_BYTES,
    kv_block_tokens=16,
    max_model_len=640,
    hidden_bytes_per_token=HIDDEN * FLOAT_BYTES,
    tied_embeddings=True,
)
USABLE_BYTES = int(0.9 * 15.84e9)
MAX_BATCH = 8
STEP_TOKENS = MAX_BATCH * 512
BUFFER_BYTES = 1_000_000_000
RANKS_PER_INSTANCE = 4


@pytest.fixture
def make_costs():
    times = DegreeTimes(batch_sizes=[1], decode_layer_ms=[1.0], prefill_layer_ms=[10.0])
    profile = Profile(
        name="equal", num_layers=44, degrees=dict.fromkeys((1, 2, 4, 8), times), head_batch_sizes=[1], head_ms=[0.0]
    )

    def make(buffer_bytes, memory_bytes=USABLE_BYTES):
        return CostModel(
            GPT_20B,
            profile,
            memory_bytes,
            Workload(prompt_tokens=512, output_tokens=128),
            MAX_BATCH,
            buffer_bytes=buffer_bytes,
            step_tokens=STEP_TOKENS,
        )

    return make


def least_ranks(costs):
    """Of whole instances, on which some shape holds the full batch."""

    def fits(num_ranks):
        shapes = [(p, t) for t in costs.tensor_degrees() for p in range(1, min(44, num_ranks // t) + 1)]
        return any(costs.num_kv_blocks(*shape) and costs.batch(*shape) >= MAX_BATCH for shape in shapes)

    return next(n for n in range(RANKS_PER_INSTANCE, 100, RANKS_PER_INSTANCE) if fits(n))


def test_weights_and_kv_are_the_papers(make_costs):
    decoder_bytes = GPT_20B.num_layers * NUM_HEADS * GPT_20B.decoder_unit_bytes
    assert decoder_bytes / 2**30 == pytest.approx(74.5, abs=0.3)
    kv_bytes = GPT_20B.num_layers * NUM_HEADS * GPT_20B.kv_unit_bytes_per_token
    assert kv_bytes == pytest.approx(2.16e6, rel=0.01)
    assert 640 * kv_bytes == pytest.approx(1.38e9, rel=0.01)


# The result does not hang on the constant: it is the same for all that a T4 may leave, 14 to 14.7 GB.
@pytest.mark.parametrize("memory_bytes", [14_000_000_000, USABLE_BYTES, 14_700_000_000])
def test_bounded_migration_needs_12_and_unbounded_16(make_costs, memory_bytes):
    bounded, unbounded = make_costs(BUFFER_BYTES, memory_bytes), make_costs(None, memory_bytes)
    assert bounded.batch(3, 4) == MAX_BATCH
    assert unbounded.num_kv_blocks(3, 4) == 0
    assert least_ranks(bounded) == 12
    assert least_ranks(unbounded) == 16


def test_reserved_is_the_sum_of_its_parts(make_costs):
    weights = make_costs(0).weight_bytes(3, 4)
    activations = make_costs(0).reserved_bytes(3, 4) - weights
    assert activations == STEP_TOKENS * 10 * HIDDEN * FLOAT_BYTES
    assert make_costs(BUFFER_BYTES).reserved_bytes(3, 4) == weights + activations + BUFFER_BYTES
    assert make_costs(None).reserved_bytes(3, 4) == 2 * weights + activations
