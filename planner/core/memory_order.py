"""In which order layers move so that no rank holds too much on the way (SpotServe's MemOptMigPlanner, Algorithm 2).

A step moves one layer: its receivers grow, and once all have it, those that do not need the layer any more let it go.
The paper takes layers in index order, defers those that break the bound, and places the deferred ones so that the
fullest rank is least full. Here a deferred layer is tried again after every step, and a search goes back over earlier
choices before the bound is given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

LayerByRank = NDArray[np.float64]
"""Bytes: a row a layer, a column a rank."""

MAX_SEARCHED: Final = 1024
"""Sets of moved layers that are looked at before the bound is given up: all there are, for up to ten layers."""


def memory_order(
    grow: LayerByRank,
    release: LayerByRank,
    room: NDArray[np.float64],
    bound_bytes: float,
    preferred: Sequence[int],
) -> tuple[list[int], float]:
    """The order of the layers (row numbers), and the most by which any rank is beyond its `room` on the way.

    `grow`: what each rank receives with a layer; `release`: what it lets go after that. `room`: what each may grow at
    no cost. `preferred`: the order to follow as far as no rank comes further than `bound_bytes` beyond its room.
    """
    if not room.size:
        return list(preferred), 0.0
    columns = np.unique(np.concatenate([grow, release, room[None, :]]), axis=1)
    num_layers = len(grow)
    grow, release, beyond = columns[:num_layers], columns[num_layers:-1], -columns[-1]
    order = list(preferred)
    if _peak(grow, release, beyond, order) > bound_bytes:
        order = _search(grow, release, beyond, bound_bytes, preferred) or _least_full(
            grow, release, beyond, bound_bytes, preferred
        )
    return order, _peak(grow, release, beyond, order)


def _peak(grow: LayerByRank, release: LayerByRank, beyond: NDArray[np.float64], order: Sequence[int]) -> float:
    before = beyond + np.cumsum(grow[order] - release[order], axis=0) + release[order]
    return max(0.0, float(before.max(initial=0.0)))


def _search(
    grow: LayerByRank,
    release: LayerByRank,
    beyond: NDArray[np.float64],
    bound_bytes: float,
    preferred: Sequence[int],
) -> list[int] | None:
    """Depth first, in the preferred order, over the sets of moved layers; None if the bound cannot be kept (or found
    to be, within `MAX_SEARCHED`).
    """
    safe: list[bool] = np.all(grow <= release, axis=1).tolist()
    seen = {frozenset[int]()}
    stack: list[tuple[list[int], NDArray[np.float64]]] = [([], beyond)]
    while stack and len(seen) <= MAX_SEARCHED:
        order, beyond = stack.pop()
        if len(order) == len(preferred):
            return order
        left = [layer for layer in preferred if layer not in order]
        fits = (beyond + grow[left] <= bound_bytes).all(axis=1)
        branches = []
        for layer in np.array(left)[fits].tolist():
            moved = frozenset([*order, layer])
            if moved not in seen:
                seen.add(moved)
                branches.append(([*order, layer], beyond + grow[layer] - release[layer]))
            if safe[layer]:  # It makes room for all that may follow: what it does not lead to, nothing does.
                break
        stack += reversed(branches)
    return None


def _least_full(
    grow: LayerByRank,
    release: LayerByRank,
    beyond: NDArray[np.float64],
    bound_bytes: float,
    preferred: Sequence[int],
) -> list[int]:
    """The first layer that fits; where none does, the one with which the fullest rank is least full."""
    order: list[int] = []
    left = list(preferred)
    while left:
        peaks = (beyond + grow[left]).max(axis=1)
        fitting = np.flatnonzero(peaks <= bound_bytes)
        layer = left.pop(int(fitting[0]) if len(fitting) else int(peaks.argmin()))
        order.append(layer)
        beyond = beyond + grow[layer] - release[layer]
    return order
