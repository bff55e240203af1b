"""Paged KV memory of one pipeline on one rank."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.backends.torch.units import tensor_bytes, tensor_from_bytes
from engine.core.model_config import ModelConfig
from engine.errors import CorruptUnit


class KvPool:
    """K and V of the decoder layers and head groups of one position; blocks are numbered as in the block tables.

    A layer's memory is [num_blocks, block_tokens, groups, 2, head_dim], K before V: what one token appends is
    contiguous, and so is what a block table gathers.
    """

    def __init__(
        self,
        config: ModelConfig,
        first_layer: int,
        last_layer: int,
        first_group: int,
        last_group: int,
        num_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_tokens = block_tokens
        self.num_blocks = num_blocks
        self._first_layer = first_layer
        self._groups = range(first_group, last_group + 1)
        shape = (num_blocks, block_tokens, len(self._groups), 2, config.head_dim)
        self._layers = [_zeros(shape, dtype, device) for _ in range(first_layer, last_layer + 1)]

    def write(self, layer: int, slots: Tensor, kv: Tensor) -> None:
        """Store kv [rows, groups, 2, head_dim] at slots [rows]; slot = block * block_tokens + offset in it."""
        self._layers[layer - self._first_layer].flatten(0, 1).index_copy_(0, slots, kv)

    def gather(self, layer: int, blocks: Tensor) -> Tensor:
        """[len(blocks) * block_tokens, groups, 2, head_dim], a copy."""
        return self._layers[layer - self._first_layer].index_select(0, blocks).flatten(0, 1)

    def export_sequence(self, layer: int, group: int, blocks: list[int], num_tokens: int) -> bytes:
        """K then V of the first `num_tokens` tokens: [2, num_tokens, head_dim] of the pool's dtype."""
        held = self._layers[layer - self._first_layer][:, :, group - self._groups[0]]
        needed = blocks[: -(-num_tokens // self.block_tokens)]
        kv = held[torch.tensor(needed, dtype=torch.long, device=held.device)].flatten(0, 1)[:num_tokens]
        return tensor_bytes(kv.transpose(0, 1))

    def import_sequence(
        self, layer: int, group: int, blocks: list[int], num_tokens: int, data: bytes | memoryview
    ) -> None:
        """Store what `export_sequence` gave elsewhere. Raises CorruptUnit, storing nothing, if the size is wrong."""
        memory = self._layers[layer - self._first_layer]
        head_dim = memory.shape[-1]
        expected_bytes = 2 * num_tokens * head_dim * memory.dtype.itemsize
        num_bytes = memoryview(data).nbytes
        if num_bytes != expected_bytes:
            raise CorruptUnit(f"KV of (layer {layer}, group {group})", num_bytes, expected_bytes)
        if num_tokens == 0:
            return
        kv = tensor_from_bytes(data, memory.dtype, memory.device).view(2, num_tokens, head_dim)
        tokens = torch.arange(num_tokens)
        table = torch.tensor(blocks, dtype=torch.long)
        slots = table[tokens // self.block_tokens] * self.block_tokens + tokens % self.block_tokens
        memory[:, :, group - self._groups[0]][slots // self.block_tokens, slots % self.block_tokens] = kv.transpose(
            0, 1
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, so that what is masked is finite. On the CPU from calloc, so that no page is touched before its use."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
