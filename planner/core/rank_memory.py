"""What fits on one rank: weights, the activations of the largest step, the migration buffer, and KV.

During a migration the KV pools of the old and the new pipeline exist side by side, so KV of the wanted concurrency is
held twice where there is room. A migration in memory-bounded order receives at most `buffer_bytes` before it releases
(U_max in SpotServe's Algorithm 2); one without bound may receive its whole new shard before it releases anything of
the old.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from planner.protocol import ModelShape

ACTIVATION_WIDTHS: Final = 10
"""Hidden vectors that a rank holds for each token of a step: residual, its norm, attention in and out, MLP in and
out, and the q, k, v and MLP intermediates of its shard."""

Stages = Sequence[tuple[int, int]]
"""(first, last) decoder layer of each stage."""


class RankMemory:
    """Of a rank with `memory_bytes`; `buffer_bytes` and `step_tokens` as `CostModel` says."""

    def __init__(self, model: ModelShape, memory_bytes: int, buffer_bytes: int | None, step_tokens: int) -> None:
        self._model = model
        self._memory_bytes = memory_bytes
        self._given_buffer_bytes = buffer_bytes
        self._activation_bytes = step_tokens * ACTIVATION_WIDTHS * model.hidden_bytes_per_token

    @property
    def min_kv_blocks(self) -> int:
        """One sequence of the greatest length must fit."""
        return -(-self._model.max_model_len // self._model.kv_block_tokens)

    def weight_bytes(self, stages: Stages, tensor: int) -> int:
        """Weights of the rank that holds most."""
        return max(self._stage_bytes(stage, tensor) for stage in stages)

    def reserved_bytes(self, stages: Stages, tensor: int) -> int:
        """Of the rank that holds most: weights, activations and migration buffer."""
        return self._besides_kv_bytes(self.weight_bytes(stages, tensor))

    def num_kv_blocks(self, stages: Stages, tensor: int, max_batch: int) -> int:
        """KV blocks that a pipeline gets; 0 if the model does not fit."""
        model = self._model
        unit_block_bytes = model.num_head_groups // tensor * model.kv_unit_bytes_per_token * model.kv_block_tokens
        room: list[tuple[int, int]] = []
        """Bytes left and bytes of a block, at each stage."""
        for first, last in stages:
            free_bytes = self._memory_bytes - self._besides_kv_bytes(self._stage_bytes((first, last), tensor))
            room.append((free_bytes, (last - first + 1) * unit_block_bytes))
        if min(free_bytes // block_bytes for free_bytes, block_bytes in room) < self.min_kv_blocks:
            return 0
        fewest_half = min(free_bytes // 2 // block_bytes for free_bytes, block_bytes in room)
        return min(max(fewest_half, self.min_kv_blocks), max_batch * self.min_kv_blocks)

    def _besides_kv_bytes(self, weight_bytes: int) -> int:
        buffer_bytes = weight_bytes if self._given_buffer_bytes is None else self._given_buffer_bytes
        return weight_bytes + self._activation_bytes + buffer_bytes

    def _stage_bytes(self, stage: tuple[int, int], tensor: int) -> int:
        model, (first, last) = self._model, stage
        is_first, is_last = first == 0, last == model.num_layers - 1
        unit_bytes = (last - first + 1) * model.decoder_unit_bytes
        if is_first or (is_last and model.tied_embeddings):
            unit_bytes += model.embedding_unit_bytes
        if is_last:
            unit_bytes += model.head_unit_bytes
        return model.num_head_groups // tensor * unit_bytes
