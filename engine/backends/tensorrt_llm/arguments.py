"""Arguments of `tensorrt_llm.LLM`; a test holds them against the tables of 1.2.1."""

from __future__ import annotations

from typing import Any, Final

from engine.backends.tensorrt_llm.wire import EngineSpec

CONNECTOR_MODULE: Final = "engine.backends.tensorrt_llm.kv_connector"
DEFAULT_NUM_TOKENS: Final = 8192
"""TensorRT-LLM's own limit of tokens in one iteration."""


def most_step_tokens(max_model_len: int, max_batch: int) -> int:
    """Tokens of one iteration: a resumed prompt is longer than any fresh one, up to the whole model length.

    Longer ones are prefilled in chunks, but not every model can do that.
    """
    return max(max_batch, min(max_model_len, 2 * DEFAULT_NUM_TOKENS), DEFAULT_NUM_TOKENS)


def llm_arguments(spec: EngineSpec) -> dict[str, Any]:
    """Of plain types; the nested configurations and the loader are objects, made by the child."""
    arguments: dict[str, Any] = {
        "model": spec.model_dir,
        # It knows the EOS ids; no text is made with it.
        "tokenizer": spec.model_dir,
        "dtype": spec.dtype,
        "tensor_parallel_size": spec.tensor,
        "pipeline_parallel_size": len(spec.layers),
        "gpus_per_node": spec.gpus_per_node,
        "max_batch_size": spec.max_batch,
        "max_num_tokens": spec.max_num_tokens,
        "max_seq_len": spec.max_model_len,
        "enable_chunked_prefill": True,
        # It runs a step ahead of the ids that a logits processor sees.
        "disable_overlap_scheduler": True,
        "enable_autotuner": spec.autotuner,
    }
    if len(spec.layers) > 1:
        arguments["pp_partition"] = spec.layers
    if spec.ray:
        arguments["orchestrator_type"] = "ray"
    return arguments


def kv_cache_arguments(spec: EngineSpec) -> dict[str, Any]:
    """Of `KvCacheConfig`; the smaller of the two limits counts."""
    return {
        "enable_block_reuse": spec.prefix_caching,
        "max_tokens": spec.num_kv_blocks * spec.block_tokens,
        "free_gpu_memory_fraction": spec.gpu_memory_fraction,
        "tokens_per_block": spec.block_tokens,
    }


def cuda_graph_arguments(spec: EngineSpec) -> dict[str, Any] | None:
    """Of `CudaGraphConfig`: with padding few batch sizes are captured, each of which costs start-up time."""
    return {"enable_padding": True, "max_batch_size": spec.max_batch} if spec.cuda_graphs else None


def connector_arguments() -> dict[str, str]:
    """Of `KvCacheConnectorConfig`."""
    return {
        "connector_module": CONNECTOR_MODULE,
        "connector_scheduler_class": "BlockScheduler",
        "connector_worker_class": "BlockWorker",
    }
