"""Drives the cores: queue -> router -> pipelines, and the token log back to the requests that wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec

from engine.protocol import (
    PipelineState,
    RejectReason,
    ReleaseKv,
    ResendRequest,
    SamplingParams,
    TokenEntry,
    TokenFrame,
)
from gateway.core import request_state
from gateway.core.admission_queue import AdmissionQueue
from gateway.core.keys import Principal
from gateway.core.request_state import ChoiceState, Deliver, Effect, EntryArrived, Event, Phase
from gateway.core.router import Decision, Fate, Need, Router
from gateway.errors import (
    ApiError,
    bad_request,
    context_length_exceeded,
    queue_full,
    server_error,
    timed_out,
    unavailable,
)
from gateway.protocol import KeyUsage
from gateway.services.accounts import Accounts, Times
from gateway.services.bus import Bus
from gateway.services.caller import Caller, current_caller
from gateway.services.generation import Delivery, Generation
from gateway.settings import Settings
from gateway.telemetry import ChoiceTrace, RequestTrace
from planner.protocol import Plan

_log = logging.getLogger(__name__)

_TICK_S = 0.1
_LOAD_REPORT_S = 1.0
_RETRY_S = 0.05
"""A refused request waits so long ..."""
_REFUSED_S = 0.25
"""... and the pipeline that refused gets nothing for so long: the others come first."""
_SLICE = 4
"""Entries that are worked on in one turn of the event loop, about a tenth of a millisecond: others come between ..."""
_NUM_SLICES = 16
"""... or, if that is more, so great a part of those that wait: a turn has a price, and who is behind must catch up."""
_MAX_BACKLOG = 16384
"""So many entries may wait, about half a second's work; then the NATS client keeps the frames, up to its own bound."""
_HAND_BACK_S = 5.0
"""A retiring pipeline without a deadline gets so long to hand its sequences back."""


class ChoiceSpec(msgspec.Struct, frozen=True):
    """One choice to generate; `choice` is its number among the samples of its prompt."""

    choice: int
    prompt_ids: list[int]
    sampling: SamplingParams


class _Running(msgspec.Struct):
    state: ChoiceState
    generation: Generation
    index: int
    trace: ChoiceTrace
    principal: Principal
    timeout_s: float
    times: Times
    pipeline: str = ""
    """The last one."""
    finish: str | None = None
    """How it has ended by itself."""


