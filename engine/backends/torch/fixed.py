"""The "fixed" reduction: a row's result is bit-identical whatever batch, chunk, stage or shard computes it.

Matrix kernels and vectorized loops may round differently for different shapes. So whatever rounds is computed on
constant shapes: per head group, in tiles of TILE_ROWS rows, padded; attention in query tiles aligned to absolute
positions and key blocks of KEY_BLOCK, with an online softmax in the order of positions. The parts of the head groups
are gathered and added in group order.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from engine.backends.torch.attention import BatchRows, StageBatch
from engine.backends.torch.kv_pool import KvPool
from engine.backends.torch.layers import DecoderBlock, Rotation, VocabularyBlock, rms_norm
from engine.backends.torch.tensor_group import TensorGroup

TILE_ROWS: Final = 16
KEY_BLOCK: Final = 64


def in_tiles(x_RH: Tensor) -> list[Tensor]:
    """Rows in tiles of TILE_ROWS, the last one padded with zeros."""
    missing = -len(x_RH) % TILE_ROWS
    if missing:
        x_RH = torch.cat([x_RH, x_RH.new_zeros(missing, x_RH.shape[1])])
    return list(torch.split(x_RH, TILE_ROWS))


def add_in_group_order(parts_GRH: Tensor, group: TensorGroup) -> Tensor:
    """Sum of all shards' parts in float32 by head group: [G, R, H] of each shard -> [R, H]."""
    total: Tensor | None = None
    for shard in group.all_gather(parts_GRH.contiguous()):
        for part in shard:
            total = part.float() if total is None else total + part
    assert total is not None
    return total.to(parts_GRH.dtype)


class FixedLayer:
    """One decoder layer, from one block a head group."""

    def __init__(self, blocks: list[DecoderBlock]) -> None:
        self._blocks = blocks

    def attend(self, x_RH: Tensor, rotation: Rotation, attention: FixedAttention, layer: int, pool: KvPool) -> Tensor:
        """Parts [G, R, H] that the local groups add to the attention's output."""
        tiles = in_tiles(x_RH)
        qkvs = [
            torch.cat(
                [
                    block.project_qkv(tile, rotation.rows(i * TILE_ROWS, (i + 1) * TILE_ROWS))
                    for i, tile in enumerate(tiles)
                ]
            )[: len(x_RH)]
            for block in self._blocks
        ]
        out_RGC = attention(torch.cat(qkvs, 1), layer, pool)
        return torch.stack(
            [
                torch.cat([block.o(tile) for tile in in_tiles(out_RGC[:, g].contiguous())])[: len(x_RH)]
                for g, block in enumerate(self._blocks)
            ]
        )

    def mlp(self, x_RH: Tensor) -> Tensor:
        """Parts [G, R, H] that the local groups add to the MLP's output."""
        tiles = in_tiles(x_RH)
        return torch.stack([torch.cat([block.mlp(tile) for tile in tiles])[: len(x_RH)] for block in self._blocks])


def fixed_logits(x_RH: Tensor, norm_H: Tensor, eps: float, tables: list[VocabularyBlock]) -> Tensor:
    """[R, local vocabulary rows]."""
    normed = [rms_norm(tile, norm_H, eps) for tile in in_tiles(x_RH)]
    return torch.cat([torch.cat([table.logits(tile) for tile in normed])[: len(x_RH)] for table in tables], 1)


class FixedAttention:
    """Causal attention of the rows of one batch, sequence by sequence and head group by head group."""

    def __init__(self, batch: StageBatch, rows: BatchRows, block_tokens: int, device: torch.device) -> None:
        self._rows = rows
        self._sequences = []
        for first_row, sequence in zip(rows.first_rows, batch.sequences, strict=True):
            end = sequence.context_tokens + sequence.num_tokens
            num_blocks = -(-end // block_tokens)
            blocks = torch.tensor(sequence.blocks[:num_blocks], device=device)
            self._sequences.append((first_row, sequence.context_tokens, end, blocks))

    def __call__(self, qkv: Tensor, layer: int, pool: KvPool) -> Tensor:
        """Qkv [R, G, Q + 2, D] -> [R, G, Q * D]; appends K and V to the pool first."""
        pool.write(layer, self._rows.slots_R, qkv[:, :, -2:])
        num_rows, num_groups, num_heads, dim = qkv.shape
        out = qkv.new_empty(num_rows, num_groups, (num_heads - 2) * dim)
        for first_row, start, end, blocks in self._sequences:
            kv_LG = pool.gather(layer, blocks)[:end].float()
            padding = -end % KEY_BLOCK
            if padding:
                kv_LG = torch.cat([kv_LG, kv_LG.new_zeros(padding, *kv_LG.shape[1:])])
            for group in range(num_groups):
                k, v = (torch.split(kv_LG[:, group, part].contiguous(), KEY_BLOCK) for part in (0, 1))
                q = qkv[first_row : first_row + end - start, group, :-2].float()
                out[first_row : first_row + end - start, group] = _attend_rows(q, start, end, k, v)
        return out


def _attend_rows(q: Tensor, start: int, end: int, k: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> Tensor:
    """Q [T, Q, D] at positions start .. end-1 -> [T, Q * D]."""
    num_queries, dim = q.shape[1:]
    outs = []
    for tile_start in range(start - start % TILE_ROWS, end, TILE_ROWS):
        first, last = max(start, tile_start), min(end, tile_start + TILE_ROWS)
        tile = q.new_zeros(TILE_ROWS, num_queries, dim)
        tile[first - tile_start : last - tile_start] = q[first - start : last - start]
        # Blocks behind a row are hidden from it and leave its sums as they are, bit for bit.
        num_blocks = (tile_start + TILE_ROWS - 1) // KEY_BLOCK + 1
        out = _attend_tile(tile.view(TILE_ROWS * num_queries, dim), tile_start, k[:num_blocks], v[:num_blocks])
        outs.append(out.view(TILE_ROWS, num_queries * dim)[first - tile_start : last - tile_start])
    return torch.cat(outs)


def _attend_tile(q: Tensor, tile_start: int, k: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> Tensor:
    """One query tile [TILE_ROWS * Q, D] over key blocks [KEY_BLOCK, D], in float32, with an online softmax."""
    num_rows, dim = q.shape
    q = q * dim**-0.5
    row_positions = tile_start + torch.arange(num_rows, device=q.device)[:, None] // (num_rows // TILE_ROWS)
    largest = q.new_full((num_rows, 1), float("-inf"))
    total, out = q.new_zeros(num_rows, 1), q.new_zeros(num_rows, dim)
    for number, (k_block, v_block) in enumerate(zip(k, v, strict=True)):
        scores = q @ k_block.T
        first_key = number * KEY_BLOCK
        if first_key + KEY_BLOCK > tile_start:
            key_positions = first_key + torch.arange(KEY_BLOCK, device=q.device)
            scores.masked_fill_(key_positions > row_positions, float("-inf"))
        new_largest = torch.maximum(largest, scores.amax(1, keepdim=True))
        # Key 0 is seen by every row, so that new_largest is finite from the first block on.
        weights = torch.exp(scores - new_largest)
        decay = torch.exp((largest - new_largest).expand(-1, KEY_BLOCK).contiguous())[:, :1]
        total = total * decay + weights.sum(1, keepdim=True)
        out = out * decay + weights @ v_block
        largest = new_largest
    return out / total
