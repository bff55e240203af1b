"""Whether a position of the plan is one that TensorRT-LLM can take, and what its engine is made of. Pure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.backends.tensorrt_llm.arguments import most_step_tokens
from engine.backends.tensorrt_llm.wire import EngineSpec
from engine.core.model_config import ModelConfig
from engine.core.roles import Position
from engine.errors import ShapeRefused
from engine.settings import EngineSettings
from planner.protocol import ModelShape


def engine_spec(
    position: Position,
    model: ModelShape,
    config: ModelConfig,
    settings: EngineSettings,
    store_of: Callable[[str], Path],
) -> EngineSpec:
    """Of the pipeline of `position`; `store_of` an instance.

    Raises:
        ShapeRefused: its shape is none that TensorRT-LLM can take; says why.

    """
    pipeline = position.pipeline
    check_shape(position, config)
    shards = [shard for stage in pipeline.stages for shard in stage.shards]
    per_node = [sum(shard.instance == one.instance for shard in shards) for one in shards]
    return EngineSpec(
        model_dir=str(settings.model_dir),
        dtype=settings.dtype,
        tensor=pipeline.tensor,
        layers=[stage.last_layer - stage.first_layer + 1 for stage in pipeline.stages],
        gpus_per_node=max(per_node),
        max_batch=pipeline.max_batch,
        max_model_len=model.max_model_len,
        max_num_tokens=settings.max_num_tokens or most_step_tokens(model.max_model_len, pipeline.max_batch),
        block_tokens=settings.kv_block_tokens,
        num_kv_blocks=pipeline.num_kv_blocks,
        prefix_caching=settings.prefix_caching,
        gpu_memory_fraction=settings.gpu_memory_fraction,
        cuda_graphs=settings.cuda_graphs,
        autotuner=settings.autotuner,
        store_dirs=[str(store_of(shard.instance)) for shard in shards],
        vocab_size=config.vocab_size,
        ray=settings.multi_node == "ray" and len({shard.instance for shard in shards}) > 1,
        kv_dir=str(store_of(shards[0].instance) / "kv") if settings.kv_connector else "",
        kv_limit_bytes=settings.kv_store_bytes,
    )


def check_shape(position: Position, config: ModelConfig) -> None:
    """Raises ShapeRefused for a shape that TensorRT-LLM cannot take."""
    pipeline = position.pipeline
    degrees = {len(stage.shards) for stage in pipeline.stages}
    if len(degrees) > 1:
        raise ShapeRefused(f"{pipeline.id}: its stages have {sorted(degrees)} shards; they must all have as many")
    tensor = pipeline.tensor
    for name, number in (("KV heads", config.num_kv_heads), ("attention heads", config.num_heads)):
        if number % tensor:
            raise ShapeRefused(
                f"{pipeline.id}: tensor degree {tensor} does not divide the {number} {name}: choose another degree"
            )


def check_fits(position: Position, model: ModelShape, memory_bytes: int) -> None:
    """Raises ShapeRefused if weights and KV of the position need more than a GPU has."""
    weight_bytes = sum(model.unit_bytes(layer) for layer, _ in position.units(model))
    num_units = (position.last_layer - position.first_layer + 1) * (position.last_group - position.first_group + 1)
    kv_tokens = position.pipeline.num_kv_blocks * model.kv_block_tokens
    kv_bytes = num_units * model.kv_unit_bytes_per_token * kv_tokens
    if weight_bytes + kv_bytes > memory_bytes:
        raise ShapeRefused(
            f"{position.pipeline.id} does not fit: {weight_bytes / 2**30:.1f} GiB of weights and "
            f"{kv_bytes / 2**30:.1f} GiB of KV on a GPU with {memory_bytes / 2**30:.1f} GiB to use: take more GPUs "
            "for a pipeline, or a shorter max_model_len"
        )