class Dispatcher:
    """All live requests of this gateway. Everything runs in one event loop; only `close` waits."""

    def __init__(self, settings: Settings, bus: Bus, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._bus = bus
        self._clock = clock
        self.router = Router()
        self._queue = AdmissionQueue(
            settings.max_queue, settings.queue_timeout_s, settings.no_pipeline_timeout_s, settings.queue_aging_s
        )
        self._choices: dict[str, _Running] = {}
        self._backlog: deque[tuple[str, TokenEntry]] = deque()
        """Entries, with the pipeline that they come from; while there are any, a call of `_work_off` is due."""
        self._worked_off = asyncio.Event()
        self._pipelines_since_s: float | None = None
        self._draining = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.accounts = Accounts(settings.gateway_id, settings.model_name)

    def start(self) -> None:
        self._bus.start(self)
        self._spawn(self._tick_forever())
        self._spawn(self._report_forever())

    async def close(self) -> None:
        """End what is left with an error, then the connection."""
        self.fail_all(unavailable("the gateway is shutting down", "draining"))
        pending = [task for task in self._tasks if task.get_name() == "send"]
        if pending:
            await asyncio.wait(pending, timeout=1.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._bus.close()

    def drain(self) -> None:
        """Take no new requests; the running ones get the drain time to finish."""
        if self._draining:
            return
        self._draining = True
        _log.info("draining: %d requests are running", len(self._choices))
        loop = asyncio.get_running_loop()
        loop.call_later(self._settings.drain_s, self.fail_all, unavailable("the gateway is shutting down", "draining"))

    # --- For the request handlers ------------------------------------------------------------------------------

    def generate(
        self, request_id: str, specs: Sequence[ChoiceSpec], trace: RequestTrace, *, priority: int = 0
    ) -> Generation:
        """Admit a request of one or more choices, for the current caller; a lower `priority` goes first.

        Raises ApiError: 429 if the queue is full or the caller's key is at a limit, 503 while draining.
        """
        caller = current_caller.get()
        try:
            return self._admit(request_id, specs, trace, priority, caller)
        except ApiError as error:
            self.accounts.metrics.refused(error.code or "")
            raise

    def _admit(
        self, request_id: str, specs: Sequence[ChoiceSpec], trace: RequestTrace, priority: int, caller: Caller
    ) -> Generation:
        now_s = self._clock()
        principal = caller.principal
        if self._draining:
            raise unavailable("the gateway is shutting down", "draining", retry_after_s=1)
        timeout_s = min(self._settings.request_timeout_s, caller.timeout_s or math.inf)
        names = [request_id if len(specs) == 1 else f"{request_id}-{i}" for i in range(len(specs))]
        # A prompt is computed, and paid for, once, whatever the number of its choices.
        num_prompt_tokens = sum(len(spec.prompt_ids) for spec in specs if spec.choice == 0)
        if principal.key is not None:
            self.accounts.limits.check(principal.key, num_prompt_tokens, now_s)
        admission = self._queue.push(
            names,
            now_s + timeout_s,
            now_s,
            tenant=principal.tenant,
            priority=priority,
            cost_tokens=num_prompt_tokens // len(specs) + self._expected_tokens(specs[0].sampling),
        )
        if not admission.accepted:
            raise queue_full(len(self._queue), self._queue.retry_after_s(now_s))
        if principal.key is not None:
            self.accounts.limits.admitted(principal.key, num_prompt_tokens, now_s)
        for name in admission.shed:
            # Others have less in the queue than the owner of this one.
            self._fail(self._choices[name], queue_full(len(self._queue), self._queue.retry_after_s(now_s)))
        generation = Generation(names)
        for index, (name, spec) in enumerate(zip(names, specs, strict=True)):
            deadline_s, max_broken = now_s + timeout_s, self._settings.max_broken_pipelines
            state = ChoiceState(name, spec.choice, spec.prompt_ids, spec.sampling, deadline_s, max_broken)
            times = self.accounts.admitted(len(spec.prompt_ids), now_s)
            running = _Running(state, generation, index, trace.choice(index), principal, timeout_s, times)
            running.trace.queued("new")
            self._choices[name] = running
        self._pump()
        return generation

    def _expected_tokens(self, sampling: SamplingParams) -> int:
        return self.accounts.service_times.expected_output_tokens(sampling.max_tokens, to_the_end=sampling.ignore_eos)

    def cancel(self, generation: Generation, index: int | None = None) -> None:
        """Stop one choice, or all; what has ended already is left alone."""
        names = generation.names if index is None else [generation.names[index]]
        for name in names:
            running = self._choices.get(name)
            if running is not None:
                self._carry_out(running, running.state.cancel())

    def not_ready_reason(self) -> str | None:
        """Why a request would have to wait now; None if a pipeline would take it."""
        if self._draining:
            return "the gateway is shutting down"
        if not self._bus.connected:
            return "NATS is not connected"
        now_s = self._clock()
        return None if self.router.ready(now_s) else self.router.waiting_reason(now_s)

    @property
    def idle(self) -> bool:
        """Nothing runs or waits."""
        return not self._choices

    def counts(self) -> dict[str, Any]:
        """What runs and waits now, as JSON."""
        pipelines = Counter(r.state.pipeline for r in self._choices.values() if r.state.pipeline)
        return {
            "running": sum(pipelines.values()),
            "waiting": len(self._queue),
            "pipelines": dict(pipelines),
            "ready": sorted(self.router.ready(self._clock())),
        }

    def fail_all(self, error: ApiError) -> None:
        for running in list(self._choices.values()):
            self._fail(running, error)

    # --- From the bus ------------------------------------------------------------------------------------------

    async def on_frame(self, frame: TokenFrame) -> None:
        # Those who wait for their first token come first: it is the one that people notice. The others come a few at a
        # time, so that neither new requests nor the first tokens of the next frame wait for all of this one.
        now_s, is_idle = self._clock(), not self._backlog
        for entry in frame.entries:
            if entry.index == 0:
                self._take_in(frame.pipeline, entry, now_s)
            else:
                self._backlog.append((frame.pipeline, entry))
        self._pump()
        if is_idle and self._backlog:
            # Not at once: the readers of the first tokens have been woken, and go before.
            asyncio.get_running_loop().call_soon(self._work_off)
        if len(self._backlog) > _MAX_BACKLOG:
            self._worked_off.clear()
            await self._worked_off.wait()

    def _work_off(self) -> None:
        """Take in a part of the backlog, and come back for the rest."""
        backlog, now_s = self._backlog, self._clock()
        num = min(len(backlog), max(_SLICE, len(backlog) // _NUM_SLICES))
        entries = [backlog.popleft() for _ in range(num)]
        if backlog:
            asyncio.get_running_loop().call_soon(self._work_off)
        else:
            self._worked_off.set()
        for pipeline, entry in entries:
            self._take_in(pipeline, entry, now_s)
        if not backlog:
            self._pump()

    def _take_in(self, pipeline: str, entry: TokenEntry, now_s: float) -> None:
        running = self._choices.get(entry.request_id)
        if running is None:
            return
        try:
            self._carry_out(running, running.state.handle(EntryArrived(pipeline, entry), now_s))
        except Exception:  # noqa: BLE001 # a fault in one request must not stop the others' tokens
            _log.exception("request %s failed", entry.request_id)
            self._fail(running, server_error())

    def on_state(self, state: PipelineState) -> None:
        if self.router.plan is None or state.epoch > self.router.plan.epoch:
            self._bus.want_plan()
        self.router.observe_state(state, self._clock())
        self._pump()

    def on_plan(self, plan: Plan) -> None:
        noticed_before = self.router.under_notice()
        if not self.router.observe_plan(plan):
            return
        _log.info(
            "plan %d: pipelines %s, retiring %s",
            plan.epoch,
            [p.id for p in plan.pipelines],
            [r.pipeline.id for r in plan.retiring],
        )
        now_s = self._clock()
        retiring = {r.pipeline.id: r for r in plan.retiring}
        for running in list(self._choices.values()):
            pipeline = running.state.pipeline
            if pipeline is None:
                continue
            end = retiring.get(pipeline)
            fate = self.router.fate(pipeline)
            if fate is Fate.GONE:
                reason = end.reason if end is not None else "the plan does not name the pipeline any more"
                noticed = pipeline in noticed_before or (end is not None and end.deadline_s is not None)
                self._handle(running, request_state.PipelineBroken(pipeline, reason, noticed))
            elif fate is Fate.RETIRING:
                deadline_s = end.deadline_s if end is not None else None
                give_up_s = now_s + _HAND_BACK_S if deadline_s is None else deadline_s
                self._handle(running, request_state.PipelineRetires(pipeline, give_up_s))
            else:
                self._handle(running, request_state.PipelineRetires(pipeline, math.inf))
        self._pump()

    def on_key_usage(self, usage: KeyUsage) -> None:
        self.accounts.limits.observe(usage, self._clock(), past=False)

    def on_connected(self) -> None:
        for running in list(self._choices.values()):
            self._handle(running, request_state.BusReturned())
        self._pump()

    # --- Inside ------------------------------------------------------------------------------------------------

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                self._tick()
            except Exception:  # noqa: BLE001 # a fault in one request must not stop the others' timers
                _log.exception("tick failed")

    def _tick(self) -> None:
        now_s = self._clock()
        if not self.router.ready(now_s):
            self._pipelines_since_s = None
        elif self._pipelines_since_s is None:
            self._pipelines_since_s = now_s
        for name in self._queue.expire(now_s, self._pipelines_since_s):
            # A sibling that expired before it has taken the whole request along.
            if name in self._choices:
                self._fail(self._choices[name], self._waited_too_long(now_s))
        for running in list(self._choices.values()):
            if running.state.phase is Phase.FINISHED:
                continue
            if now_s >= running.state.deadline_s:
                self._fail(running, timed_out(running.timeout_s))
            elif self._bus.connected:
                self._handle(running, request_state.Tick())
        self.accounts.flush()
        self._pump()

    def _waited_too_long(self, now_s: float) -> ApiError:
        if self._pipelines_since_s is None:
            return unavailable(f"no pipeline serves the model: {self.router.waiting_reason(now_s)}", "no_pipeline", 10)
        return unavailable("all pipelines are busy; the request has waited too long in the queue", "queue_timeout", 10)

    def _pump(self) -> None:
        """Send out what may go now."""
        now_s = self._clock()
        while self._bus.connected and (name := self._queue.first(now_s)) is not None:
            running = self._choices[name]
            state = running.state
            decision = self._decide(state, now_s)
            if decision is None:
                return
            pipeline = decision.pipeline
            running.pipeline = pipeline
            self._queue.take(name, now_s)
            self.accounts.sent(running.times, now_s)
            self.router.submitting(pipeline)
            left = state.last_pipeline if state.reached_last_pipeline else None
            reason = "resume" if state.token_ids else ("retry" if state.last_pipeline else "new")
            running.trace.attempt(pipeline, state.attempt, reason, decision.attributes)
            self._handle(running, request_state.Dispatched(pipeline))
            self._spawn(self._submit(running, pipeline, left))

    def _decide(self, state: ChoiceState, now_s: float) -> Decision | None:
        num_left = max(1, self._expected_tokens(state.sampling) - len(state.token_ids))
        need = Need(state.prompt_ids, self.accounts.service_times.expected_s(num_left))
        return self.router.decide(need, now_s, heir_of=state.last_pipeline)

    async def _submit(self, running: _Running, pipeline: str, left: str | None) -> None:
        """Offer the choice to `pipeline`; `left` may still run an attempt before this one."""
        state, attempt = running.state, running.state.attempt
        if left is not None:
            await self._bus.cancel(left, state.request_id, attempt - 1)
        request = state.generate_request(self._settings.gateway_id)
        reply = await self._bus.submit(pipeline, request, running.trace.headers())
        accepted = reply is not None and reply.accepted
        blocked_until_s = self._clock() + _REFUSED_S
        self.router.submitted(pipeline, accepted=accepted, blocked_until_s=blocked_until_s)
        if accepted:
            self.router.remember(pipeline, state.prompt_ids)
            if state.phase is Phase.FINISHED and state.cancelled:
                # The cancellation may have overtaken the request.
                await self._bus.cancel(pipeline, state.request_id, attempt)
            return
        reason = (reply.reason or RejectReason.INVALID) if reply is not None else None
        detail = reply.detail if reply is not None else ""
        self._handle(running, request_state.SubmitFailed(attempt, reason, detail))
        self._pump()

    async def _resend(self, running: _Running, pipeline: str, from_index: int) -> None:
        state, attempt = running.state, running.state.attempt
        question = ResendRequest(request_id=state.request_id, choice=state.choice, from_index=from_index)
        reply = await self._bus.resend(pipeline, question)
        # Without a connection nothing may be concluded, as if the plan still counted on the pipeline.
        in_plan = not self._bus.connected or self.router.fate(pipeline) is Fate.SERVING
        entry = reply.entry if reply is not None else None
        noticed = pipeline in self.router.under_notice()
        event = request_state.ResendAnswered(pipeline, attempt, reply is not None, entry, in_plan, noticed)
        self._handle(running, event)
        self._pump()

    async def _release(self, running: _Running, effect: request_state.ReleaseHeld) -> None:
        state, source = running.state, effect.source
        message = ReleaseKv(pipeline=source.pipeline, request_id=state.request_id, choice=state.choice)
        for rank in sorted({holder.rank for holder in source.holders}):
            await self._bus.release(rank, message)

    def _handle(self, running: _Running, event: Event) -> None:
        self._carry_out(running, running.state.handle(event, self._clock()))

    def _carry_out(self, running: _Running, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Deliver):
                self._deliver(running, effect)
            else:
                self._carry_out_one(running, effect)
        state = running.state
        if state.phase is Phase.FINISHED and self._choices.pop(state.request_id, None) is not None:
            num_tokens = len(state.token_ids)
            self._queue.forget(state.request_id, len(state.prompt_ids) + num_tokens)
            self.accounts.ended(running.times, running.principal, num_tokens, running.finish, self._clock())
            running.trace.end()
        # Only now: the reader may cancel the request when it is told.
        running.generation.tell()

    def _carry_out_one(self, running: _Running, effect: Effect) -> None:
        state = running.state
        match effect:
            case request_state.Fail(message, reason):
                self._fail(running, _failure(message, reason))
            case request_state.TimedOut():
                self._fail(running, timed_out(running.timeout_s))
            case request_state.Requeue(pipeline, reason, backoff):
                if not backoff:
                    self.accounts.metrics.left_pipeline()
                _log.info("request %s leaves pipeline %s: %s", state.request_id, pipeline, reason)
                not_before_s = self._clock() + _RETRY_S if backoff else 0.0
                self._queue.put_back(
                    state.request_id,
                    state.deadline_s,
                    interrupted=state.interrupted,
                    not_before_s=not_before_s,
                )
                running.trace.queued(reason)
            case request_state.AskResend(pipeline, from_index):
                self._spawn(self._resend(running, pipeline, from_index))
            case request_state.Cancel(pipeline, attempt):
                self._spawn(self._bus.cancel(pipeline, state.request_id, attempt), name="send")
            case request_state.ReleaseHeld():
                self._spawn(self._release(running, effect), name="send")
            case request_state.Resumed(stats):
                self.accounts.resumed(stats)
                running.trace.event("resumed", msgspec.structs.asdict(stats))
            case _:
                raise AssertionError(effect)

    def _deliver(self, running: _Running, effect: Deliver) -> None:
        state, ids, finish = running.state, effect.ids, effect.finish
        running.finish = finish
        num_cached = effect.cached_tokens
        self.accounts.tokens(running.times, len(state.prompt_ids), len(ids), num_cached, self._clock())
        if finish is not None:
            self.router.remember(running.pipeline, state.prompt_ids + state.token_ids)
        delivery = Delivery(running.index, ids, finish, num_cached, effect.logprobs, effect.prompt_logprobs)
        running.generation.put(delivery)

    def _fail(self, running: _Running, error: ApiError) -> None:
        self.accounts.metrics.refused(error.code or "")
        running.generation.fail(error)
        self.cancel(running.generation)

    async def _report_forever(self) -> None:
        while True:
            await asyncio.sleep(_LOAD_REPORT_S)
            now_s = self._clock()
            num_running = sum(r.state.pipeline is not None for r in self._choices.values())
            self.observe()
            await self._bus.report_load(self.accounts.load(num_running, len(self._queue), now_s))

    def observe(self) -> None:
        """Bring the metrics up to now."""
        now_s = self._clock()
        num_running = sum(r.state.pipeline is not None for r in self._choices.values())
        self.accounts.flush()
        num_ready = len(self.router.ready(now_s))
        self.accounts.metrics.observe(self.router.states(now_s), num_ready, len(self._queue), num_running)

    def _spawn(self, run: Coroutine[Any, Any, None], name: str | None = None) -> None:
        task = asyncio.create_task(run, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        with contextlib.suppress(asyncio.CancelledError):
            error = task.exception()
            if error is not None:
                _log.error("background task failed", exc_info=error)


def _failure(message: str, reason: RejectReason | None) -> ApiError:
    """What the client is told when a pipeline ends its request."""
    if reason is RejectReason.TOO_LONG:
        return context_length_exceeded(message, "max_tokens")
    if reason is RejectReason.INVALID:
        return bad_request(message)
    _log.error("a pipeline failed a request: %s", message)
    return server_error(f"The engine could not finish the request: {message}")
