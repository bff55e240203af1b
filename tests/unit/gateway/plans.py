"""Plans, and what pipelines tell of themselves."""

from engine.protocol import PipelineState
from planner.protocol import Explanation, ModelShape, Pipeline, Plan, Shard, Stage


def pipeline(name, inherits=()):
    shard = Shard(rank=f"{name}-0", instance=name, first_group=0, last_group=0)
    stages = [Stage(first_layer=0, last_layer=0, shards=[shard])]
    return Pipeline(id=name, stages=stages, max_batch=4, num_kv_blocks=9, inherits=list(inherits))


def plan(epoch, serving, retiring=()):
    model = ModelShape(
        name="m",
        num_layers=1,
        num_head_groups=1,
        decoder_unit_bytes=1,
        embedding_unit_bytes=1,
        head_unit_bytes=1,
        kv_unit_bytes_per_token=1,
        kv_block_tokens=16,
        max_model_len=100,
        hidden_bytes_per_token=1,
        tied_embeddings=True,
    )
    explanation = Explanation(
        cause="",
        cause_at_s=0,
        decided_at_s=0,
        arrivals_per_s=0,
        num_ranks=1,
        chosen=None,
        alternatives=[],
    )
    return Plan(
        epoch=epoch,
        model=model,
        pipelines=list(serving),
        retiring=list(retiring),
        transfers={},
        addresses={},
        explanation=explanation,
        next_pipeline_number=9,
    )


def state(name, *, running=0, free=4, ready=True, draining=False, deadline_s=None, epoch=1):
    return PipelineState(
        pipeline=name,
        epoch=epoch,
        ready=ready,
        draining=draining,
        running=running,
        waiting=0,
        free_slots=free,
        total_kv_blocks=9,
        free_kv_blocks=9,
        deadline_s=deadline_s,
    )
