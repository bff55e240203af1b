"""Give each position of the new pipelines a rank, so that the most bytes of weights and KV stay where they are.

Maximum-weight bipartite matching on two levels (SpotServe, section on device mapping): which ranks of an instance would
take which shards of a stage is the inner matching; its optimum is what the pair (instance, stage) weighs in the outer
one. A tensor group therefore stays inside an instance where it fits; one that is larger spans instances in blocks.

With a tensor degree of 1 (up to 2,048 positions), with one group to an instance, and for a few groups in all, the
result is optimal. Where instances take several of many groups, which ranks go together is improved in turns with who
takes what, until that gains nothing. Of pipelines with different tensor degrees the larger degree is served first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from planner.core.fleet import Rank
from planner.core.reuse import NO_HEIR, Position, RankByPosition, ReuseTable, SlotShape, held_units, positions_of
from planner.protocol import ModelShape, Pipeline

__all__ = [
    "Position",
    "RankByPosition",
    "SlotShape",
    "held_units",
    "map_devices",
    "positions_of",
    "reusable_bytes",
    "share_inheritance",
]

MAX_ROUNDS: Final = 4
"""Of improving the groups inside instances."""
MAX_SINGLES: Final = 2048
"""More positions than that of tensor degree 1 are matched in halves: the time grows with the cube of their number."""
MAX_EXACT_BLOCKS: Final = 6
MAX_EXACT_INSTANCES: Final = 16
"""Up to so many groups and instances all ways to put several groups into an instance are tried."""


def share_inheritance(
    retiring: Sequence[Pipeline],
    progress: Mapping[str, float],
    num_slots: int,
    room: Sequence[float] | None = None,
) -> list[list[str]]:
    """Which retiring pipelines each new one takes over: most progress first, to whoever has least of it.

    `progress` by pipeline id, for instance in tokens of live KV. `room` is what each slot can hold of it: a pipeline
    that finds no slot with room left is not handed on; its sequences go back to the queue with their log.
    """
    inherits: list[list[str]] = [[] for _ in range(num_slots)]
    taken = [0.0] * num_slots
    for pipeline in sorted(retiring, key=lambda p: (-progress.get(p.id, 0), p.id)):
        open_slots = [slot for slot in range(num_slots) if room is None or taken[slot] < room[slot]]
        if open_slots:
            slot = min(open_slots, key=lambda s: (taken[s], len(inherits[s]), s))
            inherits[slot].append(pipeline.id)
            taken[slot] += progress.get(pipeline.id, 0)
    return inherits


def map_devices(
    model: ModelShape,
    ranks: Sequence[Rank],
    slots: Sequence[SlotShape],
    retiring: Sequence[Pipeline] = (),
    inherits: Sequence[Sequence[str]] = (),
) -> list[Rank]:
    """The rank of each position, in the order of `positions_of(slots, ...)`.

    `inherits`: by slot, the ids of those of `retiring` that it takes over; each in one slot. Ranks under notice get
    positions only if the others do not suffice, and then only for tensor groups that these cannot form.
    Raises ValueError if there are fewer ranks than positions.
    """
    positions = positions_of(slots, model.num_head_groups)
    if not positions:
        return []
    ready = [rank for rank in ranks if rank.deadline_s is None]
    pool = ready if len(ready) >= len(positions) else list(ranks)
    if len(pool) < len(positions):
        raise ValueError(f"ranks: {len(pool)} for {len(positions)} positions")
    mapping = _Mapping(pool, positions, ReuseTable(model, pool, positions, retiring, inherits))
    rank_of = mapping.solve()
    return [pool[rank_of[index]] for index in range(len(positions))]


def reusable_bytes(
    model: ModelShape,
    ranks: Sequence[Rank],
    positions: Sequence[Position],
    retiring: Sequence[Pipeline] = (),
    inherits: Sequence[Sequence[str]] = (),
) -> RankByPosition:
    """Bytes of weights, and of KV that the position's pipeline inherits, that each rank holds for each position."""
    table = ReuseTable(model, ranks, positions, retiring, inherits)
    return table.bytes_between(range(len(ranks)), range(len(positions)))


