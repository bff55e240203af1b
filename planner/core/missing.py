"""What each receiving rank lacks, and which ranks hold that: by classes of equal ranks and of units that the same ranks
hold.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.core.fleet import Rank
from planner.core.reuse import classes, held_units, needed_units, unit_bytes
from planner.protocol import EMBEDDING_LAYER, ModelShape, UnitRange

NO_UNIT = -1
Rectangle = tuple[int, int, int, int]
"""(first layer, last layer, first head group, last head group)"""
Run = tuple[int, int, int]
"""(first head group, last head group, signature)"""


class Piece(NamedTuple):
    """Units of consecutive layers (rows: from the embedding on), all held by the same ranks."""

    first_row: int
    last_row: int
    first_group: int
    last_group: int
    signature: int
    """Which ranks: a number of `Missing.signatures`."""

    def units(self) -> UnitRange:
        return UnitRange(
            first_layer=self.first_row + EMBEDDING_LAYER,
            last_layer=self.last_row + EMBEDDING_LAYER,
            first_group=self.first_group,
            last_group=self.last_group,
        )


class Missing:
    """`positions`: what each receiving rank (by number) will need."""

    def __init__(self, model: ModelShape, ranks: Sequence[Rank], positions: Mapping[int, Rectangle]) -> None:
        shape = (model.num_layers + 2, model.num_head_groups)
        holding_of, holdings = classes(tuple(rank.inventory.units) for rank in ranks)
        held = np.array([held_units(model, units) for units in holdings], dtype=np.bool_).reshape(
            len(holdings), shape[0] * shape[1]
        )
        members: list[list[int]] = [[] for _ in holdings]
        for number, holding in enumerate(holding_of.tolist()):
            members[holding].append(number)
        # Each unit's column of `held`, as a key.
        columns = np.packbits(held, axis=0).T if holdings else np.zeros((shape[0] * shape[1], 0), dtype=np.uint8)
        signature_of, keys = classes(column.tobytes() for column in np.ascontiguousarray(columns))
        self.signatures = [
            [number for holding in np.flatnonzero(_bits(key)).tolist() for number in members[holding]] for key in keys
        ]
        """The ranks that hold a unit, for each set of ranks that there is."""
        need_of, needs = classes(positions.values())
        needed = np.array([needed_units(model, *need) for need in needs], dtype=np.bool_).reshape(
            len(needs), shape[0] * shape[1]
        )
        pair_of, pairs = classes(zip(holding_of[list(positions)].tolist(), need_of.tolist(), strict=True))
        self._pair_of = dict(zip(positions, pair_of.tolist(), strict=True))
        self._grids = [
            np.where(needed[need] & ~held[holding], signature_of, NO_UNIT).reshape(shape) for holding, need in pairs
        ]
        self._pieces: dict[int, list[Piece]] = {}
        sizes = unit_bytes(model)
        counts = np.bincount(pair_of, minlength=len(pairs))
        all_units = [needed[need] for _, need in pairs]
        self.needed_bytes = sum(
            float(sizes[units].sum()) * count for units, count in zip(all_units, counts, strict=True)
        )
        self.num_bytes = sum(
            float(sizes[grid.ravel() != NO_UNIT].sum()) * count for grid, count in zip(self._grids, counts, strict=True)
        )
        # Of one rank of each pair of holding and need; columns.
        by_layer = sizes.reshape(shape)
        self.grow_bytes = _columns(((grid != NO_UNIT) * by_layer for grid in self._grids), shape[0])
        useless = ((held[holding] & ~needed[need]).reshape(shape) * by_layer for holding, need in pairs)
        self.release_bytes = _columns(useless, shape[0])
        self.room_bytes = np.maximum(0.0, self.grow_bytes.sum(axis=0) - self.release_bytes.sum(axis=0))

    def rows_with(self, signatures: Collection[int]) -> set[int]:
        """Rows in which somebody misses a unit of one of `signatures`."""
        found = [np.isin(grid, list(signatures)).any(axis=1) for grid in self._grids]
        return set(np.flatnonzero(np.any(found, axis=0)).tolist()) if found else set()

    def pieces_of(self, receiver: int, order: Sequence[int]) -> list[Piece]:
        """What `receiver` lacks, each unit once, by the steps of `order` (rows); the same order in all calls."""
        pair = self._pair_of[receiver]
        if pair not in self._pieces:
            self._pieces[pair] = _pieces(self._grids[pair], order)
        return self._pieces[pair]


def _pieces(grid: NDArray[np.int64], order: Sequence[int]) -> list[Piece]:
    pieces: list[Piece] = []
    open_at: dict[Run, int] = {}
    """Pieces that the last row has extended, by groups and signature."""
    runs_of: dict[bytes, list[Run]] = {}
    for row in order:
        line = grid[row].tobytes()
        if line not in runs_of:
            runs_of[line] = _runs(grid[row].tolist())
        still_open = {}
        for run in runs_of[line]:
            at = open_at.get(run)
            if at is not None and pieces[at].last_row == row - 1:
                pieces[at] = pieces[at]._replace(last_row=row)
            else:
                at = len(pieces)
                pieces.append(Piece(row, row, *run))
            still_open[run] = at
        open_at = still_open
    return pieces


def _runs(signatures: list[int]) -> list[Run]:
    """Of equal values, except `NO_UNIT`."""
    runs, first = [], 0
    for signature, members in groupby(signatures):
        end = first + len(list(members))
        if signature != NO_UNIT:
            runs.append((first, end - 1, signature))
        first = end
    return runs


def _bits(key: bytes) -> NDArray[np.uint8]:
    return np.unpackbits(np.frombuffer(key, dtype=np.uint8))


def _columns(grids: Iterable[NDArray[np.float64]], num_rows: int) -> NDArray[np.float64]:
    """The sum of each row of each grid: a column a grid."""
    sums = [grid.sum(axis=1) for grid in grids]
    return np.stack(sums, axis=1) if sums else np.zeros((num_rows, 0))
