"""Which blocks hold the KV of which beginnings of token sequences.

A trie over full blocks, kept as a map from (node of the blocks before, tokens of the block) to (node, block). Whole
tokens are compared, so that no two prefixes can be taken for each other as hashes could. A node's number is never used
again: once a block is dropped, what hung on it is out of reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Final, NamedTuple

ROOT: Final = 0
"""The node of the empty prefix."""

Key = tuple[int, tuple[int, ...]]


class Prefix(NamedTuple):
    """A beginning of whole blocks: where it ends in the trie, and the blocks that hold it."""

    node: int
    blocks: list[int]


class PrefixIndex:
    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._entries: dict[Key, tuple[int, int]] = {}
        self._keys: dict[int, Key] = {}
        self._new_node = count(ROOT + 1)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, block: int) -> bool:
        return block in self._keys

    def find(self, tokens: Sequence[int]) -> Prefix:
        """The longest beginning of `tokens` that is known."""
        node, blocks = ROOT, []
        for start in range(0, len(tokens) - self._block_tokens + 1, self._block_tokens):
            entry = self._entries.get((node, tuple(tokens[start : start + self._block_tokens])))
            if entry is None:
                break
            node = entry[0]
            blocks.append(entry[1])
        return Prefix(node, blocks)

    def add(self, node: int, tokens: Sequence[int], block: int) -> int:
        """`block` holds the KV of `tokens` after the prefix `node`; the node of both together.

        If another block holds the same, that one stays the one to be found.
        """
        key = (node, tuple(tokens))
        known = self._entries.get(key)
        if known is not None:
            return known[0]
        new_node = next(self._new_node)
        self._entries[key] = new_node, block
        self._keys[block] = key
        return new_node

    def drop(self, block: int) -> None:
        """What the block holds is about to be overwritten."""
        del self._entries[self._keys.pop(block)]
