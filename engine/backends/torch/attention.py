"""The rows of one batch: where their KV goes, and attention over it ("fast": whatever order is quickest).

Shape suffixes as in layers.py, and: N sequences, L positions of the longest of them (padded), B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.backends.torch.kv_pool import KvPool


@dataclass(slots=True)
class SequenceSlice:
    """A sequence's part in a step: the next `num_tokens` tokens after the `context_tokens` that are in the KV."""

    num_tokens: int
    context_tokens: int
    blocks: list[int]
    """Block table; covers context and new tokens, and may be longer."""
    num_logits: int
    """Of its last rows."""


@dataclass(slots=True)
class StageBatch:
    """One step. Rows are the sequences' tokens one after the other, prefill chunks and decode tokens mixed."""

    token_ids: list[int]
    sequences: list[SequenceSlice]


class BatchRows:
    """Positions and KV slots of a batch's rows."""

    def __init__(self, batch: StageBatch, block_tokens: int, device: torch.device) -> None:
        positions: list[int] = []
        slots: list[int] = []
        wanted: list[int] = []
        self.first_rows: list[int] = []
        for sequence in batch.sequences:
            self.first_rows.append(len(positions))
            end = sequence.context_tokens + sequence.num_tokens
            for position in range(sequence.context_tokens, end):
                positions.append(position)
                block = sequence.blocks[position // block_tokens]
                slots.append(block * block_tokens + position % block_tokens)
            wanted += range(len(positions) - sequence.num_logits, len(positions))
        self.num_rows = len(positions)
        self.positions_R = torch.tensor(positions, device=device)
        self.slots_R = torch.tensor(slots, device=device)
        self.wanted = torch.tensor(wanted, dtype=torch.long, device=device)
        self.wants_all = len(wanted) == len(positions)


@dataclass(slots=True)
class _Segment:
    """Sequences with the same number of new tokens T, attended together: queries [N, G, Q * T, D]."""

    first_row: int
    num_sequences: int
    num_tokens: int
    blocks: Tensor
    """[N * blocks a sequence], padded with any block."""
    num_positions: int
    mask: Tensor | None
    """[N, 1, Q * T, L], 0 or -inf; None: all positions are seen."""


class FastAttention:
    """Decode tokens of all sequences at once; prefill chunks one by one."""

    def __init__(self, batch: StageBatch, rows: BatchRows, block_tokens: int, num_queries: int, like: Tensor) -> None:
        self._rows = rows
        self._block_tokens = block_tokens
        self._num_queries = num_queries
        self._segments: list[_Segment] = []
        run: list[SequenceSlice] = []
        run_start = 0
        for first_row, sequence in zip(rows.first_rows, batch.sequences, strict=True):
            if sequence.num_tokens == 1:
                run_start = run_start if run else first_row
                run.append(sequence)
                continue
            self._add(run_start, run, like)
            run = []
            self._add(first_row, [sequence], like)
        self._add(run_start, run, like)

    def _add(self, first_row: int, sequences: list[SequenceSlice], like: Tensor) -> None:
        if not sequences:
            return
        num_tokens = sequences[0].num_tokens
        lengths = [sequence.context_tokens + num_tokens for sequence in sequences]
        longest = max(lengths)
        num_blocks = -(-longest // self._block_tokens)
        table = [(s.blocks + [0] * num_blocks)[:num_blocks] for s in sequences]
        mask = None
        if num_tokens > 1 or min(lengths) < longest:
            ends = torch.tensor(lengths)[:, None] - num_tokens + torch.arange(num_tokens)
            hidden = torch.arange(longest) > ends[:, :, None]
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None, None]
            mask = mask.expand(-1, 1, self._num_queries, -1, -1).flatten(2, 3).to(like.device, like.dtype)
        blocks = torch.tensor(table, device=like.device).flatten()
        self._segments.append(_Segment(first_row, len(sequences), num_tokens, blocks, longest, mask))

    def __call__(self, qkv: Tensor, layer: int, pool: KvPool) -> Tensor:
        """Qkv [R, G, Q + 2, D] -> [R, G * Q * D]; appends K and V to the pool first."""
        pool.write(layer, self._rows.slots_R, qkv[:, :, -2:])
        outs = [self._attend(segment, qkv, layer, pool) for segment in self._segments]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _attend(self, segment: _Segment, qkv: Tensor, layer: int, pool: KvPool) -> Tensor:
        n, t, queries = segment.num_sequences, segment.num_tokens, self._num_queries
        _, groups, _, dim = qkv.shape
        q = qkv[segment.first_row : segment.first_row + n * t, :, :-2]
        # A group's query heads are rows of one attention problem: its keys and values are read once for all of them.
        q = q.view(n, t, groups, queries, dim).permute(0, 2, 3, 1, 4).reshape(n, groups, queries * t, dim)
        kv = pool.gather(layer, segment.blocks).view(n, -1, groups, 2, dim)[:, : segment.num_positions]
        k, v = kv.permute(3, 0, 2, 1, 4)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=segment.mask)
        return out.view(n, groups, queries, t, dim).permute(0, 3, 1, 2, 4).reshape(n * t, -1)
