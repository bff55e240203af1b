"""Which units each rank of a new pipeline gets, from whom, in what order, and how long that takes.

SpotServe's Algorithm 2. KV goes first: it protects progress against an early end. Then the layers: those that only
ranks under notice have, then front to back, so that front stages are complete first, as far as the memory bound allows
(`memory_order`). A copy in any pipeline is as good as another: load is spread over all holders, those of the receiver's
own instance before others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from planner.core.fleet import Rank
from planner.core.holders import Holders
from planner.core.link_loads import FROM_DISK, LinkLoads, Load
from planner.core.links import Links
from planner.core.memory_order import memory_order
from planner.core.missing import Missing, Piece
from planner.protocol import EMBEDDING_LAYER, ModelShape, Pipeline, Shard, Stage, Transfer, UnitRange

KV_GROWTH: Final = 1.5
"""Sequences grow between the decision and the stop."""
MAX_PARTS: Final = 4
"""Into which what several ranks hold is cut, so that each sends a share."""


class Migration(msgspec.Struct, frozen=True, kw_only=True):
    """All that moves for a plan. Seconds count from its start; nothing that must move: 0."""

    transfers: dict[str, list[Transfer]]
    """By receiving rank, in the order of execution; a rank that has all that it needs is left out."""
    layer_order: list[int]
    seconds: float
    """Until everything is in: no link that is used can be done sooner."""
    kv_seconds: dict[str, float]
    """By retiring pipeline: what must stay free before its deadline for its KV to leave."""
    stage_ready_s: dict[str, list[float]]
    """By new pipeline: when each stage has its KV and its layers, and can start."""
    reused_bytes: int
    moved_bytes: int
    """Weights only, those from disk included."""
    disk_bytes: int
    kv_bytes: int
    """Of sequences that change ranks, as long as they are now."""
    peak_bytes: int
    """The most weights that a rank holds on the way above what it holds at the start or at the end."""
    exceeds_bytes: int = 0
    """By how much that is more than `u_max_bytes`."""


def plan_migration(
    model: ModelShape,
    pipelines: Iterable[Pipeline],
    ranks: Mapping[str, Rank],
    links: Links,
    *,
    u_max_bytes: int | None = None,
    retiring: Iterable[Pipeline] = (),
) -> Migration:
    """Plan what the ranks of `pipelines` need. `ranks` are all living ranks; what none of them has comes from disk.

    `retiring`: pipelines that end and whose KV is worth moving; each one's heir names it in `Pipeline.inherits`.

    `u_max_bytes` bounds the weights that a rank holds at any moment: the more of what it held before and of what it
    holds after, and that much beyond. It assumes that a layer is let go by those that do not need it any more as soon
    as it has arrived everywhere, as in the paper. An engine that serves the old pipelines while the new weights arrive
    holds old and new together whatever the order is. None: no bound.
    """
    run = _Run(model, list(pipelines), ranks)
    order, peak_bytes = run.layer_order(float("inf") if u_max_bytes is None else float(u_max_bytes))
    transfers, weights = run.transfers(order)
    kv = run.kv_loads(list(retiring))
    loads = LinkLoads(links, run.instance_of, [*kv, *weights], len(order) + 1)
    disk_bytes = sum(int(sum(load.step_bytes)) for load in weights if load.source == FROM_DISK)
    return Migration(
        transfers=transfers,
        layer_order=[row + EMBEDDING_LAYER for row in order],
        seconds=links.fixed_s + loads.seconds if kv or weights else 0.0,
        kv_seconds={p.id: kv_migration_s(model, p, ranks, links) for p in retiring},
        stage_ready_s=run.stage_ready_s([*kv, *weights], loads, links),
        reused_bytes=int(run.missing.needed_bytes - run.missing.num_bytes),
        moved_bytes=int(run.missing.num_bytes),
        disk_bytes=disk_bytes,
        kv_bytes=int(sum(sum(load.step_bytes) for load in kv) / KV_GROWTH),
        peak_bytes=int(peak_bytes),
        exceeds_bytes=max(0, int(peak_bytes) - u_max_bytes) if u_max_bytes is not None else 0,
    )


def needed_units(model: ModelShape, stage: Stage, shard: Shard) -> set[tuple[int, int]]:
    """(layer, head group) pairs that a position needs, embedding and head included."""
    return {
        (layer, group)
        for layer in model.layers_of_stage(stage.first_layer, stage.last_layer)
        for group in range(shard.first_group, shard.last_group + 1)
    }


def transfer_bytes(model: ModelShape, transfers: Iterable[Transfer]) -> int:
    """Bytes of all units of `transfers`."""
    return sum(_range_bytes(model, transfer.units) for transfer in transfers)


def kv_migration_s(model: ModelShape, pipeline: Pipeline, ranks: Mapping[str, Rank], links: Links) -> float:
    """Seconds to move the KV of all live sequences of `pipeline` elsewhere, as they will have grown when it stops."""
    by_instance: dict[str, float] = {}
    for stage in pipeline.stages:
        for shard in stage.shards:
            rank = ranks.get(shard.rank)
            if rank is not None:
                units = (stage.last_layer - stage.first_layer + 1) * (shard.last_group - shard.first_group + 1)
                num_bytes = units * model.kv_unit_bytes_per_token * rank.inventory.kv_tokens * KV_GROWTH
                by_instance[rank.instance] = by_instance.get(rank.instance, 0.0) + num_bytes
    return links.fixed_s + max(by_instance.values(), default=0.0) / links.inter_bytes_per_s


class _Run:
    """Ranks, instances and layers by number: layer rows count from the embedding."""

    def __init__(self, model: ModelShape, pipelines: list[Pipeline], ranks: Mapping[str, Rank]) -> None:
        self._model = model
        self._pipelines = pipelines
        self._ranks = list(ranks.values())
        self._number = {rank.id: number for number, rank in enumerate(self._ranks)}
        instances = {name: number for number, name in enumerate(dict.fromkeys(r.instance for r in self._ranks))}
        self.instance_of = [instances[rank.instance] for rank in self._ranks]
        self._layer_bytes = [model.unit_bytes(layer) for layer in range(EMBEDDING_LAYER, model.num_layers + 1)]
        self._stage_of: dict[int, tuple[str, int]] = {}
        positions = {}
        for pipeline in pipelines:
            for index, stage in enumerate(pipeline.stages):
                for shard in stage.shards:
                    number = self._number[shard.rank]
                    self._stage_of[number] = pipeline.id, index
                    positions[number] = (stage.first_layer, stage.last_layer, shard.first_group, shard.last_group)
        self.missing = Missing(model, self._ranks, positions)
        self._holders = Holders(self.missing.signatures, self._ranks, self.instance_of)

    def layer_order(self, u_max_bytes: float) -> tuple[list[int], float]:
        missing = self.missing
        urgent = missing.rows_with(
            [number for number in range(len(missing.signatures)) if self._holders.is_leaving(number)]
        )
        moving = [row for row in range(len(self._layer_bytes)) if missing.grow_bytes[row].any()]
        # Layers that nobody receives are let go at once.
        idle = [row for row in range(len(self._layer_bytes)) if row not in set(moving)]
        preferred = idle + sorted(moving, key=lambda row: (row not in urgent, row))
        order, peak_bytes = memory_order(
            missing.grow_bytes, missing.release_bytes, missing.room_bytes, u_max_bytes, preferred
        )
        return [row for row in order if row in set(moving)], peak_bytes

    def transfers(self, order: Sequence[int]) -> tuple[dict[str, list[Transfer]], list[Load]]:
        step_of = {row: step for step, row in enumerate(order, start=1)}
        transfers: dict[str, list[Transfer]] = {}
        loads = []
        for receiver in self._stage_of:
            planned: list[tuple[int, Transfer]] = []
            for piece in self.missing.pieces_of(receiver, order):
                for part in _cut(piece, min(MAX_PARTS, self._holders.num_of(piece.signature))):
                    groups = part.last_group - part.first_group + 1
                    sizes = [groups * self._layer_bytes[row] for row in range(part.first_row, part.last_row + 1)]
                    sources = self._holders.choose(part.signature, receiver, sum(sizes))
                    steps = [step_of[row] for row in range(part.first_row, part.last_row + 1)]
                    transfer = Transfer(units=part.units(), sources=[self._ranks[n].id for n in sources])
                    planned.append((steps[0], transfer))
                    loads.append(Load(receiver, sources[0] if sources else FROM_DISK, steps, sizes))
            if planned:
                by_step = sorted(planned, key=lambda item: item[0])
                transfers[self._ranks[receiver].id] = [transfer for _, transfer in by_step]
        return transfers, loads

    def kv_loads(self, retiring: Sequence[Pipeline]) -> list[Load]:
        """KV that changes ranks between each retiring pipeline and its heir, in step 0."""
        heirs = {name: pipeline for pipeline in self._pipelines for name in pipeline.inherits}
        loads = []
        for old in retiring:
            heir = heirs.get(old.id)
            senders, boxes = self._boxes(old)
            if heir is None or not senders:
                continue
            receivers, new_boxes = self._boxes(heir)
            overlap = np.minimum(boxes[:, None, 1::2], new_boxes[None, :, 1::2])
            overlap = overlap - np.maximum(boxes[:, None, ::2], new_boxes[None, :, ::2]) + 1
            units = np.maximum(overlap, 0).prod(axis=2)
            for row, column in np.argwhere(units > 0).tolist():
                tokens = self._ranks[senders[row]].inventory.kv_tokens
                num_bytes = float(units[row, column]) * tokens * self._model.kv_unit_bytes_per_token * KV_GROWTH
                if senders[row] != receivers[column] and num_bytes:
                    loads.append(Load(receivers[column], senders[row], (0,), (num_bytes,)))
        return loads

    def stage_ready_s(self, loads: Sequence[Load], links: LinkLoads, rates: Links) -> dict[str, list[float]]:
        ready_s = {pipeline.id: [0.0] * len(pipeline.stages) for pipeline in self._pipelines}
        for load, arrival_s in zip(loads, links.arrival_s().tolist(), strict=True):
            name, stage = self._stage_of[load.receiver]
            ready_s[name][stage] = max(ready_s[name][stage], rates.fixed_s + arrival_s)
        return ready_s

    def _boxes(self, pipeline: Pipeline) -> tuple[list[int], NDArray[np.int64]]:
        """The living ranks of `pipeline`, and their layers and head groups."""
        boxes = {
            self._number[shard.rank]: (stage.first_layer, stage.last_layer, shard.first_group, shard.last_group)
            for stage in pipeline.stages
            for shard in stage.shards
            if shard.rank in self._number
        }
        return list(boxes), np.array(list(boxes.values()), dtype=np.int64).reshape(len(boxes), 4)


def _cut(piece: Piece, num_parts: int) -> list[Piece]:
    """Up to `num_parts` runs of layers, as even as possible."""
    num_rows = piece.last_row - piece.first_row + 1
    num_parts = max(1, min(num_parts, num_rows))
    bounds = [piece.first_row + num_rows * index // num_parts for index in range(num_parts + 1)]
    if num_parts == 1:
        return [piece]
    return [piece._replace(first_row=bounds[index], last_row=bounds[index + 1] - 1) for index in range(num_parts)]


def _range_bytes(model: ModelShape, units: UnitRange) -> int:
    num_groups = units.last_group - units.first_group + 1
    return num_groups * sum(model.unit_bytes(layer) for layer in range(units.first_layer, units.last_layer + 1))
