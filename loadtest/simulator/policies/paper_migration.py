"""Where the paper's device mapper puts the positions of equal pipelines, and what moving there costs.

Digest, section 4: hierarchical Kuhn-Munkres matching, first inside clusters of co-located ranks, then between
clusters and tensor blocks, on the bytes of weights and of inherited KV that stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from loadtest.simulator.scenario import Scenario
from planner.core.links import Links
from planner.protocol import EMBEDDING_LAYER, ModelShape


class Rank(NamedTuple):
    instance: str
    number: int
    """In its instance."""


class Place(NamedTuple):
    """One position: which replica, stage and shard."""

    replica: int
    stage: int
    shard: int


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """`data` equal pipelines and the rank of each of their positions."""

    data: int
    pipeline: int
    tensor: int
    places: dict[Rank, Place]

    def replicas(self) -> list[frozenset[str]]:
        """The instances of each."""
        instances: list[set[str]] = [set() for _ in range(self.data)]
        for rank, place in self.places.items():
            instances[place.replica].add(rank.instance)
        return [frozenset(names) for names in instances]


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """The KV of an interrupted batch: tokens in all, of the replica that ran it, for the new one that goes on."""

    old_replica: int
    new_replica: int
    num_tokens: int


class Move(msgspec.Struct, frozen=True, kw_only=True):
    layout: Layout
    seconds: float
    moved_bytes: int


T = TypeVar("T")
UnitBytes = NDArray[np.float64]
UnitGrid = NDArray[np.bool_]
"""(num_layers + 2) x num_head_groups: embedding first, output head last."""


def ranks_of(instances: Sequence[str], ranks_per_instance: int) -> list[Rank]:
    """In order of instance."""
    return [Rank(instance, number) for instance in instances for number in range(ranks_per_instance)]


def first_layout(shape: tuple[int, int, int], ranks: Sequence[Rank]) -> Layout:
    """Positions in order of rank, as at a start from nothing."""
    data, pipeline, tensor = shape
    return Layout(
        data=data,
        pipeline=pipeline,
        tensor=tensor,
        places=dict(zip(ranks, _places(shape, range(data)), strict=False)),
    )


def extended(scenario: Scenario, old: Layout, data: int, instances: Sequence[str]) -> Move:
    """More pipelines on idle ranks; those that there are stay as they are."""
    shape = (data, old.pipeline, old.tensor)
    idle = [rank for rank in ranks_of(instances, scenario.ranks_per_instance) if rank not in old.places]
    places = dict(old.places) | dict(zip(idle, _places(shape, range(old.data, data)), strict=False))
    layout = Layout(data=data, pipeline=old.pipeline, tensor=old.tensor, places=places)
    return _move(scenario, old, layout, instances, ())


def move(
    scenario: Scenario,
    old: Layout | None,
    shape: tuple[int, int, int],
    instances: Sequence[str],
    kept: Sequence[Kept] = (),
    *,
    matched: bool = True,
) -> Move:
    """The new layout on these instances, and the time until everything is where it is needed.

    `matched` is false for the ablation without a device mapper: positions are dealt out in order of rank.
    """
    ranks = ranks_of(instances, scenario.ranks_per_instance)
    reuses = old if matched else None
    layout = _matched(scenario, reuses, shape, ranks, kept) if reuses is not None else first_layout(shape, ranks)
    return _move(scenario, old, layout, instances, kept)


def _move(
    scenario: Scenario, old: Layout | None, layout: Layout, instances: Sequence[str], kept: Sequence[Kept]
) -> Move:
    model = scenario.model
    traffic = _Traffic(old, layout, instances)
    traffic.add(_weight_bytes(model))
    for cache in kept:
        traffic.add(_kv_bytes(model) * cache.num_tokens, cache)
    return Move(layout=layout, seconds=traffic.seconds(scenario.links), moved_bytes=traffic.num_bytes)


class _Traffic:
    """Bytes that each instance receives, from others and inside itself."""

    def __init__(self, old: Layout | None, new: Layout, instances: Sequence[str]) -> None:
        self._old = old
        self._new = new
        self._inter: dict[str, float] = dict.fromkeys(instances, 0.0)
        self._intra: dict[str, float] = dict.fromkeys(instances, 0.0)

    def add(self, unit_bytes: UnitBytes, cache: Kept | None = None) -> None:
        """Units that a position needs and its rank does not hold; of `cache` only the KV of its replica."""
        shape, none = unit_bytes.shape, np.zeros(unit_bytes.shape, np.bool_)
        held = self._held(shape, cache)
        near: dict[str, UnitGrid] = {}
        for rank, units in held.items():
            near[rank.instance] = near.get(rank.instance, none) | units
        for rank, place in self._new.places.items():
            if cache is None or place.replica == cache.new_replica:
                missing = _units(place, self._new, shape) & ~held.get(rank, none)
                is_near = near.get(rank.instance, none)
                self._inter[rank.instance] += float(unit_bytes[missing & ~is_near].sum())
                self._intra[rank.instance] += float(unit_bytes[missing & is_near].sum())

    def _held(self, shape: tuple[int, ...], cache: Kept | None) -> dict[Rank, UnitGrid]:
        if self._old is None:
            return {}
        return {
            rank: _units(place, self._old, shape)
            for rank, place in self._old.places.items()
            if cache is None or place.replica == cache.old_replica
        }

    @property
    def num_bytes(self) -> int:
        return round(sum(self._inter.values()) + sum(self._intra.values()))

    def seconds(self, links: Links) -> float:
        """Digest, section 3: the slowest instance between instances, then the slowest inside one, and a constant."""
        inter_s = max(self._inter.values(), default=0.0) / links.inter_bytes_per_s
        intra_s = max(self._intra.values(), default=0.0) / links.intra_bytes_per_s
        return inter_s + intra_s + links.fixed_s


def _matched(
    scenario: Scenario, old: Layout, shape: tuple[int, int, int], ranks: Sequence[Rank], kept: Sequence[Kept]
) -> Layout:
    """Clusters of ranks of one instance against tensor blocks; positions that stay without one get no place."""
    data, pipeline, tensor = shape
    new = Layout(data=data, pipeline=pipeline, tensor=tensor, places={})
    reuse = _Reuse(scenario.model, old, new, kept)
    size = min(tensor, scenario.ranks_per_instance)
    clusters = _chunks(ranks, size)
    blocks = _chunks(_places(shape, range(data)), size)
    best = [[_best(reuse, cluster, block) for block in blocks] for cluster in clusters]
    weights = np.array([[weight for weight, _ in row] for row in best])
    for row, column in zip(*linear_sum_assignment(weights, maximize=True), strict=True):
        new.places.update(best[row][column][1])
    return new


def _best(reuse: _Reuse, cluster: Sequence[Rank], block: Sequence[Place]) -> tuple[float, dict[Rank, Place]]:
    """Which rank of the cluster takes which shard, and the bytes that stay."""
    weights = np.array([[reuse.num_bytes(rank, place) for place in block] for rank in cluster])
    rows, columns = linear_sum_assignment(weights, maximize=True)
    taken = {cluster[int(row)]: block[int(column)] for row, column in zip(rows, columns, strict=True)}
    return float(weights[rows, columns].sum()), taken


class _Reuse:
    """Bytes on a rank that a position needs: weights, and the KV that its replica inherits."""

    def __init__(self, model: ModelShape, old: Layout, new: Layout, kept: Sequence[Kept]) -> None:
        self._weights, self._kv = _weight_bytes(model), _kv_bytes(model)
        self._old, self._new = old, new
        self._inherits = {cache.new_replica: cache for cache in kept}
        self._known: dict[tuple[Place, Place], float] = {}

    def num_bytes(self, rank: Rank, place: Place) -> float:
        was = self._old.places.get(rank)
        if was is None:
            return 0.0
        if (was, place) not in self._known:
            self._known[was, place] = self._count(was, place)
        return self._known[was, place]

    def _count(self, was: Place, place: Place) -> float:
        shared = _units(was, self._old, self._weights.shape) & _units(place, self._new, self._weights.shape)
        cache = self._inherits.get(place.replica)
        kv_tokens = cache.num_tokens if cache is not None and cache.old_replica == was.replica else 0
        return float(self._weights[shared].sum() + kv_tokens * self._kv[shared].sum())


def _chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Whole ones only."""
    return [items[first : first + size] for first in range(0, len(items) - size + 1, size)]


