"""Accounting of the KV pool: fixed-size blocks with reference counts. It knows block numbers, no tensors."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from engine.core.prefix_index import Prefix, PrefixIndex
from engine.errors import BlockError


class BlockManager:
    """`num_blocks` blocks of `block_tokens` tokens each, handed out by number (0 .. num_blocks-1).

    A block is free, or has as many references as it has owners. A free block whose content was told (`add_prefix`)
    keeps it until it is needed, the longest unused first: who finds it may share it. No call does work that grows with
    the pool, `check_invariants` apart.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        # A stack: the block freed last is handed out first, so that a small load stays in a small part of the pool.
        self._free = list(range(num_blocks - 1, -1, -1))
        # Free with content; the longest unused first.
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._num_refs = [0] * num_blocks
        self._index = PrefixIndex(block_tokens)

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._kept)

    @property
    def num_cached(self) -> int:
        """Blocks, free or not, whose content can be found."""
        return len(self._index)

    def num_kept(self, blocks: Iterable[int]) -> int:
        """How many of them are free: sharing these makes the free ones fewer."""
        return sum(block in self._kept for block in blocks)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_tokens)

    def find_prefix(self, tokens: Sequence[int]) -> Prefix:
        """Blocks that hold the longest known beginning of `tokens`; share them before anything else is allocated."""
        return self._index.find(tokens)

    def add_prefix(self, node: int, tokens: Sequence[int], block: int) -> int:
        """An owned block is full: it holds `tokens` after the prefix `node`. The node of both; see PrefixIndex."""
        return self._index.add(node, tokens, block)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """`num_blocks` blocks with one reference each, or None (and no change) if fewer are free."""
        if num_blocks > self.num_free:
            return None
        blocks = [self._take() for _ in range(num_blocks)]
        for block in blocks:
            self._num_refs[block] = 1
        return blocks

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._kept.popitem(last=False)
        self._index.drop(block)
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to each block. Raises BlockError, with no change, for one without owner or known content."""
        blocks = self._checked(blocks, "share", kept=True)
        for block in blocks:
            self._num_refs[block] += 1
            self._kept.pop(block, None)

    def free(self, blocks: Iterable[int]) -> None:
        """Take one owner from each block; the last one frees it.

        Raises BlockError, with no change, for a block that nobody owns, or that is named more often than it
        has owners.
        """
        blocks = self._checked(blocks, "free")
        for block, num_taken in Counter(blocks).items():
            if num_taken > self._num_refs[block]:
                raise BlockError("free", block, self._num_refs[block])
        # A sequence's last blocks are the first to lose their content: without those before they are of no use.
        for block in reversed(blocks):
            self._num_refs[block] -= 1
            if self._num_refs[block]:
                continue
            if block in self._index:
                self._kept[block] = None
            else:
                self._free.append(block)

    def check_invariants(self, owners: Iterable[Iterable[int]]) -> None:
        """`owners`: the block table of each owner. Raises AssertionError for any leak, double free or false sharing."""
        num_owners = Counter(block for blocks in owners for block in blocks)
        free = Counter([*self._free, *self._kept])
        for block, num_refs in enumerate(self._num_refs):
            assert num_refs == num_owners[block], f"block {block}: {num_refs} references, {num_owners[block]} owners"
            assert free[block] == (num_refs == 0), (
                f"block {block}: {num_refs} references, {free[block]} times in the free list"
            )
        assert all(block in self._index for block in self._kept), "a block is kept that nobody can find"
        assert not any(block in self._index for block in self._free), "a block with content is handed out first"

    def _checked(self, blocks: Iterable[int], action: str, *, kept: bool = False) -> list[int]:
        checked = list(blocks)
        for block in checked:
            owned = 0 <= block < self.num_blocks and self._num_refs[block]
            if not (owned or (kept and block in self._kept)):
                raise BlockError(action, block, 0)
        return checked
