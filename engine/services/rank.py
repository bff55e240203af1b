"""A rank: follows the plan, runs its position on a backend, and speaks for the pipelines that it leads.

Everything here runs on one event loop; what a backend tells from its threads is brought onto it first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from types import MappingProxyType
from typing import Any, Final

from engine.backends.base import Backend, LedPipeline, PrepareReport, RunningPipeline, Snapshot
from engine.context.transport import ContextServer, as_ranges
from engine.core.frames import in_frames
from engine.core.roles import Position, change_role, position_of
from engine.core.scheduler import OutEntry, PullOrder
from engine.errors import EngineError, ShapeRefused
from engine.protocol import (
    CancelRequest,
    GenerateRequest,
    PipelineState,
    PullReply,
    PullRequest,
    RankReport,
    RejectReason,
    ReleaseKv,
    ResendReply,
    ResendRequest,
    SubmitReply,
    TokenEntry,
    TokenFrame,
)
from engine.services.bus import Bus
from engine.settings import EngineSettings
from engine.telemetry import TRACEPARENT, RequestSpans
from planner.protocol import Arrange, Phase, Plan, RankInventory, RankProgress, StepProfile

logger = logging.getLogger(__name__)

_STATE_POLL_S: Final = 0.05
_STATE_PERIOD_S: Final = 1.0
_REPORT_PERIOD_S: Final = 1.0
_PLAN_POLL_S: Final = 2.0
_PULL_TIMEOUT_S: Final = 15.0
_PULL_REPLY_S: Final = 2.0
"""After a pull's deadline the leader waits so long for its reply, before it gives the blocks to others."""


class _Led:
    """A pipeline that this rank leads, running or stopped but still asked about."""

    def __init__(self, position: Position, pipeline: LedPipeline, spans: RequestSpans) -> None:
        self.position = position
        self.pipeline = pipeline
        self.spans = spans
        self.is_ready = False
        self.subscriptions: list[Any] = []
        self.published: PipelineState | None = None
        self.published_at_s = 0.0
        self.ended_at_s: float | None = None
        self.was_retired_early = False
        """It was told to stop before it was ready: it ends as broken, but nothing is wrong."""

    @property
    def is_over(self) -> bool:
        return self.ended_at_s is not None


