"""Tiny random models of each family, and pipelines over them whose shards run in threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from engine.backends.torch.kv_pool import KvPool
from engine.backends.torch.stage_model import SequenceSlice, StageBatch, StageModel
from engine.backends.torch.weights import Checkpoint, WeightStore
from planner.protocol import EMBEDDING_LAYER

BLOCK_TOKENS = 8
NUM_BLOCKS = 48
MAX_MODEL_LEN = 128
COMMON = {
    "hidden_size": 48,
    "intermediate_size": 100,  # three head groups do not divide it
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 200,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def reference_config(family: str) -> Any:
    import transformers

    if family == "llama":
        return transformers.LlamaConfig(**COMMON, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE)
    if family == "llama-yarn":
        yarn = {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
        return transformers.LlamaConfig(**COMMON, tie_word_embeddings=False, rope_parameters=yarn)
    if family == "mistral":
        return transformers.MistralConfig(**COMMON, head_dim=16, sliding_window=None)
    if family == "qwen2":
        return transformers.Qwen2Config(**COMMON, tie_word_embeddings=True)
    return transformers.Qwen3Config(**COMMON, head_dim=12, tie_word_embeddings=False)


@dataclass(frozen=True)
class TinyModel:
    directory: Path
    reference: Any
    checkpoint: Checkpoint


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    built: dict[str, TinyModel] = {}

    def build(family: str) -> TinyModel:
        if family not in built:
            import transformers

            torch.set_num_threads(1)
            torch.manual_seed(len(family))
            reference = transformers.AutoModelForCausalLM.from_config(reference_config(family)).float().eval()
            with torch.no_grad():
                for parameter in reference.parameters():  # norms and biases start at 1 and 0
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            directory = tmp_path_factory.mktemp(family)
            # Small shards, so that the index and several files are read.
            reference.save_pretrained(directory, max_shard_size="100KB")
            built[family] = TinyModel(directory, reference, Checkpoint(directory))
        return built[family]

    return build


class ThreadGroup:
    """A tensor group whose shards are threads of this process."""

    def __init__(self, size: int, index: int, shared: _Exchange) -> None:
        self.size = size
        self.index = index
        self._shared = shared

    def all_gather(self, x: Tensor) -> list[Tensor]:
        return self._shared.swap(self.index, x.clone())

    def all_reduce(self, x: Tensor) -> None:
        parts = self.all_gather(x)
        x.copy_(sum(parts[1:], parts[0]))


class _Exchange:
    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=60)
        self._slots: list[Tensor] = [torch.empty(0)] * size

    def swap(self, index: int, x: Tensor) -> list[Tensor]:
        self._slots[index] = x
        self._barrier.wait()
        result = list(self._slots)
        self._barrier.wait()
        return result


@dataclass
class LocalPipeline:
    """Stages by layer ranges, each of `shards` threads; one KV pool and one store a rank."""

    stages: list[list[tuple[StageModel, KvPool, WeightStore]]]
    ranges: list[tuple[int, int]]
    groups: list[tuple[int, int]]
    block_tokens: int
    lengths: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[int]] = field(default_factory=dict)

    def step(self, pieces: dict[str, list[int]]) -> dict[str, Tensor]:
        """Feed each sequence its tokens; the logits [vocabulary] of its last row."""
        slices: list[SequenceSlice] = []
        for name, ids in pieces.items():
            used = sum(len(table) for table in self.tables.values())
            table = self.tables.setdefault(name, [])
            context = self.lengths.get(name, 0)
            while len(table) * self.block_tokens < context + len(ids):
                table.append((used * 7 + 3) % NUM_BLOCKS)  # scattered; 7 and NUM_BLOCKS have no common factor
                used += 1
            slices.append(SequenceSlice(len(ids), context, list(table), num_logits=1))
            self.lengths[name] = context + len(ids)
        batch = StageBatch([token for ids in pieces.values() for token in ids], slices)
        hidden: Tensor | None = None
        outs: list[Tensor] = []
        for stage in self.stages:
            with ThreadPoolExecutor(len(stage)) as pool:
                outs = list(pool.map(lambda rank, x=hidden: rank[0].forward(batch, x, rank[1]), stage))
            hidden = outs[0]
        logits = torch.cat(outs, 1)
        return dict(zip(pieces, logits, strict=True))


@pytest.fixture
def build_pipeline() -> Callable[..., LocalPipeline]:
    def build(
        checkpoint: Checkpoint,
        num_stages: int,
        num_shards: int,
        reduction: Literal["fast", "fixed"] = "fast",
        dtype: torch.dtype = torch.float32,
        block_tokens: int = BLOCK_TOKENS,
        stores: list[list[WeightStore]] | None = None,
    ) -> LocalPipeline:
        torch.set_num_threads(1)
        config, cpu = checkpoint.config, torch.device("cpu")
        bounds = [config.num_layers * i // num_stages for i in range(num_stages + 1)]
        ranges = [(bounds[i], bounds[i + 1] - 1) for i in range(num_stages)]
        width = config.num_kv_heads // num_shards
        groups = [(i * width, (i + 1) * width - 1) for i in range(num_shards)]
        shape = config.shape("tiny", dtype.itemsize, block_tokens, MAX_MODEL_LEN)
        stages = []
        for s, (first, last) in enumerate(ranges):
            exchange = _Exchange(num_shards)
            stage = []
            for m, (low, high) in enumerate(groups):
                store = stores[s][m] if stores else WeightStore(config, dtype, cpu)
                if not stores:
                    for layer in shape.layers_of_stage(first, last):
                        for group in range(low, high + 1):
                            store.put(layer, group, checkpoint.load_unit(layer, group, dtype))
                group_of_shard: Any = ThreadGroup(num_shards, m, exchange)
                model = StageModel(
                    config,
                    first,
                    last,
                    low,
                    high,
                    store,
                    group_of_shard,
                    reduction,
                    MAX_MODEL_LEN,
                )
                pool = KvPool(config, first, last, low, high, NUM_BLOCKS, block_tokens, dtype, cpu)
                stage.append((model, pool, store))
            stages.append(stage)
        return LocalPipeline(stages, ranges, groups, block_tokens)

    return build


@pytest.fixture
def all_units() -> Callable[[Checkpoint], list[tuple[int, int]]]:
    def units(checkpoint: Checkpoint) -> list[tuple[int, int]]:
        layers = range(EMBEDDING_LAYER, checkpoint.config.num_layers + 1)
        return [(layer, group) for layer in layers for group in range(checkpoint.config.num_kv_heads)]

    return units
