"""Accounting of the KV pool: fixed-size blocks with reference counts. It knows block numbers, no tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from engine.errors import BlockError


class BlockManager:
    """`num_blocks` blocks of `block_tokens` tokens each, handed out by number (0 .. num_blocks-1).

    A block is free, or has as many references as it has owners. No call does work that grows with the pool,
    `check_invariants` apart.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        # A stack: the block freed last is handed out first, so that a small load stays in a small part of the pool.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_refs = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_tokens)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """`num_blocks` blocks with one reference each, or None (and no change) if fewer are free."""
        if num_blocks > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(num_blocks)]
        for block in blocks:
            self._num_refs[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to each block. Raises BlockError, with no change, for a block that nobody owns."""
        blocks = self._owned(blocks, "share")
        for block in blocks:
            self._num_refs[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Take one owner from each block; the last one frees it.

        Raises BlockError, with no change, for a block that nobody owns, or that is named more often than it
        has owners.
        """
        blocks = self._owned(blocks, "free")
        for block, num_taken in Counter(blocks).items():
            if num_taken > self._num_refs[block]:
                raise BlockError("free", block, self._num_refs[block])
        for block in reversed(blocks):
            self._num_refs[block] -= 1
            if not self._num_refs[block]:
                self._free.append(block)

    def check_invariants(self, owners: Iterable[Iterable[int]]) -> None:
        """`owners`: the block table of each owner. Raises AssertionError for any leak, double free or false sharing."""
        num_owners = Counter(block for blocks in owners for block in blocks)
        free = Counter(self._free)
        for block, num_refs in enumerate(self._num_refs):
            assert num_refs == num_owners[block], f"block {block}: {num_refs} references, {num_owners[block]} owners"
            assert free[block] == (num_refs == 0), (
                f"block {block}: {num_refs} references, {free[block]} times in the free list"
            )

    def _owned(self, blocks: Iterable[int], action: str) -> list[int]:
        owned = list(blocks)
        for block in owned:
            if not (0 <= block < self.num_blocks and self._num_refs[block]):
                raise BlockError(action, block, 0)
        return owned