class _Mapping:
    """Ranks and positions are indices; a block is the part of a stage that one instance takes."""

    def __init__(self, pool: Sequence[Rank], positions: Sequence[Position], table: ReuseTable) -> None:
        self._table = table
        self._under_notice = np.array([rank.deadline_s is not None for rank in pool])
        # More than all context together: one rank more under notice is never worth the bytes that it holds.
        self._penalty = 1.0 + table.most_bytes() if self._under_notice.any() else 0.0
        self._free: dict[str, list[int]] = defaultdict(list)
        for index in sorted(range(len(pool)), key=lambda index: (*_likeness(pool[index]), index)):
            self._free[pool[index].instance].append(index)
        self._instance_of = [rank.instance for rank in pool]
        stages: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, position in enumerate(positions):
            stages[position.slot, position.stage].append(index)
        self._blocks = list(stages.values())
        self._rank_of: dict[int, int] = {}

    def solve(self) -> dict[int, int]:
        """Position -> rank. The largest blocks first: smaller ones fit in between."""
        while self._blocks:
            room = max(map(len, self._free.values()))
            self._blocks = [part for block in self._blocks for part in _chunks(block, -(-len(block) // room))]
            size = max(map(len, self._blocks))
            self._place([block for block in self._blocks if len(block) == size], size)
            self._blocks = [block for block in self._blocks if block[0] not in self._rank_of]
        return self._rank_of

    def _place(self, blocks: list[list[int]], size: int) -> None:
        """Give ranks to as many of `blocks` as there is room for."""
        clusters = [part for ranks in self._free.values() for part in _chunks(ranks, len(ranks) // size)]
        roomy = [ranks for ranks in self._free.values() if len(ranks) >= size]
        if size == 1 or len(clusters) == len(roomy):
            rank_of = self._match(clusters, blocks)
        elif len(blocks) <= MAX_EXACT_BLOCKS and len(roomy) <= MAX_EXACT_INSTANCES:
            rank_of = self._try_all(roomy, blocks, size)
        else:
            whole = [ranks for ranks in roomy for _ in range(len(ranks) // size)]
            starts = [self._match(clusters, blocks), self._match(whole, blocks)]
            rank_of = max((self._improve(start, blocks, size) for start in starts), key=self._value)
        self._rank_of |= rank_of
        taken = set(rank_of.values())
        self._free = {name: [rank for rank in ranks if rank not in taken] for name, ranks in self._free.items()}

    def _try_all(self, instances: list[list[int]], blocks: list[list[int]], size: int) -> dict[int, int]:
        """Instance by instance, any of the blocks that are left; of equal sets of placed blocks the best is kept."""
        best: dict[frozenset[int], tuple[float, dict[int, int]]] = {frozenset(): (0.0, {})}
        for ranks in instances:
            longer = dict(best)
            for number in range(1, len(ranks) // size + 1):
                for subset in combinations(range(len(blocks)), number):
                    positions = [position for index in subset for position in blocks[index]]
                    weights = self._bytes(ranks, positions)
                    pairs = _best(weights)
                    value = sum(float(weights[pair]) for pair in pairs)
                    part = {positions[column]: ranks[row] for row, column in pairs}
                    for placed, (value_before, before) in best.items():
                        together = placed.union(subset)
                        is_new = together not in longer or value + value_before > longer[together][0]
                        if placed.isdisjoint(subset) and is_new:
                            longer[together] = (value + value_before, before | part)
            best = longer
        return best[max(best, key=lambda placed: (len(placed), best[placed][0]))][1]

    def _improve(self, rank_of: dict[int, int], blocks: list[list[int]], size: int) -> dict[int, int]:
        for _ in range(MAX_ROUNDS):
            better = self._match(self._regroup(rank_of, blocks, size), blocks)
            if self._value(better) <= self._value(rank_of):
                break
            rank_of = better
        return rank_of

    def _match(self, clusters: list[list[int]], blocks: list[list[int]]) -> dict[int, int]:
        if len(blocks[0]) == 1 and len(blocks) > MAX_SINGLES:
            return self._match_halves(clusters, blocks)
        rows, columns = linear_sum_assignment(self._pair_bytes(clusters, blocks), maximize=True)
        rank_of: dict[int, int] = {}
        members: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for row, column in zip(rows, columns, strict=True):
            ranks, positions = members[self._instance_of[clusters[row][0]]]
            ranks += clusters[row]
            positions += blocks[column]
        for name, (_, positions) in members.items():
            if len(blocks[0]) == 1:
                rank_of |= dict(zip(positions, members[name][0], strict=True))
            else:  # All of the instance's ranks together: what was one cluster's may be better used in another.
                ranks = self._free[name]
                weights = self._bytes(ranks, positions)
                rank_of |= {positions[c]: ranks[r] for r, c in _best(weights)}
        return rank_of

    def _match_halves(self, clusters: list[list[int]], blocks: list[list[int]]) -> dict[int, int]:
        """Half of the pipelines each, with the ranks whose KV they inherit."""
        half = len(blocks) // 2
        first_of_second = int(self._table.slot_of[blocks[half][0]])
        heirs = self._table.heir_of

        def side(cluster: list[int]) -> int:
            heir = int(heirs[cluster[0]])
            return 0 if heir == NO_HEIR else 1 if heir >= first_of_second else -1

        by_side = sorted(clusters, key=side)
        num_first = len(clusters) * half // len(blocks)
        first = self._match(by_side[:num_first], blocks[:half])
        return first | self._match(by_side[num_first:], blocks[half:])

    def _regroup(self, rank_of: Mapping[int, int], blocks: list[list[int]], size: int) -> list[list[int]]:
        """Clusters of those that serve a block together, and of the others of each instance."""
        together = [[rank_of[position] for position in block] for block in blocks if block[0] in rank_of]
        taken = set(rank_of.values())
        others = ([rank for rank in ranks if rank not in taken] for ranks in self._free.values())
        return together + [part for ranks in others for part in _chunks(ranks, len(ranks) // size)]

    def _pair_bytes(self, clusters: list[list[int]], blocks: list[list[int]]) -> RankByPosition:
        """The best inner matching of each pair; equal pairs are computed once."""
        if len(blocks[0]) == 1:
            singles = [position for [position] in blocks]
            return self._bytes([rank for [rank] in clusters], singles)
        table = self._table
        cluster_kind, cluster_kinds = _kinds(tuple(sorted(table.holding_of[cluster].tolist())) for cluster in clusters)
        block_kind, block_kinds = _kinds(tuple(table.need_of[block].tolist()) for block in blocks)
        by_kind = np.array(
            [
                [_best_sum(table.weight_bytes_between(holdings, needs)) for needs in block_kinds]
                for holdings in cluster_kinds
            ]
        )
        pairs: RankByPosition = by_kind[np.ix_(cluster_kind, block_kind)]
        self._count_kv(pairs, clusters, blocks)
        notices = self._under_notice[[cluster[0] for cluster in clusters]]
        result: RankByPosition = pairs - self._penalty * len(blocks[0]) * notices[:, None]
        return result

    def _count_kv(self, pairs: RankByPosition, clusters: list[list[int]], blocks: list[list[int]]) -> None:
        """Compute the pairs anew in which ranks hold KV that the block's pipeline inherits."""
        blocks_of: dict[int, list[int]] = defaultdict(list)
        for column, block in enumerate(blocks):
            blocks_of[int(self._table.slot_of[block[0]])].append(column)
        for row, cluster in enumerate(clusters):
            for heir in set(self._table.heir_of[cluster].tolist()) - {NO_HEIR}:
                for column in blocks_of[heir]:
                    pairs[row, column] = _best_sum(self._table.bytes_between(cluster, blocks[column]))

    def _bytes(self, ranks: Sequence[int], positions: Sequence[int]) -> RankByPosition:
        weights = self._table.bytes_between(ranks, positions)
        if self._penalty:
            weights = weights - self._penalty * self._under_notice[list(ranks)][:, None]
        return weights

    def _value(self, rank_of: Mapping[int, int]) -> float:
        ranks = list(rank_of.values())
        num_under_notice = float(self._under_notice[ranks].sum())
        return self._table.bytes_of_pairs(ranks, list(rank_of)) - self._penalty * num_under_notice


def _likeness(rank: Rank) -> tuple[str, int]:
    """Ranks that were one tensor group sort together."""
    units = rank.inventory.units
    return rank.inventory.pipeline or "", units[0].first_layer if units else 0


def _best(weights: RankByPosition) -> list[tuple[int, int]]:
    rows, columns = linear_sum_assignment(weights, maximize=True)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def _best_sum(weights: RankByPosition) -> float:
    return float(weights[linear_sum_assignment(weights, maximize=True)].sum())


def _chunks(items: list[int], num_parts: int) -> list[list[int]]:
    """`items` in `num_parts` runs of nearly the same length; nothing for 0 parts."""
    bounds = [len(items) * index // num_parts for index in range(num_parts + 1)] if num_parts else []
    return [items[first:last] for first, last in pairwise(bounds)]


def _kinds(keys: Iterable[tuple[int, ...]]) -> tuple[NDArray[np.int64], list[tuple[int, ...]]]:
    numbers: dict[tuple[int, ...], int] = {}
    members = [numbers.setdefault(key, len(numbers)) for key in keys]
    return np.array(members, dtype=np.int64), list(numbers)
