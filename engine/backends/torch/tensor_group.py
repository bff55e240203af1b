"""The ranks that share a stage, as its model sees them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class TensorGroup(Protocol):
    """`size` shards of one stage; this rank is shard `index`. Every shard makes the same calls in the same order."""

    @property
    def size(self) -> int: ...

    @property
    def index(self) -> int: ...

    def all_reduce(self, x: Tensor) -> None:
        """Replace `x` by the sum of all shards' `x`."""
        ...

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """All shards' `x`, which have the same shape, by shard index."""
        ...


class SoloGroup:
    """A stage of one rank."""

    size = 1
    index = 0

    def all_reduce(self, x: Tensor) -> None:
        """Leave `x` as it is."""

    def all_gather(self, x: Tensor) -> list[Tensor]:
        return [x]
