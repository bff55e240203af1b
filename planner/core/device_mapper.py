"""Give each position of the new pipelines a rank, so that the most bytes of weights and KV stay where they are.

Two levels. First, groups of ranks inside one instance against whole stages (a tensor group's traffic stays inside the
instance): the best placing within each pair is the pair's weight. Then what is left, rank by rank. Both levels are
maximum-weight matchings (`scipy.optimize.linear_sum_assignment`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from planner.core.fleet import Rank
from planner.protocol import EMBEDDING_LAYER, ModelShape, Pipeline, UnitRange

NOTICE_PENALTY: Final = 1e15
"""More than any context: a rank under notice gets a position only when no other is left."""

RankByPosition = NDArray[np.float64]
"""Bytes: a row a rank, a column a position."""


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """One shard of one stage of one new pipeline (`slot`: which of them)."""

    slot: int
    stage: int
    shard: int
    first_layer: int
    last_layer: int
    first_group: int
    last_group: int


def positions_of(stages: list[tuple[int, int]], tensor: int, num_groups: int, num_slots: int) -> list[Position]:
    """All positions of `num_slots` equal pipelines, slot by slot, stage by stage, shard by shard."""
    width = num_groups // tensor
    return [
        Position(
            slot=slot,
            stage=stage,
            shard=shard,
            first_layer=first,
            last_layer=last,
            first_group=shard * width,
            last_group=(shard + 1) * width - 1,
        )
        for slot in range(num_slots)
        for stage, (first, last) in enumerate(stages)
        for shard in range(tensor)
    ]


def share_inheritance(retiring: Sequence[Pipeline], kv_tokens: dict[str, int], num_slots: int) -> list[list[str]]:
    """Which retiring pipelines each new one takes over: most tokens first, evenly over the new ones."""
    inherits: list[list[str]] = [[] for _ in range(num_slots)]
    tokens = [0] * num_slots
    for pipeline in sorted(retiring, key=lambda p: (-kv_tokens.get(p.id, 0), p.id)):
        if num_slots:
            slot = min(range(num_slots), key=lambda s: (tokens[s], len(inherits[s]), s))
            inherits[slot].append(pipeline.id)
            tokens[slot] += kv_tokens.get(pipeline.id, 0)
    return inherits


def reusable_bytes(
    model: ModelShape,
    ranks: Sequence[Rank],
    positions: Sequence[Position],
    retiring: Sequence[Pipeline] = (),
    inherits: Sequence[Sequence[str]] = (),
) -> RankByPosition:
    """Bytes of weights, and of KV that the position's pipeline inherits, that each rank holds for each position."""
    needed = np.stack([_needed(model, position) for position in positions])
    held = np.stack([held_units(model, rank.inventory.units) for rank in ranks])
    weights: RankByPosition = (held * _unit_bytes(model)) @ needed.T
    for pipeline in retiring:
        kv = np.stack([_kv_units(model, rank, pipeline) for rank in ranks])
        inheriting = np.array([bool(inherits) and pipeline.id in inherits[p.slot] for p in positions])
        weights += (kv @ needed.T) * inheriting
    return weights


def assign(ranks: Sequence[Rank], positions: Sequence[Position], weights: RankByPosition) -> list[Rank]:
    """The rank of each position, in the order of `positions`.

    Raises ValueError if there are fewer ranks than positions.
    """
    if len(ranks) < len(positions):
        raise ValueError(f"ranks: {len(ranks)} for {len(positions)} positions")
    under_notice = np.array([rank.deadline_s is not None for rank in ranks])
    weights = weights - NOTICE_PENALTY * under_notice[:, None]
    rank_of: dict[int, int] = {}
    if any(position.shard > 0 for position in positions):
        rank_of = _assign_groups(ranks, positions, weights)
    free_ranks = [index for index in range(len(ranks)) if index not in rank_of.values()]
    free_positions = [index for index in range(len(positions)) if index not in rank_of]
    rows, columns = linear_sum_assignment(weights[np.ix_(free_ranks, free_positions)], maximize=True)
    for row, column in zip(rows, columns, strict=True):
        rank_of[free_positions[column]] = free_ranks[row]
    return [ranks[rank_of[index]] for index in range(len(positions))]


def _assign_groups(ranks: Sequence[Rank], positions: Sequence[Position], weights: RankByPosition) -> dict[int, int]:
    """Position -> rank for the stages that whole groups of co-located ranks can take."""
    stages: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, position in enumerate(positions):
        stages[position.slot, position.stage].append(index)
    tensor = max(position.shard for position in positions) + 1
    by_instance: dict[str, list[int]] = defaultdict(list)
    for index, rank in enumerate(ranks):
        by_instance[rank.instance].append(index)
    groups = [
        members[start : start + tensor]
        for members in by_instance.values()
        for start in range(0, len(members) - tensor + 1, tensor)
    ]
    if not groups:
        return {}
    best = {}
    pair_weights = np.zeros((len(groups), len(stages)))
    for row, group in enumerate(groups):
        for column, members in enumerate(stages.values()):
            inner = weights[np.ix_(group, members)]
            rows, columns = linear_sum_assignment(inner, maximize=True)
            pair_weights[row, column] = inner[rows, columns].sum()
            best[row, column] = {members[c]: group[r] for r, c in zip(rows, columns, strict=True)}
    rank_of: dict[int, int] = {}
    pairs = zip(*linear_sum_assignment(pair_weights, maximize=True), strict=True)
    for pair_row, pair_column in pairs:
        rank_of |= best[int(pair_row), int(pair_column)]
    return rank_of


# --- Units as vectors: U = (num_layers + 2) * num_head_groups, embedding first, head last ---


def held_units(model: ModelShape, ranges: Sequence[UnitRange]) -> NDArray[np.bool_]:
    """Vector over all units of the model; parts of a range outside the model are ignored."""
    grid = np.zeros((model.num_layers + 2, model.num_head_groups), dtype=np.bool_)
    for r in ranges:
        first = max(r.first_layer, EMBEDDING_LAYER) + 1
        grid[first : r.last_layer + 2, max(r.first_group, 0) : r.last_group + 1] = True
    return grid.ravel()


def _needed(model: ModelShape, position: Position) -> NDArray[np.float64]:
    grid = np.zeros((model.num_layers + 2, model.num_head_groups))
    layers = [layer + 1 for layer in model.layers_of_stage(position.first_layer, position.last_layer)]
    grid[layers, position.first_group : position.last_group + 1] = 1.0
    return grid.ravel()


def _unit_bytes(model: ModelShape) -> NDArray[np.float64]:
    by_layer = [float(model.unit_bytes(layer)) for layer in range(EMBEDDING_LAYER, model.num_layers + 1)]
    return np.repeat(by_layer, model.num_head_groups)


def _kv_units(model: ModelShape, rank: Rank, pipeline: Pipeline) -> NDArray[np.float64]:
    """Bytes of KV in each unit that `rank` holds as a member of `pipeline`."""
    grid = np.zeros((model.num_layers + 2, model.num_head_groups))
    for stage in pipeline.stages:
        for shard in stage.shards:
            if shard.rank == rank.id:
                rows = slice(stage.first_layer + 1, stage.last_layer + 2)
                grid[rows, shard.first_group : shard.last_group + 1] = (
                    model.kv_unit_bytes_per_token * rank.inventory.kv_tokens
                )
    return grid.ravel()
