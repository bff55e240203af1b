"""The torch backend of a rank: its weights, its KV pools, and the pipelines it prepares, runs and retires."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from engine.backends.base import PipelineEvents, PrepareReport
from engine.backends.torch.calibrate import load_or_calibrate
from engine.backends.torch.communicator import Communicator, ShardGroup, rendezvous_store
from engine.backends.torch.grammar import Grammars
from engine.backends.torch.kv_pool import KvPool
from engine.backends.torch.pipeline import Leader, Member, PipelineParts, PipelineThread
from engine.backends.torch.stage_model import SoloGroup, StageModel
from engine.backends.torch.weights import Checkpoint, WeightStore
from engine.context.pull import UnitPuller
from engine.context.transport import FetchKv, fetch, in_batches
from engine.core.roles import Position, Unit
from engine.core.scheduler import CostEstimate, Scheduler, SchedulerLimits
from engine.errors import EngineError, ProtocolError
from engine.protocol import KvHolder, PullReply, PullRequest
from engine.settings import EngineSettings
from planner.protocol import ModelShape, StepProfile, Transfer

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S: Final = 5.0


@dataclass(slots=True)
class _Retired:
    """KV of a stopped pipeline, kept for others to pull."""

    pool: KvPool
    num_parked: int
    stopped_at_s: float
    released: set[tuple[str, int]] = field(default_factory=set)


class _Forming:
    """A process group that is being formed.

    In a thread of its own: it may wait for long for members that never come, and the few threads of the event loop's
    pool have transfers to do.
    """

    def __init__(self, position: Position, host: str, device: torch.device) -> None:
        self._abandoned = threading.Event()
        self._result: Future[Communicator | None] = Future()
        if len(position.pipeline.ranks()) == 1:
            self._result.set_result(None)
            return
        self._result.set_running_or_notify_cancel()
        threading.Thread(target=self._form, args=(position, host, device), daemon=True).start()

    def _form(self, position: Position, host: str, device: torch.device) -> None:
        try:
            self._result.set_result(Communicator(position, host, device, self._abandoned))
        except Exception as error:  # noqa: BLE001 - it is raised where the result is awaited
            self._result.set_exception(error)

    async def formed(self) -> Communicator | None:
        """The group; None for a pipeline of one rank. Raises PipelineBroken if it cannot be formed."""
        return await asyncio.wrap_future(self._result)

    def abandon(self) -> None:
        """Nobody wants it any more; its other members hear of it."""
        self._abandoned.set()
        self._result.add_done_callback(_close)


def _close(forming: Future[Communicator | None]) -> None:
    communicator = forming.result() if forming.exception() is None else None
    if communicator is not None:
        communicator.abort()


class TorchBackend:
    """See `engine.backends.base.Backend`. One a rank process.

    Raises:
        EngineError: the model directory is not usable; names what is missing or unsupported.

    """

    def __init__(self, settings: EngineSettings, rank: str) -> None:
        torch.set_num_threads(settings.num_threads)
        self._settings = settings
        self._rank = rank
        self._device = torch.device(settings.device)
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        self._checkpoint = Checkpoint(settings.model_dir)
        self._config = self._checkpoint.config
        self._model = self._config.shape(
            settings.model, self._dtype.itemsize, settings.kv_block_tokens, settings.max_model_len
        )
        self._store = WeightStore(self._config, self._dtype, self._device)
        self._puller = UnitPuller(rank, self._store, self._load_unit)
        self._rendezvous = rendezvous_store(settings.host)
        self._grammars = Grammars(
            Path(settings.model_dir) / "tokenizer.json", self._config.vocab_size, self._config.eos_token_ids
        )
        self._profile: StepProfile | None = None
        self._prepared: dict[str, PipelineParts] = {}
        self._preparing: list[Position] = []
        self._freeing = asyncio.Lock()
        self._running: dict[str, PipelineThread] = {}
        self._retired: dict[str, _Retired] = {}

    @property
    def model(self) -> ModelShape:
        return self._model

    @property
    def memory_bytes(self) -> int:
        return self._settings.rank_memory_bytes or _default_memory_bytes(self._device)

    @property
    def store_address(self) -> str:
        return f"{self._settings.host}:{self._rendezvous.port}"

    def profile(self) -> StepProfile:
        if self._profile is None:
            self._profile = load_or_calibrate(
                Path(self._settings.cache_dir) / "profiles",
                self._config,
                self._dtype,
                self._device,
                self._settings.kv_block_tokens,
            )
        return self._profile

    def units(self) -> set[Unit]:
        return self._store.units()

    # --- pipelines --------------------------------------------------------------------------------------------

    async def prepare(self, position: Position, transfers: list[Transfer]) -> PrepareReport:
        forming = _Forming(position, self._settings.host, self._device)
        self._preparing.append(position)  # From now on nothing that it needs is freed.
        try:
            report = await self._obtain_units(position, transfers)
            started_s = time.perf_counter()
            communicator = await forming.formed()
            regroup_s = time.perf_counter() - started_s
            self._prepared[position.pipeline.id] = await asyncio.to_thread(self._build, position, communicator)
        except BaseException:
            forming.abandon()
            raise
        finally:
            self._preparing.remove(position)
        return PrepareReport(report.pulled_bytes, report.disk_bytes, report.pull_s, regroup_s)

    def _build(self, position: Position, communicator: Communicator | None) -> PipelineParts:
        config, settings, pipeline = self._config, self._settings, position.pipeline
        groups = (position.first_group, position.last_group)
        layers = (position.first_layer, position.last_layer)
        model = StageModel(
            config,
            *layers,
            *groups,
            self._store,
            ShardGroup(communicator) if communicator is not None and pipeline.tensor > 1 else SoloGroup(),
            settings.reduction,
            self._model.max_model_len,
        )
        pool = KvPool(
            config,
            *layers,
            *groups,
            pipeline.num_kv_blocks,
            settings.kv_block_tokens,
            self._dtype,
            self._device,
        )
        return PipelineParts(
            position=position,
            model=model,
            pool=pool,
            communicator=communicator,
            vocab_rows=[
                self._vocab_bound(shard.last_group + 1) - self._vocab_bound(shard.first_group)
                for shard in pipeline.stages[-1].shards
            ],
            hidden_size=config.hidden_size,
            dtype=self._dtype,
            device=self._device,
        )

    def _vocab_bound(self, group: int) -> int:
        return group * self._config.vocab_size // self._config.num_kv_heads

    def discard(self, pipeline: str) -> None:
        parts = self._prepared.pop(pipeline, None)
        if parts is not None and parts.communicator is not None:
            # In a thread, since it takes a moment for each peer.
            threading.Thread(target=parts.communicator.abort, daemon=True).start()

    def start(self, pipeline: str, events: PipelineEvents) -> Leader | Member:
        parts = self._prepared.pop(pipeline)
        thread: Leader | Member
        if parts.position.leads:
            scheduler = Scheduler(self._limits(parts), self._cost(), pipeline)
            margin_s = self._settings.arrange_margin_s
            thread = Leader(parts, events, scheduler, self._grammars, arrange_margin_s=margin_s)
        else:
            thread = Member(parts, events)
        self._running[pipeline] = thread
        thread.start()
        return thread

    def _limits(self, parts: PipelineParts) -> SchedulerLimits:
        pipeline = parts.position.pipeline
        return SchedulerLimits(
            num_blocks=pipeline.num_kv_blocks,
            block_tokens=self._settings.kv_block_tokens,
            max_batch=pipeline.max_batch,
            max_step_tokens=self._settings.max_step_tokens,
            num_micro_batches=len(pipeline.stages),
            max_model_len=self._model.max_model_len,
            vocab_size=self._config.vocab_size,
            prefix_caching=self._settings.prefix_caching,
        )

    def _cost(self) -> CostEstimate:
        profile, model = self.profile(), self._model
        prefill_s_per_token = profile.prefill_layer_ms_per_token * model.num_layers / 1e3
        if self._settings.kv_transfer != "auto":
            prefill_s_per_token = math.inf if self._settings.kv_transfer == "always" else 0.0
        return CostEstimate(
            prefill_s_per_token=prefill_s_per_token,
            transfer_bytes_per_s=profile.transfer_bytes_per_s,
            transfer_latency_s=0.005,
            kv_bytes_per_token=model.kv_unit_bytes_per_token * model.num_layers * model.num_head_groups,
        )

    async def free_unneeded(self, pipeline: str) -> None:
        """Free the weights that neither a started pipeline nor one that is prepared needs."""
        async with self._freeing:
            if pipeline not in self._running:
                return  # It has ended meanwhile: what is here is what the next one starts from.
            parts = [*self._prepared.values(), *(thread.parts for thread in self._running.values())]
            positions = [*self._preparing, *(part.position for part in parts)]
            needed = {unit for position in positions for unit in position.units(self._model)}
            await asyncio.to_thread(self._store.keep_only, needed)

    def ended(self, pipeline: str, num_parked: int) -> None:
        """A running pipeline has stopped (its KV is kept while sequences are parked) or broken (0)."""
        thread = self._running.get(pipeline)
        if thread is None:
            return
        pool, thread.parts.pool = thread.parts.pool, None
        if pool is not None and num_parked:
            # Before it leaves `_running`: worker threads look for its KV in both.
            self._retired[pipeline] = _Retired(pool, num_parked, time.time())
        del self._running[pipeline]

    # --- weights ----------------------------------------------------------------------------------------------

    async def _obtain_units(self, position: Position, transfers: list[Transfer]) -> PrepareReport:
        """Fetch what is missing: from the holders the plan names, best first, else from disk."""
        started_s = time.perf_counter()
        async with self._freeing:  # What is just being freed must not be counted on.
            missing = position.units(self._model) - self._store.units()
        obtained = await self._puller.obtain(missing, transfers, position)
        return PrepareReport(*obtained, time.perf_counter() - started_s)

    def _load_unit(self, layer: int, group: int) -> int:
        self._store.put(layer, group, self._checkpoint.load_unit(layer, group, self._dtype))
        return self._model.unit_bytes(layer)

    def export_unit(self, layer: int, group: int) -> bytes:
        return self._store.export_unit(layer, group)

    # --- KV ---------------------------------------------------------------------------------------------------

    def export_kv(self, pipeline: str, layer: int, group: int, blocks: list[int], num_tokens: int) -> bytes:
        pool = self._pool(pipeline)
        if pool is None:
            raise ProtocolError(f"no KV of pipeline {pipeline} on {self._rank}")
        return pool.export_sequence(layer, group, blocks, num_tokens)

    def _pool(self, pipeline: str) -> KvPool | None:
        if pipeline in self._retired:
            return self._retired[pipeline].pool
        thread = self._running.get(pipeline)
        return thread.parts.pool if thread is not None else None

    async def pull_kv(self, request: PullRequest) -> PullReply:
        thread = self._running.get(request.pipeline)
        pool = thread.parts.pool if thread is not None else None
        if thread is None or pool is None:
            return PullReply(ok=False, detail=f"{request.pipeline} does not run on {self._rank}")
        position = thread.parts.position
        wanted = {
            (layer, group)
            for layer in range(position.first_layer, position.last_layer + 1)
            for group in range(position.first_group, position.last_group + 1)
        }
        own_units: list[Unit] = []
        by_holder: list[tuple[KvHolder, list[Unit]]] = []
        for holder in request.source.holders:
            units = sorted(unit for unit in wanted if _holds(holder, unit))
            wanted.difference_update(units)
            if holder.rank == self._rank:
                own_units += units
            elif units:
                by_holder.append((holder, units))
        if wanted:
            return PullReply(ok=False, detail=f"nobody holds KV of (layer, head group) {min(wanted)}")
        try:
            local_bytes = await _to_the_end(self._copy_kv, own_units, request, pool)
            # A group, and not `gather`: after a failure nobody may go on writing into the blocks.
            async with asyncio.TaskGroup() as group:
                pulls = [group.create_task(self._pull_from(*holding, request, pool)) for holding in by_holder]
        except* EngineError as errors:
            failure = str(errors.exceptions[0])
        else:
            return PullReply(ok=True, pulled_bytes=sum(pull.result() for pull in pulls), local_bytes=local_bytes)
        return PullReply(ok=False, detail=failure)

    async def _pull_from(self, holder: KvHolder, units: list[Unit], request: PullRequest, pool: KvPool) -> int:
        source = request.source
        fetch_request = FetchKv(
            pipeline=source.pipeline, units=units, blocks=source.blocks, num_tokens=source.num_tokens
        )
        num_bytes = 0
        fetched = fetch(holder.rank, holder.context_address, fetch_request)
        async with contextlib.aclosing(in_batches(fetched)) as batches:
            async for batch in batches:
                num_bytes += await _to_the_end(_import_kv, batch, request, pool)
        return num_bytes

    def _copy_kv(self, units: list[Unit], request: PullRequest, pool: KvPool) -> int:
        source = request.source
        num_bytes = 0
        for layer, group in units:
            data = self.export_kv(source.pipeline, layer, group, source.blocks, source.num_tokens)
            pool.import_sequence(layer, group, request.blocks, source.num_tokens, data)
            num_bytes += len(data)
        return num_bytes

    def release_kv(self, pipeline: str, request_id: str, choice: int) -> None:
        retired = self._retired.get(pipeline)
        if retired is not None:
            retired.released.add((request_id, choice))
            if len(retired.released) >= retired.num_parked:
                del self._retired[pipeline]

    def release_expired(self, now_s: float) -> list[str]:
        """Free KV that nobody has asked for in time; the pipelines that were freed."""
        limit_s = now_s - self._settings.parked_kv_s
        expired = [name for name, retired in self._retired.items() if retired.stopped_at_s < limit_s]
        for name in expired:
            del self._retired[name]
        return expired

    def parked(self) -> dict[str, int]:
        """Interrupted sequences whose KV is kept, by stopped pipeline."""
        return {name: r.num_parked - len(r.released) for name, r in self._retired.items()}

    def close(self) -> None:
        """Give up everything; waits for the threads."""
        for thread in list(self._running.values()):
            thread.abort("the rank is stopping")
        for thread in list(self._running.values()):
            if not thread.join(_JOIN_TIMEOUT_S):
                logger.warning("pipeline=%s event=thread_does_not_end", thread.id)
        for pipeline in list(self._prepared):
            self.discard(pipeline)


def _default_memory_bytes(device: torch.device) -> int:
    """A quarter of the machine's memory, since several ranks share it; nine tenths of a GPU's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] * 9 // 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


async def _to_the_end(function: Callable[..., int], *arguments: object) -> int:
    """`function` in a worker thread. If this is cancelled it waits for the thread first: nobody writes afterwards."""
    running = asyncio.create_task(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(running)
    finally:
        if not running.done():
            await asyncio.wait({running})


def _import_kv(batch: list[tuple[Unit, bytes]], request: PullRequest, pool: KvPool) -> int:
    for (layer, group), data in batch:
        pool.import_sequence(layer, group, request.blocks, request.source.num_tokens, data)
    return sum(len(data) for _, data in batch)


def _holds(holder: KvHolder, unit: Unit) -> bool:
    layer, group = unit
    return holder.first_layer <= layer <= holder.last_layer and holder.first_group <= group <= holder.last_group
