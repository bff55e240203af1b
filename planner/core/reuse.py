"""How many bytes of context each rank holds already for each position of the new pipelines.

Ranks that hold the same units are one class, positions that need the same units another: a fleet of thousands has a
few dozen of each, and only their products are computed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from planner.core.fleet import Rank
from planner.protocol import EMBEDDING_LAYER, ModelShape, Pipeline, UnitRange

RankByPosition = NDArray[np.float64]
"""Bytes: a row a rank, a column a position."""

NO_HEIR: Final = -1

Key = TypeVar("Key", bound=Hashable)


class SlotShape(msgspec.Struct, frozen=True):
    """One new pipeline: (first, last) decoder layer of each stage, and the tensor degree of all of them."""

    stages: tuple[tuple[int, int], ...]
    tensor: int


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """One shard of one stage of one new pipeline (`slot`: which of them)."""

    slot: int
    stage: int
    shard: int
    first_layer: int
    last_layer: int
    first_group: int
    last_group: int

    @property
    def rectangle(self) -> tuple[int, int, int, int]:
        """Its decoder layers and head groups."""
        return self.first_layer, self.last_layer, self.first_group, self.last_group


def positions_of(slots: Sequence[SlotShape], num_groups: int) -> list[Position]:
    """All positions of the new pipelines, slot by slot, stage by stage, shard by shard."""
    return [
        Position(
            slot=number,
            stage=stage,
            shard=shard,
            first_layer=first,
            last_layer=last,
            first_group=num_groups * shard // slot.tensor,
            last_group=num_groups * (shard + 1) // slot.tensor - 1,
        )
        for number, slot in enumerate(slots)
        for stage, (first, last) in enumerate(slot.stages)
        for shard in range(slot.tensor)
    ]


class ReuseTable:
    """Reusable bytes by class; `bytes_between` gives any part of the matrix of ranks and positions.

    The KV of a retiring pipeline counts, K and V both, for the positions of the one slot that inherits from it.
    """

    def __init__(
        self,
        model: ModelShape,
        ranks: Sequence[Rank],
        positions: Sequence[Position],
        retiring: Sequence[Pipeline] = (),
        inherits: Sequence[Sequence[str]] = (),
    ) -> None:
        self.holding_of, holdings = classes(tuple(rank.inventory.units) for rank in ranks)
        self.need_of, needs = classes(position.rectangle for position in positions)
        held = np.array([held_units(model, units) for units in holdings]) * unit_bytes(model)
        needed = np.array([needed_units(model, *need) for need in needs])
        self._weight_bytes = held @ needed.T
        self.slot_of = np.array([position.slot for position in positions])
        parts = _kv_parts(ranks, retiring, inherits)
        self.kv_of, rectangles = classes(part[0] for part in parts)
        self.heir_of = np.array([part[1] for part in parts])
        self._kv_bytes_per_token = model.kv_unit_bytes_per_token * _overlaps(rectangles, needs)
        self._kv_tokens = np.array([float(part[2]) for part in parts])

    def bytes_between(self, ranks: Sequence[int], positions: Sequence[int]) -> RankByPosition:
        """Rows and columns by index, as the ranks and positions were given."""
        rows, columns = np.asarray(ranks), np.asarray(positions)
        needs = self.need_of[columns]
        result: RankByPosition = self._weight_bytes[self.holding_of[rows][:, None], needs]
        heirs = self.heir_of[rows]
        if (heirs != NO_HEIR).any():
            per_token = self._kv_bytes_per_token[self.kv_of[rows][:, None], needs]
            inheriting = heirs[:, None] == self.slot_of[columns]
            result = result + per_token * self._kv_tokens[rows][:, None] * inheriting
        return result

    def bytes_of_pairs(self, ranks: Sequence[int], positions: Sequence[int]) -> float:
        """Sum over pairs, one of each."""
        rows, columns = np.asarray(ranks), np.asarray(positions)
        weights = self._weight_bytes[self.holding_of[rows], self.need_of[columns]]
        per_token = self._kv_bytes_per_token[self.kv_of[rows], self.need_of[columns]]
        inheriting = self.heir_of[rows] == self.slot_of[columns]
        return float((weights + per_token * self._kv_tokens[rows] * inheriting).sum())

    def most_bytes(self) -> float:
        """No mapping reuses more."""
        most_kv = self._kv_bytes_per_token.max(axis=1)[self.kv_of] * self._kv_tokens
        return float(self._weight_bytes.max(axis=0)[self.need_of].sum() + most_kv.sum())

    def weight_bytes_between(self, holdings: Sequence[int], needs: Sequence[int]) -> RankByPosition:
        """The same without KV, by class (`holding_of`, `need_of`)."""
        result: RankByPosition = self._weight_bytes[np.ix_(holdings, needs)]
        return result


def held_units(model: ModelShape, ranges: Iterable[UnitRange]) -> NDArray[np.bool_]:
    """Vector over all units of the model: (num_layers + 2) * num_head_groups, embedding first, head last.

    Parts of a range outside the model are ignored.
    """
    grid = np.zeros((model.num_layers + 2, model.num_head_groups), dtype=np.bool_)
    for r in ranges:
        first = max(r.first_layer, EMBEDDING_LAYER) + 1
        grid[first : max(r.last_layer + 2, 0), max(r.first_group, 0) : max(r.last_group + 1, 0)] = True
    return grid.ravel()


def needed_units(
    model: ModelShape, first_layer: int, last_layer: int, first_group: int, last_group: int
) -> NDArray[np.float64]:
    """Vector over all units of the model: 1 where a position of these decoder layers and head groups needs it."""
    grid = np.zeros((model.num_layers + 2, model.num_head_groups))
    layers = [layer + 1 for layer in model.layers_of_stage(first_layer, last_layer)]
    grid[layers, first_group : last_group + 1] = 1.0
    return grid.ravel()


def unit_bytes(model: ModelShape) -> NDArray[np.float64]:
    """Vector over all units of the model."""
    by_layer = [float(model.unit_bytes(layer)) for layer in range(EMBEDDING_LAYER, model.num_layers + 1)]
    return np.repeat(by_layer, model.num_head_groups)


def _kv_parts(
    ranks: Sequence[Rank], retiring: Sequence[Pipeline], inherits: Sequence[Sequence[str]]
) -> list[tuple[tuple[int, int, int, int], int, int]]:
    """(rectangle, slot that inherits it, tokens) of the KV of each rank."""
    heirs = {name: slot for slot, names in enumerate(inherits) for name in names}
    found: dict[str, tuple[str, tuple[int, int, int, int], int]] = {}
    for pipeline in retiring:
        for stage in pipeline.stages if pipeline.id in heirs else ():
            for shard in stage.shards:
                rectangle = (stage.first_layer, stage.last_layer, shard.first_group, shard.last_group)
                found.setdefault(shard.rank, (pipeline.id, rectangle, heirs[pipeline.id]))
    nothing = ("", (0, -1, 0, -1), NO_HEIR)
    parts = []
    for rank in ranks:
        name, rectangle, heir = found.get(rank.id, nothing)
        runs_another = rank.inventory.pipeline not in (None, name)
        parts.append((rectangle, NO_HEIR if runs_another else heir, rank.inventory.kv_tokens))
    return parts


def _overlaps(
    rectangles: Sequence[tuple[int, int, int, int]], others: Sequence[tuple[int, int, int, int]]
) -> NDArray[np.float64]:
    """Number of units in both, for each pair."""
    a, b = np.array(rectangles)[:, None, :], np.array(others)[None, :, :]
    layers = np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0]) + 1
    groups = np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 2], b[..., 2]) + 1
    result: NDArray[np.float64] = np.maximum(layers, 0) * np.maximum(groups, 0.0)
    return result


def classes(keys: Iterable[Key]) -> tuple[NDArray[np.int64], list[Key]]:
    """The class of each key, and one key of each class."""
    numbers: dict[Key, int] = {}
    members = [numbers.setdefault(key, len(numbers)) for key in keys]
    return np.array(members, dtype=np.int64), list(numbers)