def _places(shape: tuple[int, int, int], replicas: Sequence[int]) -> list[Place]:
    _, pipeline, tensor = shape
    return [Place(r, stage, shard) for r in replicas for stage in range(pipeline) for shard in range(tensor)]


def _units(place: Place, layout: Layout, shape: tuple[int, ...]) -> UnitGrid:
    """The units of a position: equal stages but for the last, consecutive head groups."""
    grid = np.zeros(shape, np.bool_)
    num_layers, num_groups = shape[0] - 2, shape[1]
    per_stage = -(-num_layers // layout.pipeline)
    first = place.stage * per_stage
    last = min(first + per_stage, num_layers)
    width = num_groups // layout.tensor
    groups = slice(place.shard * width, (place.shard + 1) * width)
    grid[first + 1 : last + 1, groups] = True
    if place.stage == 0:
        grid[0, groups] = True
    if place.stage == layout.pipeline - 1:
        grid[-1, groups] = True
    return grid


def _weight_bytes(model: ModelShape) -> UnitBytes:
    by_layer = [float(model.unit_bytes(layer)) for layer in range(EMBEDDING_LAYER, model.num_layers + 1)]
    return np.repeat(np.array(by_layer)[:, None], model.num_head_groups, axis=1)


def _kv_bytes(model: ModelShape) -> UnitBytes:
    """Of one token."""
    by_layer = [0.0, *[float(model.kv_unit_bytes_per_token)] * model.num_layers, 0.0]
    return np.repeat(np.array(by_layer)[:, None], model.num_head_groups, axis=1)
