"""A fleet of backends in one process: the seam of `engine/backends/base.py` without NATS, planner or gateway."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from engine.backends.base import Backend, LedPipeline, PrepareReport, RunningPipeline
from engine.context.transport import ContextServer
from engine.core.roles import Position
from engine.core.scheduler import OutEntry, PullOrder
from engine.protocol import GenerateRequest, KvSource, PullRequest, SamplingParams, TokenEntry
from planner.protocol import Pipeline, RankAddress, Shard, Stage, Transfer, UnitRange

DEADLINE_S = 30.0


@dataclass(frozen=True)
class MakeBackend:
    """One kind of backend: how a test's rank ("a", "b", ...) is made, and what it is called."""

    kind: str
    make: Callable[[str], Backend]
    rank_id: Callable[[str], str] = str
    instance_of: Callable[[str], str] = str
    """By rank id."""
    host_of: Callable[[str], str] = lambda _: "127.0.0.1"
    """By rank id."""
    moves_kv: bool = True
    """An interrupted sequence's KV can be had from the old pipeline."""


class Recorder:
    """Keeps what the pipelines tell, and lets tests wait for it."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._loop = asyncio.get_running_loop()
        self.ready: set[str] = set()
        self.stopped: dict[str, int] = {}
        self.broken: dict[str, str] = {}
        self.start_failed: dict[str, str] = {}
        self.num_ended: dict[str, int] = {}
        """Ranks that have told the end of a pipeline."""
        self.phases_s: dict[str, dict[str, float]] = {}
        self.entries: list[TokenEntry] = []

    def on_ready(self, pipeline: str, phases_s: Mapping[str, float] = MappingProxyType({})) -> None:
        self.ready.add(pipeline)
        self.phases_s[pipeline] = dict(phases_s)

    def on_entries(self, pipeline: str, entries: list[OutEntry]) -> None:
        self.entries += [out.entry for out in entries]

    def on_pull(self, pipeline: str, order: PullOrder) -> None:
        asyncio.run_coroutine_threadsafe(self._fleet.pull(pipeline, order), self._loop)

    def on_stopped(self, pipeline: str, num_parked: int) -> None:
        self._ended(pipeline, num_parked)
        self.stopped[pipeline] = num_parked

    def on_broken(self, pipeline: str, cause: str) -> None:
        self._ended(pipeline, 0)
        self.broken[pipeline] = cause

    def on_start_failed(self, pipeline: str, cause: str) -> None:
        self._ended(pipeline, 0)
        self.start_failed[pipeline] = cause

    def has_ended(self, pipeline: str) -> bool:
        return pipeline in self.stopped or pipeline in self.broken or pipeline in self.start_failed

    def _ended(self, pipeline: str, num_parked: int) -> None:
        self.num_ended[pipeline] = self.num_ended.get(pipeline, 0) + 1
        with contextlib.suppress(RuntimeError):  # The test is over and its loop closed.
            self._loop.call_soon_threadsafe(self._fleet.ended, self, pipeline, num_parked)

    def tokens(self, request_id: str, choice: int = 0) -> list[int]:
        """The log of one choice so far; asserts that it has neither gap nor repeat."""
        log: list[int] = []
        for entry in self.entries:
            if (entry.request_id, entry.choice) == (request_id, choice):
                assert entry.index == len(log), f"{request_id}: entry at {entry.index}, log has {len(log)}"
                log += entry.ids
        return log

    def last(self, request_id: str, choice: int = 0) -> TokenEntry | None:
        return next((e for e in reversed(self.entries) if (e.request_id, e.choice) == (request_id, choice)), None)


class Fleet:
    """`async with Fleet(...)`; ranks are made on demand by name."""

    def __init__(self, make_backend: MakeBackend) -> None:
        self.kind = make_backend
        self.backends: dict[str, Backend] = {}
        self._servers: dict[str, ContextServer] = {}
        self._addresses: dict[str, RankAddress] = {}
        self.recorders: dict[str, Recorder] = {}
        self.leaders: dict[str, LedPipeline] = {}
        self.parts: dict[str, dict[str, RunningPipeline]] = {}
        """By pipeline and rank id."""
        self._positions: dict[str, Pipeline] = {}
        self._epoch = 0

    async def __aenter__(self) -> Fleet:
        return self

    async def __aexit__(self, *_: object) -> None:
        for pipeline, parts in self.parts.items():
            for rank, part in parts.items():
                if rank in self.backends:
                    part.abort("the test is over")
            with contextlib.suppress(TimeoutError):
                await until(lambda pipeline=pipeline: self._is_over(pipeline), 5.0)  # type: ignore[misc] # bound
        for server in self._servers.values():
            await server.close()
        for backend in self.backends.values():
            await asyncio.to_thread(backend.close)

    async def rank(self, name: str) -> Backend:
        rank = self.kind.rank_id(name)
        if rank not in self.backends:
            backend = await asyncio.to_thread(self.kind.make, rank)
            server = ContextServer(backend)
            address = await server.start(self.kind.host_of(rank))
            self.backends[rank], self._servers[rank] = backend, server
            self._addresses[rank] = RankAddress(
                instance=self.kind.instance_of(rank), context_address=address, store_address=backend.store_address
            )
        return self.backends[rank]

    async def lose(self, name: str) -> None:
        """The rank's context is gone; nobody can pull from it any more."""
        rank = self.kind.rank_id(name)
        await self._servers.pop(rank).close()
        await asyncio.to_thread(self.backends.pop(rank).close)

    def _is_over(self, pipeline: str) -> bool:
        return self.recorders[pipeline].num_ended.get(pipeline, 0) >= sum(
            r in self.backends for r in self.parts[pipeline]
        )

    async def pipeline(self, name: str, shape: list[list[str]], *, num_kv_blocks: int = 64) -> Pipeline:
        """A pipeline over `shape`: the ranks of each stage."""
        backends = [await self.rank(name) for stage in shape for name in stage]
        shape = [[self.kind.rank_id(name) for name in stage] for stage in shape]
        model = backends[0].model
        bounds = [i * model.num_layers // len(shape) for i in range(len(shape) + 1)]
        num_groups = model.num_head_groups
        stages = [
            Stage(
                first_layer=bounds[i],
                last_layer=bounds[i + 1] - 1,
                shards=[
                    Shard(
                        rank=rank,
                        instance=self.kind.instance_of(rank),
                        first_group=j * num_groups // len(ranks),
                        last_group=(j + 1) * num_groups // len(ranks) - 1,
                    )
                    for j, rank in enumerate(ranks)
                ],
            )
            for i, ranks in enumerate(shape)
        ]
        return Pipeline(id=name, stages=stages, max_batch=8, num_kv_blocks=num_kv_blocks)

    async def prepare(self, pipeline: Pipeline) -> list[PrepareReport]:
        """Prepare all positions at once; each unit from whoever holds it, else from disk."""
        self._epoch += 1
        positions = [
            Position(pipeline, i, j, self._epoch, dict(self._addresses))
            for i, stage in enumerate(pipeline.stages)
            for j in range(len(stage.shards))
        ]
        holders: dict[tuple[int, int], list[str]] = {}
        for name, backend in self.backends.items():
            for unit in backend.units():
                holders.setdefault(unit, []).append(name)
        transfers = [
            Transfer(
                units=UnitRange(first_layer=layer, last_layer=layer, first_group=group, last_group=group),
                sources=names,
            )
            for (layer, group), names in holders.items()
        ]
        return await asyncio.gather(
            *(
                self.backends[rank].prepare(position, transfers)
                for rank, position in zip(pipeline.ranks(), positions, strict=True)
            )
        )

    async def start(self, pipeline: Pipeline) -> Recorder:
        """Start a prepared pipeline and wait until it takes requests."""
        recorder = self.begin(pipeline)
        await until(lambda: pipeline.id in recorder.ready or recorder.has_ended(pipeline.id))
        assert pipeline.id in recorder.ready, recorder.start_failed or recorder.broken
        return recorder

    def begin(self, pipeline: Pipeline) -> Recorder:
        """Start a prepared pipeline."""
        recorder = Recorder(self)
        self.recorders[pipeline.id] = recorder
        self._positions[pipeline.id] = pipeline
        for rank in pipeline.ranks():
            part = self.backends[rank].start(pipeline.id, recorder)
            self.parts.setdefault(pipeline.id, {})[rank] = part
            if rank == pipeline.leader:
                assert isinstance(part, LedPipeline)
                self.leaders[pipeline.id] = part
        return recorder

    async def serve(self, name: str, shape: list[list[str]], **options: Any) -> Recorder:
        """Make, prepare and start."""
        pipeline = await self.pipeline(name, shape, **options)
        await self.prepare(pipeline)
        return await self.start(pipeline)

    def ended(self, recorder: Recorder, pipeline: str, num_parked: int) -> None:
        for rank in self._positions[pipeline].ranks():
            if rank in self.backends:
                self.backends[rank].ended(pipeline, num_parked)

    async def pull(self, pipeline: str, order: PullOrder) -> None:
        request = PullRequest(
            pipeline=pipeline,
            request_id=order.key.request_id,
            choice=order.key.choice,
            source=order.source,
            blocks=order.blocks,
        )
        ranks = self._positions[pipeline].ranks()
        replies = await asyncio.gather(*(self.backends[rank].pull_kv(request) for rank in ranks))
        self.leaders[pipeline].pull_done(order.key, ok=all(reply.ok for reply in replies), pull_s=0.01)


def request(
    request_id: str,
    prompt_ids: list[int],
    *,
    max_tokens: int = 24,
    committed_ids: list[int] | None = None,
    kv_source: KvSource | None = None,
    choice: int = 0,
    attempt: int = 0,
    **sampling: Any,
) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        choice=choice,
        attempt=attempt,
        gateway="g",
        prompt_ids=prompt_ids,
        committed_ids=committed_ids or [],
        sampling=SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, "ignore_eos": True, **sampling}),
        kv_source=kv_source,
    )


async def until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    """Wait for the condition.

    Raises:
        TimeoutError: it did not come true before the deadline.
    """
    async with asyncio.timeout(deadline_s):
        while not condition():
            await asyncio.sleep(0.005)
