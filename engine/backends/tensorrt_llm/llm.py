"""Makes TensorRT-LLM's objects out of ours. Used in the engine's process alone: here the package is imported."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from engine.backends.tensorrt_llm import gpus
from engine.backends.tensorrt_llm.arguments import (
    connector_arguments,
    cuda_graph_arguments,
    kv_cache_arguments,
    llm_arguments,
)
from engine.backends.tensorrt_llm.sampling import needs_processor, sampling_arguments
from engine.backends.tensorrt_llm.versions import INSTALL, check_version
from engine.backends.tensorrt_llm.wire import EngineSpec, Generate, Imported
from engine.core.sampling import uniform
from engine.errors import EngineUnavailable


def import_package() -> Imported:
    """Import TensorRT-LLM. Raises EngineUnavailable."""
    started_s = time.perf_counter()
    try:
        import tensorrt_llm
    except ImportError as error:
        raise EngineUnavailable(f"TensorRT-LLM cannot be imported ({error}): {INSTALL}") from error
    check_version(tensorrt_llm.__version__)
    return Imported(
        version=tensorrt_llm.__version__,
        num_gpus=_num_gpus(),
        import_s=time.perf_counter() - started_s,
    )


def _num_gpus() -> int:
    """That may be used: as NVML says, else PyTorch."""
    known = gpus.count()
    if known is None:
        import torch

        return torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return min(known, len(visible.split(","))) if visible else known


def build(spec: EngineSpec) -> tuple[Any, dict[str, float]]:
    """A `tensorrt_llm.LLM` of this shape, and the seconds of each phase of its start."""
    from tensorrt_llm import LLM
    from tensorrt_llm.llmapi import CudaGraphConfig, KvCacheConfig

    for note in _notes(spec):
        note.unlink(missing_ok=True)
    started_s = time.perf_counter()
    graphs = cuda_graph_arguments(spec)
    arguments = llm_arguments(spec)
    arguments["kv_cache_config"] = KvCacheConfig(**kv_cache_arguments(spec))
    arguments["cuda_graph_config"] = CudaGraphConfig(**graphs) if graphs is not None else None
    if spec.store_dirs:
        from tensorrt_llm._torch.models.checkpoints.hf.checkpoint_loader import HfCheckpointLoader

        from engine.backends.tensorrt_llm.weight_loader import StoreWeightLoader

        arguments["checkpoint_loader"] = HfCheckpointLoader(weight_loader=StoreWeightLoader(spec))
    if spec.kv_dir:
        from tensorrt_llm.llmapi.llm_args import KvCacheConnectorConfig

        from engine.backends.tensorrt_llm.kv_store import KV_VARIABLE, kv_environment

        os.environ[KV_VARIABLE] = kv_environment(spec)
        arguments["kv_connector_config"] = KvCacheConnectorConfig(**connector_arguments())
    llm = LLM(**arguments)
    total_s = time.perf_counter() - started_s
    weights_s = _weights_s(spec)
    return llm, {"weights_s": weights_s, "warm_up_s": max(0.0, total_s - weights_s)}


def _notes(spec: EngineSpec) -> list[Path]:
    """What this node's ranks have left in their store."""
    return list(Path(spec.store_dirs[0]).glob("loaded-*")) if spec.store_dirs else []


def _weights_s(spec: EngineSpec) -> float:
    """What the slowest rank here took to map the store; each leaves a note there."""
    times = [0.0]
    for note in _notes(spec):
        with contextlib.suppress(OSError, ValueError):
            times.append(float(note.read_text()))
    return max(times)


def sampling_params(spec: EngineSpec, request: Generate) -> Any:
    """A new `tensorrt_llm.SamplingParams`: `generate_async` changes the one that it gets."""
    from tensorrt_llm import SamplingParams

    sampling = request.sampling
    num_committed = len(request.token_ids) - request.num_prompt
    seed = int(uniform(sampling.seed, request.choice, num_committed) * 2**53)
    arguments = sampling_arguments(sampling, request.max_tokens, seed)
    if needs_processor(sampling):
        from engine.backends.tensorrt_llm.logits import RequestLogits, Vocabulary

        vocabulary = Vocabulary(
            str(Path(spec.model_dir) / "tokenizer.json"), spec.vocab_size, tuple(sampling.eos_token_ids)
        )
        arguments["logits_processor"] = RequestLogits(
            request.id, sampling, request.num_prompt, request.choice, vocabulary
        )
    return SamplingParams(**arguments)
