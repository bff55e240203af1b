"""The TensorRT-LLM backend of a rank: its share of the instance's weight store, and the pipelines it prepares and runs.

A rank stands for one GPU. The leader's rank runs the engine of the whole pipeline; the others fill the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from engine.backends.base import PipelineEvents, PrepareReport, RunningPipeline
from engine.backends.tensorrt_llm import gpus, launch, pipeline, processes, shapes
from engine.backends.tensorrt_llm.engine_process import EngineProcess
from engine.backends.tensorrt_llm.leader import LeaderPart
from engine.backends.tensorrt_llm.members import MemberGate
from engine.backends.tensorrt_llm.pipeline import EngineParts, MemberPart
from engine.backends.tensorrt_llm.weight_store import SharedWeights, checkpoint_checksum, store_dir
from engine.backends.torch.checkpoint import Checkpoint
from engine.backends.torch.grammar import Grammars
from engine.context.pull import UnitPuller
from engine.core.roles import Position, Unit
from engine.errors import EngineUnavailable, ProtocolError, ShapeRefused
from engine.protocol import PullReply, PullRequest
from engine.settings import EngineSettings
from planner.protocol import ModelShape, StepProfile, Transfer

logger = logging.getLogger(__name__)


class TensorrtBackend:
    """See `engine.backends.base.Backend`. One a rank process.

    Raises:
        EngineError: the model directory or the store is not usable; names what is wrong.

    """

    def __init__(self, settings: EngineSettings, rank: str) -> None:
        torch.set_num_threads(settings.num_threads)
        self._settings = settings
        self._rank = rank
        self._device = int(rank.rpartition("-")[2])
        processes.kill_marked(launch.mark_of(settings.nats_url, rank))  # An earlier process of this rank was killed.
        self._checkpoint = Checkpoint(settings.model_dir)
        self._config = self._checkpoint.config
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        self._model = self._config.shape(
            settings.model, self._dtype.itemsize, settings.kv_block_tokens, settings.max_model_len
        )
        self._checksum = checkpoint_checksum(settings.model_dir)
        self._store = SharedWeights(self._config, self._dtype, self._store_of(settings.instance))
        self._store.create(os.getppid())
        self._gate = MemberGate(settings.host)
        self._memory_bytes = settings.rank_memory_bytes
        self._grammars = Grammars(
            Path(settings.model_dir) / "tokenizer.json", self._config.vocab_size, self._config.eos_token_ids
        )
        self._prepared: dict[str, EngineParts] = {}
        self._running: dict[str, LeaderPart | MemberPart] = {}
        self._stop_s = 0.0
        """What it took to end the last engine: the next one has to wait for it."""
        self._loop: asyncio.AbstractEventLoop | None = None

    def _store_of(self, instance: str) -> Path:
        """Where an instance, which may be another node, keeps its weights."""
        settings = self._settings
        return store_dir(settings.store_dir, self._checksum, settings.dtype, f"{settings.nats_url} {instance}")

    @property
    def model(self) -> ModelShape:
        return self._model

    @property
    def memory_bytes(self) -> int:
        if self._memory_bytes is not None:
            return self._memory_bytes
        states = gpus.states(gpus.names([self._device], os.environ))
        if not states:
            raise EngineUnavailable(
                f"the memory of GPU {self._device} is not known: install nvidia-ml-py and check the driver "
                "(nvidia-smi), or set SPOTSERVE_ENGINE_RANK_MEMORY_BYTES"
            )
        self._memory_bytes = states[0].total_bytes * 9 // 10
        return self._memory_bytes

    @property
    def store_address(self) -> str:
        return self._gate.address

    def profile(self) -> StepProfile | None:
        """Not known before an engine runs: the planner guesses, and corrects it by the steps that are measured."""
        return None

    def units(self) -> set[Unit]:
        return self._store.units()

    # --- pipelines --------------------------------------------------------------------------------------------

    async def prepare(self, position: Position, transfers: list[Transfer]) -> PrepareReport:
        self._loop = asyncio.get_running_loop()
        await self._gate.open()
        spec = shapes.engine_spec(position, self._model, self._config, self._settings, self._store_of)
        if self._settings.rank_memory_bytes is None:
            shapes.check_fits(position, self._model, self.memory_bytes)
        process = None
        # The package is imported while the old engine serves and the weights come in.
        starting = asyncio.create_task(self._start_process(position)) if position.leads else None
        try:
            report = await self._obtain_units(position, transfers)
            if starting is not None:
                process = await starting
                report = replace(report, regroup_s=sum(process.phases_s.values()))
                process.phases_s.clear()  # They pass while the old engine serves.
        except BaseException:
            if starting is not None:
                starting.cancel()
                with contextlib.suppress(BaseException):
                    (await starting).kill_now()
            raise
        pipeline_id = position.pipeline.id
        self._prepared[pipeline_id] = EngineParts(position, self._rank, self._device, spec, process)
        return report

    async def _start_process(self, position: Position) -> EngineProcess:
        settings = self._settings
        shards = [shard for stage in position.pipeline.stages for shard in stage.shards]
        hosts = [position.addresses[shard.rank].context_address.rpartition(":")[0] for shard in shards]
        several_nodes = len({shard.instance for shard in shards}) > 1
        if several_nodes and not settings.multi_node:
            raise ShapeRefused(
                f"{position.pipeline.id} spans several instances: set SPOTSERVE_ENGINE_MULTI_NODE to mpi or ray"
            )
        if several_nodes and settings.kv_connector:
            raise EngineUnavailable(
                f"{position.pipeline.id} spans several instances: SPOTSERVE_ENGINE_KV_CONNECTOR must be off"
            )
        mark = launch.mark_of(settings.nats_url, self._rank, position.pipeline.id)
        process = EngineProcess(mark)
        nodes = hosts if several_nodes else hosts[:1]
        command = launch.command(settings.multi_node or "mpi", nodes, process.socket_path)
        devices = [int(shard.rank.rpartition("-")[2]) for shard in shards]
        environment = launch.environment(os.environ, devices, mark, several_nodes=several_nodes)
        try:
            imported = await process.start(command, environment, settings.engine_start_timeout_s)
            if not several_nodes and imported.num_gpus < len(shards):
                raise EngineUnavailable(
                    f"{position.pipeline.id} needs {len(shards)} GPUs, and TensorRT-LLM sees {imported.num_gpus}: "
                    "check nvidia-smi, and SPOTSERVE_ENGINE_NUM_RANKS (one rank for each GPU)"
                )
        except BaseException:
            await process.kill()
            raise
        return process

    async def _obtain_units(self, position: Position, transfers: list[Transfer]) -> PrepareReport:
        started_s = time.perf_counter()
        missing = position.units(self._model) - self._store.units()
        self._store.check_room(sum(self._model.unit_bytes(layer) for layer, _ in missing))
        obtained = await UnitPuller(self._rank, self._store, self._load).obtain(missing, transfers, position)
        return PrepareReport(*obtained, time.perf_counter() - started_s)

    def _load(self, layer: int, group: int) -> int:
        self._store.put(layer, group, self._checkpoint.load_unit(layer, group, self._dtype))
        return self._model.unit_bytes(layer)

    def discard(self, pipeline_id: str) -> None:
        parts = self._prepared.pop(pipeline_id, None)
        if parts is not None:
            pipeline.discard(parts)

    def start(self, pipeline_id: str, events: PipelineEvents) -> RunningPipeline:
        parts = self._prepared.pop(pipeline_id)
        part: LeaderPart | MemberPart
        if parts.process is not None:
            parts.process.phases_s["stop_s"] = self._stop_s
        if parts.position.leads:
            part = LeaderPart(parts, events, self._settings, self._gate, self._grammars)
        else:
            part = MemberPart(parts, events, self._settings)
        self._running[pipeline_id] = part
        part.start()
        return part

    async def free_unneeded(self, pipeline_id: str) -> None:
        """Nothing: what the instance's memory has of the model is what the next engine starts from."""

    def ended(self, pipeline_id: str, num_parked: int) -> None:
        part = self._running.pop(pipeline_id, None)
        if isinstance(part, LeaderPart):
            self._stop_s = part.stop_s

    def export_unit(self, layer: int, group: int) -> bytes:
        return self._store.export_unit(layer, group)

    # --- KV: none of it leaves an engine ----------------------------------------------------------------------

    def export_kv(self, pipeline_id: str, layer: int, group: int, blocks: list[int], num_tokens: int) -> bytes:
        raise ProtocolError(f"no KV of pipeline {pipeline_id}: TensorRT-LLM keeps its own")

    async def pull_kv(self, request: PullRequest) -> PullReply:
        return PullReply(ok=False, detail="TensorRT-LLM takes no KV in")

    def release_kv(self, pipeline_id: str, request_id: str, choice: int) -> None:
        pass

    def release_expired(self, now_s: float) -> list[str]:
        return []

    def parked(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        """Kill every engine of this rank, and give the weights up. Called from a worker thread."""
        parts = [*self._prepared.values(), *(running.parts for running in self._running.values())]
        for one in parts:
            if one.process is not None:
                self._on_loop(one.process.kill_now)
        self._on_loop(self._gate.close)
        processes.kill_marked(launch.mark_of(self._settings.nats_url, self._rank))
        if self._device == 0:
            self._store.remove()

    def _on_loop(self, action: Callable[[], None]) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(action)
