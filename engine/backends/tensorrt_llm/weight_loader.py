"""Gives an engine its weights out of the instance's shared memory: a new engine reads no disk.

Runs in the engine's processes: it is pickled into each of them.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tensorrt_llm._torch.models.checkpoints.base_weight_loader import BaseWeightLoader

from engine.backends.tensorrt_llm.wire import EngineSpec
from engine.core.model_config import ModelConfig
from engine.errors import MissingUnit
from planner.protocol import EMBEDDING_LAYER


class StoreWeightLoader(BaseWeightLoader):
    """Whole tensors of the layers of a rank's stage, as TensorRT-LLM cuts its shard out of them by itself."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec

    def load_weights(self, checkpoint_dir: str, mapping: Any = None, **_: Any) -> dict[str, Any]:
        """Tensors by their names in the checkpoint, mapped and not copied.

        Raises MissingUnit if this rank's own shard is not all there; of other shards' rows it may be zero.
        """
        import torch  # Here and not above: who only hands the loader on to the workers needs none of it.

        from engine.backends.tensorrt_llm.weight_store import SharedWeights, tensor_shapes
        from engine.backends.torch.checkpoint import Checkpoint

        started_s = time.perf_counter()
        spec = self._spec
        config = Checkpoint(Path(checkpoint_dir)).config
        store = SharedWeights(config, getattr(torch, spec.dtype), self._directory(mapping))
        layers = _layers(config, spec, getattr(mapping, "pp_rank", None))
        missing = {(layer, group) for layer in layers for group in _groups(config, mapping)} - store.units()
        if missing:
            raise MissingUnit(sorted(missing))
        weights = {name: store.tensor(layer, name) for layer in layers for name in tensor_shapes(config, layer)}
        note = store.directory / f"loaded-{os.getpid()}"
        note.write_text(str(time.perf_counter() - started_s))
        return weights

    def _directory(self, mapping: Any) -> Path:
        return Path(self._spec.store_dirs[getattr(mapping, "rank", 0)])

    def cleanup(self) -> None:
        """Nothing is held but the maps, which go with the tensors."""


def _layers(config: ModelConfig, spec: EngineSpec, stage: int | None) -> list[int]:
    """Of the stage; all of them where it is not known."""
    everything = range(EMBEDDING_LAYER, config.num_layers + 1)
    if stage is None or len(spec.layers) == 1:
        return list(everything)
    first = sum(spec.layers[:stage])
    last = first + spec.layers[stage] - 1
    layers = list(range(first, last + 1))
    is_first, is_last = stage == 0, stage == len(spec.layers) - 1
    if is_first or (is_last and config.tie_word_embeddings):
        layers.insert(0, EMBEDDING_LAYER)
    if is_last:
        layers.append(config.num_layers)
    return layers


def _groups(config: ModelConfig, mapping: Any) -> range:
    tensor, shard = getattr(mapping, "tp_size", 1), getattr(mapping, "tp_rank", 0)
    per_shard = config.num_kv_heads // tensor
    return range(shard * per_shard, (shard + 1) * per_shard)
