"""Which weight units each rank of a new pipeline pulls, from whom, in what order; and how long that takes.

Victims come first among the sources (they leave soon), then the load is spread over all holders; a copy in any
pipeline is as good as another. Layers go front to back, so that front stages are complete first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Final

from planner.core.fleet import Rank
from planner.protocol import ModelShape, Pipeline, Shard, Stage, Transfer, UnitRange

FIXED_S: Final = 0.2
"""Messages and connections of a migration, beside its bytes."""
KV_GROWTH: Final = 1.5
"""Sequences grow between the decision and the stop."""

Unit = tuple[int, int]


def plan_transfers(
    model: ModelShape, pipelines: Iterable[Pipeline], ranks: Mapping[str, Rank]
) -> dict[str, list[Transfer]]:
    """Transfers by receiving rank of `pipelines`; a rank that has all that it needs is left out.

    `ranks` are all living ranks; a unit that none of them holds gets a transfer with no sources (from disk).
    """
    holders = _holders(ranks.values())
    load_bytes: dict[str, int] = defaultdict(int)
    transfers = {}
    for pipeline in pipelines:
        for stage in pipeline.stages:
            for shard in stage.shards:
                missing = needed_units(model, stage, shard) - _units_of(ranks[shard.rank])
                planned = list(_transfers_of(model, shard.rank, missing, holders, ranks, load_bytes))
                if planned:
                    transfers[shard.rank] = planned
    return transfers


def needed_units(model: ModelShape, stage: Stage, shard: Shard) -> set[Unit]:
    """(layer, head group) pairs that a position needs, embedding and head included."""
    return {
        (layer, group)
        for layer in model.layers_of_stage(stage.first_layer, stage.last_layer)
        for group in range(shard.first_group, shard.last_group + 1)
    }


def transfer_bytes(model: ModelShape, transfers: Iterable[Transfer]) -> int:
    """Bytes of all units of `transfers`."""
    return sum(_range_bytes(model, transfer.units) for transfer in transfers)


def weight_migration_s(model: ModelShape, transfers: Mapping[str, list[Transfer]], bytes_per_s: float) -> float:
    """Seconds until the busiest sender or receiver is done, if every first source delivers."""
    load_bytes: dict[str, int] = defaultdict(int)
    for receiver, planned in transfers.items():
        for transfer in planned:
            size = _range_bytes(model, transfer.units)
            load_bytes[f"to {receiver}"] += size
            load_bytes[f"from {transfer.sources[0]}" if transfer.sources else f"disk of {receiver}"] += size
    return FIXED_S + max(load_bytes.values()) / bytes_per_s if load_bytes else 0.0


def kv_migration_s(model: ModelShape, pipeline: Pipeline, ranks: Mapping[str, Rank], bytes_per_s: float) -> float:
    """Seconds to move the KV of all live sequences of `pipeline`, as they will have grown when it stops."""
    most_bytes = 0.0
    for stage in pipeline.stages:
        for shard in stage.shards:
            units = (stage.last_layer - stage.first_layer + 1) * (shard.last_group - shard.first_group + 1)
            rank = ranks.get(shard.rank)
            tokens = rank.inventory.kv_tokens if rank is not None else 0
            most_bytes = max(most_bytes, units * model.kv_unit_bytes_per_token * tokens * KV_GROWTH)
    return FIXED_S + most_bytes / bytes_per_s


def _transfers_of(
    model: ModelShape,
    receiver: str,
    missing: set[Unit],
    holders: Mapping[Unit, frozenset[str]],
    ranks: Mapping[str, Rank],
    load_bytes: dict[str, int],
) -> Iterator[Transfer]:
    for units, sources in _rectangles(missing, holders):
        candidates = sources - {receiver}
        victims = [name for name in candidates if ranks[name].deadline_s is not None]
        # Each of the best class of holders serves a share of the layers.
        for part in _cut(units, len(victims) or len(candidates)):
            ordered = sorted(candidates, key=lambda name: (name not in victims, load_bytes[name], name))
            if ordered:
                load_bytes[ordered[0]] += _range_bytes(model, part)
            yield Transfer(units=part, sources=ordered)


def _rectangles(
    missing: set[Unit], holders: Mapping[Unit, frozenset[str]]
) -> Iterator[tuple[UnitRange, frozenset[str]]]:
    """Rectangles that cover `missing` once, each with the ranks that hold all of it; front layers first."""
    rows: dict[tuple[int, int, frozenset[str]], list[int]] = defaultdict(list)
    for layer, in_layer in groupby(sorted(missing), key=lambda unit: unit[0]):
        for first_group, last_group, sources in _runs_of_groups([group for _, group in in_layer], layer, holders):
            rows[first_group, last_group, sources].append(layer)
    rectangles = [
        (
            UnitRange(first_layer=first, last_layer=last, first_group=first_group, last_group=last_group),
            sources,
        )
        for (first_group, last_group, sources), layers in rows.items()
        for first, last in _runs(layers)
    ]
    yield from sorted(rectangles, key=lambda item: (item[0].first_layer, item[0].first_group))


def _runs_of_groups(
    groups: list[int], layer: int, holders: Mapping[Unit, frozenset[str]]
) -> Iterator[tuple[int, int, frozenset[str]]]:
    by_sources: dict[frozenset[str], list[int]] = defaultdict(list)
    for group in groups:
        by_sources[holders.get((layer, group), frozenset())].append(group)
    for sources, of_sources in by_sources.items():
        for first, last in _runs(of_sources):
            yield first, last, sources


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """(first, last) of each run of consecutive ascending numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def _cut(units: UnitRange, num_parts: int) -> Iterator[UnitRange]:
    """Cut into up to `num_parts` runs of layers, as even as possible."""
    num_layers = units.last_layer - units.first_layer + 1
    num_parts = max(1, min(num_parts, num_layers))
    for index in range(num_parts):
        yield UnitRange(
            first_layer=units.first_layer + num_layers * index // num_parts,
            last_layer=units.first_layer + num_layers * (index + 1) // num_parts - 1,
            first_group=units.first_group,
            last_group=units.last_group,
        )


def _holders(ranks: Iterable[Rank]) -> dict[Unit, frozenset[str]]:
    names: dict[Unit, set[str]] = defaultdict(set)
    for rank in ranks:
        for unit in _units_of(rank):
            names[unit].add(rank.id)
    return {unit: frozenset(held_by) for unit, held_by in names.items()}


def _units_of(rank: Rank) -> set[Unit]:
    return set().union(*(units.units() for units in rank.inventory.units))


def _range_bytes(model: ModelShape, units: UnitRange) -> int:
    num_groups = units.last_group - units.first_group + 1
    return num_groups * sum(model.unit_bytes(layer) for layer in range(units.first_layer, units.last_layer + 1))
