"""The block tables of a scheduler's sequences: which blocks of the KV pool each has, shares, and lets others find."""

from __future__ import annotations

from collections.abc import Iterable

from engine.core.block_manager import BlockManager
from engine.core.prefix_index import ROOT, Prefix
from engine.core.scheduler_types import SchedulerLimits
from engine.core.sequence import Sequence


class BlockTables:
    def __init__(self, limits: SchedulerLimits) -> None:
        self.pool = BlockManager(limits.num_blocks, limits.block_tokens)
        self._block_tokens = limits.block_tokens
        self._shares = limits.prefix_caching

    def covering(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """The blocks of its first `num_tokens` tokens."""
        return sequence.blocks[: self.pool.blocks_for(num_tokens)]

    def reusable(self, sequence: Sequence) -> Prefix:
        """Blocks that hold its first tokens already; never the last one's, which must be fed, for its logits."""
        if not self._shares or sequence.scores_prompt:
            return Prefix(ROOT, [])
        return self.pool.find_prefix(sequence.tokens[:-1])

    def open(self, sequence: Sequence, prefix: Prefix, num_spare: int) -> bool:
        """Give it blocks for all its tokens, those of `prefix` first, whose KV it then has.

        False, with no change, if `num_spare` blocks would not be left.
        """
        num_new = self.pool.blocks_for(len(sequence.tokens)) - len(prefix.blocks)
        if self.pool.num_free < num_new + self.pool.num_kept(prefix.blocks) + num_spare:
            return False
        self.pool.share(prefix.blocks)
        new = self.pool.allocate(num_new)
        assert new is not None, "they were counted"
        sequence.blocks = prefix.blocks + new
        sequence.prefix_node, sequence.num_indexed = prefix.node, len(prefix.blocks)
        num_reused = len(prefix.blocks) * self._block_tokens
        sequence.num_computed = sequence.num_fed = sequence.reused_tokens = num_reused
        return True

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make its table cover `num_tokens`; False, with no change, if too few blocks are free."""
        blocks = self.pool.allocate(max(0, self.pool.blocks_for(num_tokens) - len(sequence.blocks)))
        if blocks is None:
            return False
        sequence.blocks += blocks
        return True

    def index(self, sequence: Sequence) -> None:
        """Let others find the blocks that have become full."""
        if not self._shares:
            return
        size = self._block_tokens
        for i in range(sequence.num_indexed, sequence.num_computed // size):
            tokens = sequence.tokens[i * size : (i + 1) * size]
            sequence.prefix_node = self.pool.add_prefix(sequence.prefix_node, tokens, sequence.blocks[i])
            sequence.num_indexed = i + 1

    def close(self, sequence: Sequence) -> None:
        """Take its blocks back."""
        self.pool.free(sequence.blocks)
        sequence.blocks = []

    def check_invariants(self, owners: Iterable[Sequence]) -> None:
        """Raises AssertionError for a block that is leaked, freed twice, shared by accident, or too much or too few."""
        sequences = list(owners)
        self.pool.check_invariants(s.blocks for s in sequences)
        for s in sequences:
            what = f"{s.key} ({s.state}, {s.num_fed} tokens fed, {s.num_indexed} blocks indexed): "
            assert len(s.blocks) >= self.pool.blocks_for(s.num_fed), what + "table too short"
            # A block that others may share is never written again.
            assert s.num_indexed <= s.num_computed // self._block_tokens or not s.blocks, what + "shares what it writes"
