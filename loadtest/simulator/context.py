"""Which weights and KV positions need and ranks hold, as flows between ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from loadtest.simulator.network import Flow, Place
from planner.core.migration_planner import transfer_bytes
from planner.protocol import ModelShape, Pipeline, Transfer, UnitRange

Held = Mapping[Place, Sequence[UnitRange]]
"""Weights by rank, of all ranks that live."""


def instances_of(pipeline: Pipeline) -> set[str]:
    """Those of all its ranks."""
    return {shard.instance for stage in pipeline.stages for shard in stage.shards}


def position_units(model: ModelShape, pipeline: Pipeline, rank: str) -> list[UnitRange]:
    """What the position of `rank` in `pipeline` needs, as rectangles."""
    for stage in pipeline.stages:
        for shard in stage.shards:
            if shard.rank == rank:
                runs = _runs(model.layers_of_stage(stage.first_layer, stage.last_layer))
                return [
                    UnitRange(
                        first_layer=first,
                        last_layer=last,
                        first_group=shard.first_group,
                        last_group=shard.last_group,
                    )
                    for first, last in runs
                ]
    return []


def pull_everything(model: ModelShape, pipeline: Pipeline, receiver: str, held: Held) -> list[Transfer]:
    """All that the position of `receiver` needs, from other ranks that hold it, in turns; else from disk."""
    transfers = []
    for units in position_units(model, pipeline, receiver):
        for layer in range(units.first_layer, units.last_layer + 1):
            for group in range(units.first_group, units.last_group + 1):
                holders = [p.rank for p, has in held.items() if p.rank != receiver and holds(has, layer, group)]
                turn = (layer + group) % len(holders) if holders else 0
                unit = UnitRange(first_layer=layer, last_layer=layer, first_group=group, last_group=group)
                transfers.append(Transfer(units=unit, sources=holders[turn : turn + 1]))
    return transfers


def holds(units: Iterable[UnitRange], layer: int, group: int) -> bool:
    """Whether one of the rectangles has that unit."""
    return any(u.first_layer <= layer <= u.last_layer and u.first_group <= group <= u.last_group for u in units)


def weight_flows(model: ModelShape, transfers: Iterable[Transfer], places: Mapping[str, Place]) -> list[Flow]:
    """The first source that lives (`places`, by rank) delivers, else the disk."""
    flows = []
    for transfer in transfers:
        alive = [places[name] for name in transfer.sources if name in places]
        flows.append(Flow(alive[0] if alive else None, transfer_bytes(model, [transfer])))
    return flows


def kv_flows(
    model: ModelShape, source: Pipeline, target: Pipeline, num_tokens: int, places: Mapping[str, Place]
) -> dict[Place, list[Flow]]:
    """What each rank of `target` lacks of the KV of `num_tokens`; what it holds itself does not move."""
    flows: dict[Place, list[Flow]] = defaultdict(list)
    unit_bytes = model.kv_unit_bytes_per_token * num_tokens
    for new_stage in target.stages:
        for old_stage in source.stages:
            first_layer = max(new_stage.first_layer, old_stage.first_layer)
            num_layers = min(new_stage.last_layer, old_stage.last_layer) - first_layer + 1
            if num_layers <= 0:
                continue
            for new in new_stage.shards:
                for old in old_stage.shards:
                    num_groups = min(new.last_group, old.last_group) - max(new.first_group, old.first_group) + 1
                    if num_groups > 0 and new.rank != old.rank:
                        num_bytes = num_layers * num_groups * unit_bytes
                        flows[places[new.rank]].append(Flow(places[old.rank], num_bytes))
    return flows


def _runs(layers: Iterable[int]) -> list[tuple[int, int]]:
    """(first, last) of each run of consecutive ascending numbers."""
    runs: list[tuple[int, int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return runs
