"""The leader's part of a pipeline: it starts the engine, feeds it, keeps the token log, and sees when it is dead."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from typing import Any, Final

from engine.backends.base import PipelineEvents, Snapshot
from engine.backends.tensorrt_llm import gpus
from engine.backends.tensorrt_llm.engine_process import EngineProcess
from engine.backends.tensorrt_llm.members import MemberGate
from engine.backends.tensorrt_llm.pipeline import EngineParts, Part
from engine.backends.tensorrt_llm.processes import is_alive, pipeline_of
from engine.backends.tensorrt_llm.requests import RequestTable, TableLimits
from engine.backends.tensorrt_llm.wire import Batch, Build, Failed, Over, Ready, Tokens
from engine.backends.torch.grammar import Grammars
from engine.core.arranger import steps_before_stop
from engine.core.sequence import SequenceKey
from engine.core.step_meter import StepMeter
from engine.errors import EngineUnavailable, GrammarError
from engine.protocol import GenerateRequest, RejectReason, SubmitReply, TokenEntry
from engine.settings import EngineSettings

logger = logging.getLogger(__name__)

_TICK_S: Final = 0.05
_CENSUS_S: Final = 0.5
_STEP_S: Final = 0.05
"""Assumed, where the last steps before a deadline are counted; the margin is many of them."""


class LeaderPart(Part):
    """Starts the engine once all members are there, feeds it, and keeps the token log."""

    def __init__(
        self,
        parts: EngineParts,
        events: PipelineEvents,
        settings: EngineSettings,
        gate: MemberGate,
        grammars: Grammars,
    ) -> None:
        super().__init__(parts, events, settings)
        spec = parts.spec
        limits = TableLimits(
            spec.max_batch, spec.max_model_len, spec.num_kv_blocks * spec.block_tokens, spec.vocab_size
        )
        self.table = RequestTable(self.id, limits, self._breach)
        self._gate = gate
        self._grammars = grammars
        self._compiling = asyncio.Lock()
        self._meter = StepMeter(1)
        self._step: tuple[frozenset[int], float] | None = None
        """The requests of the last batch of tokens, and when it came."""
        self._arrange: tuple[float | None, float] | None = None
        self._is_ready = False
        self._has_died = False
        """The engine, by itself."""
        self.stop_s = 0.0
        """What it took to end the engine and have its GPUs free."""

    # --- called by the rank -----------------------------------------------------------------------------------

    async def submit(self, request: GenerateRequest) -> SubmitReply:
        """Hand a request to the engine, or let it wait for a slot; its grammar is tried first."""
        grammar = request.sampling.grammar
        if grammar is not None and not self._grammars.knows(grammar):
            try:
                async with self._compiling:
                    await asyncio.to_thread(self._grammars.compile, grammar)
            except GrammarError as error:
                return SubmitReply(accepted=False, reason=RejectReason.INVALID, detail=f"sampling.grammar: {error}")
        if not self._is_ready or self._ended.done():
            return SubmitReply(accepted=False, reason=RejectReason.NOT_LEADER, detail=f"{self.id} has stopped")
        reply = self.table.submit(request, time.time())
        self._carry_out()
        return reply

    def _breach(self, grammar: str, ids: list[int]) -> str | None:
        try:
            matcher = self._grammars.compile(grammar).deep_copy()
        except GrammarError as error:
            return str(error)
        is_whole = matcher.consume_tokens(ids) and matcher.is_accepting()
        return None if is_whole else "the output could not be held to it any further"

    def cancel(self, request_id: str, attempt: int | None = None) -> None:
        self.table.cancel(request_id, time.time(), attempt)
        self._carry_out()

    async def resend(self, request_id: str, choice: int, from_index: int) -> TokenEntry | None:
        return self.table.resend(request_id, choice, from_index)

    def pull_done(self, key: SequenceKey, *, ok: bool, pull_s: float) -> None:
        """No pull is ever ordered: the engine computes a sequence's KV again."""

    def arrange(self, deadline_s: float | None, migration_s: float) -> None:
        self._arrange = (deadline_s, migration_s)

    def carry_on(self) -> None:
        self._arrange = None

    def is_draining(self) -> bool:
        return self._arrange is not None or self._ended.done()

    def snapshot(self) -> Snapshot:
        table, spec = self.table, self.parts.spec
        used = sum(-(-tokens // spec.block_tokens) for tokens in table.context_tokens())
        return Snapshot(
            running=table.num_running,
            waiting=table.num_waiting,
            free_slots=0 if self.is_draining() else table.free_slots,
            total_kv_blocks=spec.num_kv_blocks,
            free_kv_blocks=max(0, spec.num_kv_blocks - used),
            measured_step=self._meter.measured,
        )

    # --- its life ---------------------------------------------------------------------------------------------

    async def _run(self) -> str:
        process = self.parts.process
        assert process is not None, "a leader has an engine process"
        cause = "it failed"
        try:
            cause = await self._until_end(process)
        except EngineUnavailable as error:
            cause = str(error)
            raise
        finally:
            self._hand_back(cause)
            try:
                await self._stop_engine(process, cause)
            finally:
                self._gate.tell(self.id, Over(cause=cause))
        return cause

    async def _until_end(self, process: EngineProcess) -> str:
        starting = asyncio.create_task(self._start_engine(process))
        try:
            await _first_of(starting, self._ended)
        finally:
            if not starting.done():
                starting.cancel()
        if self._ended.done():
            return self._ended.result()
        workers = starting.result()
        self._is_ready = True
        self._gate.tell(self.id, Ready())
        self._events.on_ready(self.id, process.phases_s)
        jobs = [asyncio.create_task(self._hear(process)), asyncio.create_task(self._watch(workers))]
        try:
            await _first_of(*jobs, self._ended)
            for job in jobs:
                if job.done():
                    job.result()
            return await self._ended
        finally:
            for job in jobs:
                job.cancel()

    async def _start_engine(self, process: EngineProcess) -> list[int]:
        """Wait for the members and for free devices, and build; the processes that hold the GPUs then."""
        others = set(self.parts.position.pipeline.ranks()) - {self.parts.rank}
        await self._gate.wait_for(self.id, others, self._end)
        devices = self._own_devices()
        started_s = time.perf_counter()
        await self._wait_before(devices)
        process.phases_s["gpu_wait_s"] = time.perf_counter() - started_s
        await process.build(Build(spec=self.parts.spec), self._settings.engine_start_timeout_s)
        logger.info("pipeline=%s event=engine_built phases=%s", self.id, rounded(process.phases_s))
        states = await asyncio.to_thread(gpus.states, devices)
        return sorted({pid for state in states or [] for pid in state.pids if pipeline_of(pid) == self.id})

    def _own_devices(self) -> list[str]:
        """GPUs of this instance that the pipeline uses."""
        shards = [shard for stage in self.parts.position.pipeline.stages for shard in stage.shards]
        own = next(shard.instance for shard in shards if shard.rank == self.parts.rank)
        indexes = [int(shard.rank.rpartition("-")[2]) for shard in shards if shard.instance == own]
        return gpus.names(indexes, os.environ)

    async def _hear(self, process: EngineProcess) -> None:
        while True:
            message = await process.hear()
            now_s = time.time()
            if isinstance(message, Batch):
                self._note_step(message.tokens)
                for news in message.tokens:
                    self.table.heard(news, now_s)
                self._carry_out()
            elif isinstance(message, Failed):
                self._died(message.cause)
                return

    def _died(self, cause: str) -> None:
        self._has_died = self._has_died or not self._ended.done()
        self._end(cause)

    def _carry_out(self) -> None:
        effects = self.table.take()
        if self.parts.process is not None:
            for message in effects.messages:
                self.parts.process.send(message)
        if effects.entries:
            self._events.on_entries(self.id, effects.entries)
        if self.table.dead is not None:
            self._died(self.table.dead)

    async def _watch(self, workers: list[int]) -> None:
        """Deadlines, arrangement, and whether the engine still does anything."""
        census_s = 0.0
        while not self._ended.done():
            now_s = time.time()
            self.table.tick(now_s)
            self._carry_out()
            if self._should_stop(now_s):
                self._end("")
            silent_s = now_s - self.table.last_progress_s
            if self.table.num_running and silent_s > self._settings.progress_timeout_s:
                self._died(f"the engine has given no token for {silent_s:.1f} s")
            if now_s - census_s > _CENSUS_S:
                census_s = now_s
                dead = [pid for pid in workers if not is_alive(pid)]
                if dead:
                    self._died(f"the engine's process {dead[0]} has died")
            await asyncio.sleep(_TICK_S)

    def _should_stop(self, now_s: float) -> bool:
        if self._arrange is None:
            return False
        deadline_s, migration_s = self._arrange
        margin_s = self._settings.arrange_margin_s
        return self.table.is_idle or steps_before_stop(now_s, deadline_s, migration_s, _STEP_S, margin_s) <= 0

    def _hand_back(self, cause: str) -> None:
        """Every live sequence, at its last committed token; what the engine says from now on does not count."""
        self._end(cause)
        self.table.interrupt_all(cause or "pipeline retired", time.time(), broken=self._has_died)
        entries = self.table.take().entries
        if entries:
            self._events.on_entries(self.id, entries)

    async def _stop_engine(self, process: EngineProcess, cause: str) -> None:
        """In good order only if it was told to stop: an engine that is dead would hang."""
        started_s = time.perf_counter()
        is_clean = await process.stop(self._settings.shutdown_timeout_s) if not cause else False
        if cause:
            await process.kill()
        busy = await self._wait_after(self._own_devices())
        self.stop_s = time.perf_counter() - started_s
        logger.info(
            "pipeline=%s event=engine_stopped clean=%s took_s=%.3f still_busy=%s",
            self.id,
            is_clean,
            self.stop_s,
            busy,
        )

    def _note_step(self, news: list[Tokens]) -> None:
        """Two batches in a row with one token of the same sequences each are a decode step apart."""
        moved = frozenset(one.id for one in news if len(one.ids) == 1)
        now_s = time.perf_counter()
        before, self._step = self._step, (moved, now_s)
        if before is None or before[0] != moved or len(moved) != self.table.num_running:
            return
        context = self.table.context_tokens()
        self._meter.launched([1])
        self._meter.finished(len(moved), sum(context) / max(1, len(context)), now_s - before[1])


async def _first_of(*waiting: asyncio.Future[Any]) -> None:
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)


def rounded(phases_s: Mapping[str, float]) -> str:
    """Phases in words."""
    return " ".join(f"{name}={took_s:.2f}" for name, took_s in phases_s.items())
