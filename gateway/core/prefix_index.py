"""Which prompts a pipeline has probably cached: an approximate index of what this gateway has sent it. Pure.

A prompt is cut into blocks of the engine's size; a block's key is a hash of its ids and of the key before it, so that
equal keys mean equal prefixes. The engine keeps blocks until it needs their memory, the least recently used first: so
does the index, for as many blocks as the pipeline has.
"""

from __future__ import annotations

from collections.abc import Sequence


def block_keys(ids: Sequence[int], block_tokens: int) -> list[int]:
    """Keys of the whole blocks of `ids`, in order; none if `block_tokens` is 0."""
    if block_tokens <= 0:
        return []
    keys, key = [], 0
    for end in range(block_tokens, len(ids) + 1, block_tokens):
        key = hash((key, *ids[end - block_tokens : end]))
        keys.append(key)
    return keys


class PrefixIndex:
    """The block keys of one pipeline, the most recently used last."""

    def __init__(self) -> None:
        self._keys: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def num_blocks(self, keys: Sequence[int]) -> int:
        """So many of the first `keys` are there."""
        return next((number for number, key in enumerate(keys) if key not in self._keys), len(keys))

    def add(self, keys: Sequence[int], max_blocks: int) -> None:
        """`keys` were sent; forget the least recently used beyond `max_blocks`."""
        # The last block of a chain is of no use without the first: the first are the most recent.
        for key in reversed(keys):
            self._keys.pop(key, None)
            self._keys[key] = None
        while len(self._keys) > max_blocks:
            del self._keys[next(iter(self._keys))]