class RankService:
    """One rank process. `run` returns when it is told to stop."""

    def __init__(self, settings: EngineSettings, index: int, bus: Bus, backend: Backend) -> None:
        self._settings = settings
        self._rank = settings.rank_id(index)
        self._bus = bus
        self._backend = backend
        self._loop = asyncio.get_running_loop()
        self._server = ContextServer(backend)
        self._context_address = ""
        self._profile: StepProfile | None = None
        self._plan: Plan | None = None
        self._preparing: dict[str, asyncio.Task[None]] = {}
        self._prepared: dict[str, Position] = {}
        self._running: tuple[Position, RunningPipeline] | None = None
        self._led: dict[str, _Led] = {}
        self._over: dict[str, RankProgress] = {}
        """Pipelines of the plan that have ended here, or could not be prepared, and what was said of them."""
        self._outbox: asyncio.Queue[tuple[str, str, OutEntry]] = asyncio.Queue()
        self._rebuild_s = 0.0
        """What the last start of an engine took, if one had to be built."""
        self._report_due = asyncio.Event()
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self) -> None:
        """Serve until `stop`. Whatever ends it otherwise is raised: a rank must not live on while it keeps silent."""
        self._context_address = await self._server.start(self._settings.host)
        self._profile = await asyncio.to_thread(self._backend.profile)
        bus = self._bus
        await bus.subscribe(bus.engine.pull(self._rank), PullRequest, self._on_pull_request, concurrently=True)
        await bus.subscribe(bus.engine.release(self._rank), ReleaseKv, self._on_release)
        await bus.subscribe(bus.planner.plan, Plan, self._on_plan_message)
        await bus.subscribe(bus.planner.arrange, Arrange, self._on_arrange)
        bus.on_reconnect(self._fetch_plan)
        work: list[Coroutine[Any, Any, object]] = [
            self._publish_reports(),
            self._publish_tokens(),
            self._publish_states(),
            self._poll_plan(),
            self._stopping.wait(),
        ]
        tasks = [asyncio.create_task(part) for part in work]
        logger.info("rank ready rank=%s context=%s", self._rank, self._context_address)
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            unfinished = [*tasks, *self._tasks]
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
            await self._server.close()
            await asyncio.to_thread(self._backend.close)

    def stop(self) -> None:
        self._stopping.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("rank=%s event=task_failed", self._rank, exc_info=error)

    # --- the plan ---------------------------------------------------------------------------------------------

    async def _on_plan_message(self, plan: Plan, _headers: dict[str, str]) -> None:
        self._follow(plan)

    async def _fetch_plan(self) -> None:
        plan = await self._bus.current_plan()
        if plan is not None:
            self._follow(plan)

    async def _poll_plan(self) -> None:
        """A safety net under the announcements, and how a new rank gets its first plan."""
        while True:
            await self._fetch_plan()
            await asyncio.sleep(_PLAN_POLL_S)

    def _follow(self, plan: Plan) -> None:
        if self._plan is not None and plan.epoch <= self._plan.epoch:
            if plan.epoch < self._plan.epoch:
                logger.warning("event=stale_plan epoch=%d current=%d", plan.epoch, self._plan.epoch)
            return
        self._plan = plan
        self._report_due.set()
        if self._is_for_predecessor(plan):
            logger.info("rank=%s epoch=%d event=waits_for_next_plan", self._rank, plan.epoch)
            return
        named = {p.id for p in [*plan.pipelines, *(retiring.pipeline for retiring in plan.retiring)]}
        self._over = {pipeline: message for pipeline, message in self._over.items() if pipeline in named}
        running = self._running[0].pipeline.id if self._running else None
        held = frozenset({*self._prepared, *self._preparing})
        change = change_role(plan, self._rank, running, held, frozenset(self._over))
        logger.info(
            "rank=%s epoch=%d runs=%s abort=%s discard=%s prepare=%s",
            self._rank,
            plan.epoch,
            running,
            change.abort,
            ",".join(change.discard),
            change.prepare.pipeline.id if change.prepare else None,
        )
        for pipeline in change.discard:
            self._discard(pipeline)
        if change.abort is not None and self._running is not None:
            self._running[1].abort(f"not in plan {plan.epoch}")
        for planned in plan.pipelines:
            led = self._led.get(planned.id)
            if led is not None and not led.is_over and led.pipeline.is_draining():
                led.pipeline.carry_on()  # The notice that it was arranged for was cancelled.
        if change.prepare is not None:
            position = change.prepare
            self._preparing[position.pipeline.id] = self._spawn(self._prepare(plan, position))
        self._start_if_free()

    def _is_for_predecessor(self, plan: Plan) -> bool:
        """The plan was made for the process that was this rank before; it runs nothing that this one could join."""
        address = plan.addresses.get(self._rank)
        return address is not None and (address.context_address, address.store_address) != (
            self._context_address,
            self._backend.store_address,
        )

    def _discard(self, pipeline: str) -> None:
        task = self._preparing.pop(pipeline, None)
        if task is not None:
            task.cancel()
        self._prepared.pop(pipeline, None)
        self._backend.discard(pipeline)

    async def _prepare(self, plan: Plan, position: Position) -> None:
        pipeline = position.pipeline.id
        try:
            report = await self._backend.prepare(position, plan.transfers.get(self._rank, []))
        except Exception as error:  # Whatever it is: the planner must hear of it.
            del self._preparing[pipeline]
            is_expected = isinstance(error, EngineError)
            cause = str(error) if is_expected else f"{type(error).__name__}: {error}"
            logger.warning(
                "rank=%s pipeline=%s event=prepare_failed cause=%s",
                self._rank,
                pipeline,
                cause,
                exc_info=None if is_expected else error,
            )
            names_shape = isinstance(error, ShapeRefused)
            await self._give_up(pipeline, Phase.PREPARE_FAILED, cause, names_shape=names_shape)
            return
        # Were it not wanted any more, this task had been cancelled.
        del self._preparing[pipeline]
        self._prepared[pipeline] = position
        self._report_due.set()
        self._start_if_free()
        await self._tell(self._progress(pipeline, Phase.PREPARED, report=report))

    def _start_if_free(self) -> None:
        """Start what is prepared and still planned, once nothing runs here any more."""
        if self._running is not None or self._plan is None:
            return
        position = position_of(self._plan, self._rank)
        if position is None or position.pipeline.id not in self._prepared:
            return
        pipeline = position.pipeline.id
        prepared = self._prepared.pop(pipeline)
        running = self._backend.start(pipeline, self)
        self._running = (prepared, running)
        if isinstance(running, LedPipeline):
            self._led[pipeline] = _Led(prepared, running, RequestSpans(self._rank, pipeline))
            self._spawn(self._listen(pipeline))
        self._report_due.set()

    async def _on_arrange(self, arrange: Arrange, _headers: dict[str, str]) -> None:
        plan = self._plan
        kept = {p.id for p in plan.pipelines} if plan is not None and plan.epoch > arrange.epoch else set[str]()
        for pipeline in arrange.pipelines:
            if pipeline in kept:
                continue  # A newer plan, which has overtaken this message, keeps it.
            led = self._led.get(pipeline)
            if led is None or led.is_over:
                if led is not None or pipeline in self._prepared:
                    # Stopped already, or never started: the planner did not hear it, or could not know.
                    self._discard(pipeline)
                    await self._tell(self._progress(pipeline, Phase.STOPPED))
            elif led.is_ready:
                led.pipeline.arrange(arrange.deadline_s, arrange.migration_s)
            else:
                led.was_retired_early = True
                led.pipeline.abort("retired before it was ready")

    async def _tell(self, progress: RankProgress) -> None:
        await self._bus.publish(self._bus.planner.progress(progress.epoch), progress)

    def _give_up(
        self, pipeline: str, phase: Phase, detail: str, *, names_shape: bool = False
    ) -> Coroutine[Any, Any, None]:
        """It ends here, as a failure or not, and is not tried again; await the result to tell the planner."""
        self._over[pipeline] = progress = self._progress(pipeline, phase, detail=detail, names_shape=names_shape)
        self._report_due.set()
        return self._tell(progress)

    def _progress(
        self,
        pipeline: str,
        phase: Phase,
        *,
        detail: str = "",
        names_shape: bool = False,
        report: PrepareReport | None = None,
        phases_s: Mapping[str, float] = MappingProxyType({}),
    ) -> RankProgress:
        epoch = self._plan.epoch if self._plan else 0
        report = report or PrepareReport()
        message = RankProgress(
            rank=self._rank,
            epoch=epoch,
            pipeline=pipeline,
            phase=phase,
            at_s=time.time(),
            detail=detail,
            names_shape=names_shape,
            pulled_bytes=report.pulled_bytes,
            pulled_from_disk_bytes=report.disk_bytes,
            pull_s=report.pull_s,
            regroup_s=report.regroup_s,
            phases_s=dict(phases_s),
        )
        logger.info(
            "rank=%s pipeline=%s phase=%s pulled_bytes=%d disk_bytes=%d pull_s=%.3f regroup_s=%.3f detail=%s",
            self._rank,
            pipeline,
            phase,
            report.pulled_bytes,
            report.disk_bytes,
            report.pull_s,
            report.regroup_s,
            detail,
        )
        return message

    # --- what a pipeline tells (from its thread) --------------------------------------------------------------

    def on_ready(self, pipeline: str, phases_s: Mapping[str, float] = MappingProxyType({})) -> None:
        self._call(self._ready, pipeline, phases_s)

    def on_entries(self, pipeline: str, entries: list[OutEntry]) -> None:
        self._call(self._entries, pipeline, entries)

    def on_pull(self, pipeline: str, order: PullOrder) -> None:
        self._call(lambda: self._spawn(self._pull(pipeline, order)))

    def on_stopped(self, pipeline: str, num_parked: int) -> None:
        self._call(self._ended, pipeline, num_parked, Phase.STOPPED, "")

    def on_broken(self, pipeline: str, cause: str) -> None:
        self._call(self._ended, pipeline, 0, Phase.BROKEN, cause)

    def on_start_failed(self, pipeline: str, cause: str) -> None:
        self._call(self._ended, pipeline, 0, Phase.PREPARE_FAILED, cause)

    def _call(self, function: Callable[..., object], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # The loop is closed: the process is ending.
            self._loop.call_soon_threadsafe(function, *arguments)

    def _ready(self, pipeline: str, phases_s: Mapping[str, float]) -> None:
        if pipeline in self._led:
            self._led[pipeline].is_ready = True
        # Everybody has started, so nobody prepares from our weights for this pipeline any more.
        self._spawn(self._backend.free_unneeded(pipeline))
        self._rebuild_s = sum(phases_s.values()) or self._rebuild_s
        self._spawn(self._tell(self._progress(pipeline, Phase.STARTED, phases_s=phases_s)))
        self._report_due.set()

    def _entries(self, pipeline: str, entries: list[OutEntry]) -> None:
        led = self._led.get(pipeline)
        now_s = time.time()
        for out in entries:
            if led is not None:
                led.spans.entry(out.entry, now_s)
            self._outbox.put_nowait((out.gateway, pipeline, out))

    def _ended(self, pipeline: str, num_parked: int, phase: Phase, detail: str) -> None:
        self._backend.ended(pipeline, num_parked)
        if self._running is not None and self._running[0].pipeline.id == pipeline:
            self._running = None
        led = self._led.get(pipeline)
        if led is not None:
            led.is_ready = False
            led.ended_at_s = time.time()
            led.spans.ended(led.ended_at_s)
            if led.was_retired_early:
                phase = Phase.STOPPED
        self._spawn(self._give_up(pipeline, phase, detail))
        self._start_if_free()

    async def _pull(self, pipeline: str, order: PullOrder) -> None:
        """Have every rank of the pipeline pull its part of a sequence's KV."""
        led = self._led[pipeline]
        now_s = time.time()
        request = PullRequest(
            pipeline=pipeline,
            request_id=order.key.request_id,
            choice=order.key.choice,
            source=order.source,
            blocks=order.blocks,
            deadline_s=now_s + _PULL_TIMEOUT_S,
        )
        started_s = time.perf_counter()
        replies = await asyncio.gather(*(self._ask_to_pull(r, request) for r in led.position.pipeline.ranks()))
        failed = [reply.detail for reply in replies if not reply.ok]
        pull_s = time.perf_counter() - started_s
        logger.info(
            "pipeline=%s event=kv_pulled request=%s tokens=%d bytes=%d local_bytes=%d pull_s=%.3f failed=%s",
            pipeline,
            order.key.request_id,
            order.source.num_tokens,
            sum(reply.pulled_bytes for reply in replies),
            sum(reply.local_bytes for reply in replies),
            pull_s,
            failed[:1],
        )
        led.pipeline.pull_done(order.key, ok=not failed, pull_s=pull_s)

    async def _ask_to_pull(self, rank: str, request: PullRequest) -> PullReply:
        if rank == self._rank:
            return await self._pull_own_part(request)
        timeout_s = _PULL_TIMEOUT_S + _PULL_REPLY_S
        reply = await self._bus.request(self._bus.engine.pull(rank), request, PullReply, timeout_s)
        return reply or PullReply(ok=False, detail=f"{rank} does not answer")

    async def _on_pull_request(self, request: PullRequest, _headers: dict[str, str]) -> PullReply:
        return await self._pull_own_part(request)

    async def _pull_own_part(self, request: PullRequest) -> PullReply:
        """Never raises: each order needs its end, or the sequence waits for ever."""
        left_s = _PULL_TIMEOUT_S if request.deadline_s is None else request.deadline_s - time.time()
        late = PullReply(ok=False, detail=f"{self._rank} could not pull in time")
        if left_s <= 0:
            return late
        try:
            async with asyncio.timeout(left_s):
                return await self._backend.pull_kv(request)
        except TimeoutError:
            return late
        except Exception as error:
            logger.exception("rank=%s pipeline=%s event=pull_failed", self._rank, request.pipeline)
            return PullReply(ok=False, detail=f"{self._rank}: {type(error).__name__}: {error}")

    async def _on_release(self, message: ReleaseKv, _headers: dict[str, str]) -> None:
        self._backend.release_kv(message.pipeline, message.request_id, message.choice)
        self._report_due.set()

    # --- requests to the pipelines that it leads --------------------------------------------------------------

    async def _listen(self, pipeline: str) -> None:
        led, engine = self._led[pipeline], self._bus.engine

        async def submit(request: GenerateRequest, headers: dict[str, str]) -> SubmitReply:
            if not led.is_ready:
                return SubmitReply(accepted=False, reason=RejectReason.NOT_LEADER, detail=f"{pipeline} does not run")
            led.spans.submitted(request, headers.get(TRACEPARENT), time.time())
            reply = await led.pipeline.submit(request)
            if not reply.accepted:
                led.spans.refused(request)
            return reply

        async def cancel(request: CancelRequest, _headers: dict[str, str]) -> None:
            led.pipeline.cancel(request.request_id, request.attempt)

        async def resend(request: ResendRequest, _headers: dict[str, str]) -> ResendReply:
            entry = await led.pipeline.resend(request.request_id, request.choice, request.from_index)
            return ResendReply(entry=entry)

        led.subscriptions += [
            # Each waits for the step under way: one after the other they would get a step each.
            await self._bus.subscribe(engine.submit(pipeline), GenerateRequest, submit, concurrently=True),
            await self._bus.subscribe(engine.cancel(pipeline), CancelRequest, cancel),
            await self._bus.subscribe(engine.resend(pipeline), ResendRequest, resend, concurrently=True),
        ]

    async def _publish_tokens(self) -> None:
        """One frame a step for a gateway; when the connection is behind, several steps share one."""
        while True:
            batch = [await self._outbox.get()]
            while not self._outbox.empty():
                batch.append(self._outbox.get_nowait())
            by_reader: dict[tuple[str, str], list[TokenEntry]] = {}
            for gateway, pipeline, out in batch:
                by_reader.setdefault((gateway, pipeline), []).append(out.entry)
            epoch = self._plan.epoch if self._plan else 0
            for (gateway, pipeline), entries in by_reader.items():
                for frame in in_frames(entries):
                    message = TokenFrame(pipeline=pipeline, epoch=epoch, entries=frame)
                    await self._bus.publish(self._bus.engine.tokens(gateway, pipeline), message)

    async def _publish_states(self) -> None:
        while True:
            now_s = time.time()
            for pipeline, led in list(self._led.items()):
                state = self._state(led)
                if state != led.published or now_s - led.published_at_s > _STATE_PERIOD_S:
                    led.published, led.published_at_s = state, now_s
                    await self._bus.publish(self._bus.engine.state(pipeline), state)
            self._forget_expired(now_s)
            await asyncio.sleep(_STATE_POLL_S)

    def _state(self, led: _Led) -> PipelineState:
        snapshot = led.pipeline.snapshot() if not led.is_over else Snapshot()
        return PipelineState(
            pipeline=led.position.pipeline.id,
            epoch=self._plan.epoch if self._plan else 0,
            ready=led.is_ready,
            draining=led.is_over or led.pipeline.is_draining(),
            running=snapshot.running,
            waiting=snapshot.waiting,
            free_slots=snapshot.free_slots if led.is_ready else 0,
            total_kv_blocks=snapshot.total_kv_blocks,
            free_kv_blocks=snapshot.free_kv_blocks,
            cached_kv_blocks=snapshot.cached_kv_blocks,
            kv_block_tokens=self._settings.kv_block_tokens if self._settings.prefix_caching else 0,
            deadline_s=self._deadline_s(led.position.pipeline.id),
            parked=self._backend.parked().get(led.position.pipeline.id, 0),
        )

    def _deadline_s(self, pipeline: str) -> float | None:
        retiring = self._plan.retiring if self._plan else []
        return next((entry.deadline_s for entry in retiring if entry.pipeline.id == pipeline), None)

    def _forget_expired(self, now_s: float) -> None:
        """Stop answering for pipelines that ended long ago, and free the KV that nobody came for."""
        self._backend.release_expired(now_s)
        limit_s = now_s - self._settings.parked_kv_s
        for pipeline, led in list(self._led.items()):
            if led.ended_at_s is not None and led.ended_at_s < limit_s:
                del self._led[pipeline]
                for subscription in led.subscriptions:
                    self._spawn(self._bus.unsubscribe(subscription))

    # --- reports ----------------------------------------------------------------------------------------------

    async def _publish_reports(self) -> None:
        while True:
            self._report_due.clear()
            await self._bus.publish(self._bus.engine.report(self._rank), self._report())
            await self._repeat_failures()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REPORT_PERIOD_S):
                    await self._report_due.wait()

    async def _repeat_failures(self) -> None:
        """A report shows what was prepared and what has stopped, but not what failed: say it until the plan changes."""
        planned = {p.id for p in self._plan.pipelines} if self._plan else set()
        for progress in list(self._over.values()):
            if progress.pipeline in planned and progress.phase is not Phase.STOPPED:
                await self._tell(progress)

    def _report(self) -> RankReport:
        led = Snapshot()
        if self._running is not None and isinstance(self._running[1], LedPipeline):
            led = self._running[1].snapshot()
        inventory = RankInventory(
            rank=self._rank,
            device=self._settings.device,
            memory_bytes=self._backend.memory_bytes,
            context_address=self._context_address,
            store_address=self._backend.store_address,
            units=as_ranges(self._backend.units()),
            pipeline=self._running[0].pipeline.id if self._running else None,
            prepared=sorted(self._prepared),
            kv_tokens=led.kv_tokens,
            measured_step=led.measured_step,
            rebuild_s=self._rebuild_s,
        )
        return RankReport(
            inventory=inventory,
            model=self._backend.model,
            epoch=self._plan.epoch if self._plan else 0,
            profile=self._profile,
        )
