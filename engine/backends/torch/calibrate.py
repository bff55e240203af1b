"""Step times of this machine, measured on a few layers with random weights; the planner's cost model uses them."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import torch

from engine.backends.torch.kv_pool import KvPool
from engine.backends.torch.sampler import sample
from engine.backends.torch.stage_model import SequenceSlice, SoloGroup, StageBatch, StageModel
from engine.backends.torch.weights import WeightStore
from engine.core.model_config import ModelConfig
from engine.protocol import SamplingParams
from planner.protocol import EMBEDDING_LAYER, StepProfile

log = logging.getLogger(__name__)

BATCH_SIZES: Final = (1, 2, 4, 8)
CONTEXT_TOKENS: Final = 64
PREFILL_TOKENS: Final = 64
BYTES_BEYOND_CACHE: Final = 64 << 20
"""Weights of the measured layers, where so few layers reach it: fewer would be read from the cache."""
MAX_LAYERS: Final = 8
MAX_VOCAB_ROWS: Final = 65536
"""Of a larger vocabulary so many rows are measured, and the time is scaled."""
SECONDS_A_MEASUREMENT: Final = 0.05
ROUNDS: Final = 3
_METHOD: Final = 2
"""Of measuring; profiles of an older one are not used."""
# Measured on two cores with gloo over loopback; the runtime overwrites them where it knows better.
STAGE_HOP_MS: Final = 0.3
ALL_REDUCE_MS: Final = 1.2
TRANSFER_BYTES_PER_S: Final = 0.5e9


def load_or_calibrate(
    cache_dir: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, block_tokens: int
) -> StepProfile:
    """The profile in `cache_dir` for this model shape, dtype, device, thread count and torch version, or a new one.

    One process measures at a time: ranks that start together would measure each other.
    """
    facts = [_METHOD, config, str(dtype), _device_name(device), block_tokens]
    facts += [torch.get_num_threads(), str(torch.__version__)]
    key = hashlib.sha256(msgspec.json.encode(facts)).hexdigest()[:16]
    path = cache_dir / f"step-profile-{key}.json"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return _read(path) or _measure_into(path, config, dtype, device, block_tokens)
    except OSError as error:
        log.warning("step times are not cached: %s", error)
        return calibrate(config, dtype, device, block_tokens)


def _read(path: Path) -> StepProfile | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=StepProfile)
    except FileNotFoundError:
        log.info("measuring step times (about 2 s, once)")
    except msgspec.DecodeError as error:
        log.warning("measuring step times again: %s cannot be used: %s", path, error)
    return None


def _measure_into(
    path: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, block_tokens: int
) -> StepProfile:
    profile = calibrate(config, dtype, device, block_tokens)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(msgspec.json.encode(profile))
    partial.replace(path)
    return profile


def calibrate(config: ModelConfig, dtype: torch.dtype, device: torch.device, block_tokens: int) -> StepProfile:
    """Measure decode steps of whole layers and of the head at BATCH_SIZES, and a prefill chunk; about 2 s."""
    bench = _Bench(config, dtype, device, block_tokens)
    # In turns, so that a busy moment of the machine does not fall on one batch size alone.
    rounds = [[bench.decode_ms(batch_size) for batch_size in BATCH_SIZES] for _ in range(ROUNDS)]
    best = [tuple(map(min, zip(*times, strict=True))) for times in zip(*rounds, strict=True)]
    return StepProfile(
        batch_sizes=list(BATCH_SIZES),
        decode_layer_ms=_never_falling([layer_ms for layer_ms, _ in best]),
        decode_head_ms=_never_falling([head_ms for _, head_ms in best]),
        prefill_layer_ms_per_token=bench.prefill_layer_ms_per_token(),
        stage_hop_ms=STAGE_HOP_MS,
        all_reduce_ms=ALL_REDUCE_MS,
        transfer_bytes_per_s=TRANSFER_BYTES_PER_S,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
    )


def _never_falling(times_ms: list[float]) -> list[float]:
    """A larger batch cannot be faster: where it was, the smaller ones were measured at a busy moment."""
    return [min(times_ms[i:]) for i in range(len(times_ms))]


class _Bench:
    """A first stage of all measured layers but one, and a last stage of that one and the head."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, block_tokens: int) -> None:
        layer_bytes = config.unit_elements(0) * config.num_kv_heads * dtype.itemsize
        num_layers = 1 + max(1, min(config.num_layers, MAX_LAYERS, math.ceil(BYTES_BEYOND_CACHE / layer_bytes)))
        rows = min(config.vocab_size, MAX_VOCAB_ROWS)
        self._vocab_scale = config.vocab_size / rows
        small = msgspec.structs.replace(config, num_layers=num_layers, vocab_size=rows)
        store = WeightStore(small, dtype, device)
        numbers = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) * 0.02
        for layer in range(EMBEDDING_LAYER, num_layers + 1):
            for group in range(config.num_kv_heads):
                shapes = small.unit_shapes(layer).items()
                store.put(layer, group, {name: _filled(shape, numbers, dtype) for name, shape in shapes})
        last = num_layers - 1
        self._num_first = last
        max_len = min(config.max_position_embeddings, CONTEXT_TOKENS + PREFILL_TOKENS)
        self._context_tokens = min(CONTEXT_TOKENS, max_len - 1)
        self._prefill_tokens = min(PREFILL_TOKENS, max_len)
        self._blocks_each = -(-max_len // block_tokens)
        groups = (0, config.num_kv_heads - 1)
        num_blocks = self._blocks_each * max(BATCH_SIZES)
        ranges = ((0, last - 1), (last, last))
        self._models = [StageModel(small, *layers, *groups, store, SoloGroup(), "fast", max_len) for layers in ranges]
        self._pools = [KvPool(small, *layers, *groups, num_blocks, block_tokens, dtype, device) for layers in ranges]

    def decode_ms(self, batch_size: int) -> tuple[float, float]:
        """Of one layer, and of embedding, head and sampling together."""
        batch = self._batch(batch_size, 1, self._context_tokens)
        greedy = [SamplingParams(max_tokens=1, temperature=0.0)] * batch_size
        zeros = [0] * batch_size
        hidden = self._models[0].forward(batch, None, self._pools[0])

        def last_stage() -> None:
            sample(self._models[1].forward(batch, hidden, self._pools[1]), greedy, zeros, zeros)

        layer_ms = self._first_stage_ms(batch) / self._num_first
        return layer_ms, max(_shortest_ms(last_stage) - layer_ms, 0.0) * self._vocab_scale

    def prefill_layer_ms_per_token(self) -> float:
        batch = self._batch(1, self._prefill_tokens, 0)
        return self._first_stage_ms(batch) / self._num_first / self._prefill_tokens

    def _first_stage_ms(self, batch: StageBatch) -> float:
        def run() -> None:
            hidden = self._models[0].forward(batch, None, self._pools[0])
            hidden[0, 0].item()  # waits for the device

        return _shortest_ms(run)

    def _batch(self, batch_size: int, num_tokens: int, context_tokens: int) -> StageBatch:
        each = self._blocks_each
        tables = [list(range(i * each, (i + 1) * each)) for i in range(batch_size)]
        slices = [SequenceSlice(num_tokens, context_tokens, table, num_logits=1) for table in tables]
        return StageBatch([0] * (num_tokens * batch_size), slices)


def _filled(shape: tuple[int, ...], numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    count = math.prod(shape)
    return numbers.to(dtype).repeat(-(-count // len(numbers)))[:count].view(shape)


def _shortest_ms(run: Callable[[], object]) -> float:
    """The shortest of some runs, after one that does not count: what others do to this machine only adds."""
    run()
    shortest_s, end_s = math.inf, time.perf_counter() + SECONDS_A_MEASUREMENT
    while shortest_s == math.inf or time.perf_counter() < end_s:
        start_s = time.perf_counter()
        run()
        shortest_s = min(shortest_s, time.perf_counter() - start_s)
    return shortest_s * 1e3


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
