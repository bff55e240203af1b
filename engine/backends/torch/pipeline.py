"""One rank's part of a running pipeline: a thread that computes, as leader or as member.

The leader owns the scheduler and tells every stage what to do with a control message that travels down the pipeline
ahead of the activations. Members only obey. With P stages up to P micro-batches are under way at once.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec
import torch
from torch import Tensor

from engine.backends.base import PipelineEvents, Snapshot
from engine.backends.torch.communicator import Communicator
from engine.backends.torch.grammar import GrammarMasks, Grammars
from engine.backends.torch.kv_pool import KvPool
from engine.backends.torch.stage_model import SequenceSlice, StageBatch, StageModel
from engine.backends.torch.step_sampler import Masks, StepSampler
from engine.core.arranger import steps_before_stop
from engine.core.roles import Position
from engine.core.scheduler import OutEntry, Scheduler, Step, StepExtras
from engine.core.sequence import SequenceKey
from engine.core.step_meter import StepMeter
from engine.errors import GrammarError, PipelineBroken
from engine.protocol import (
    GenerateRequest,
    KvHolder,
    RejectReason,
    SubmitReply,
    TokenEntry,
)
from planner.protocol import Wire

logger = logging.getLogger(__name__)

T = TypeVar("T")

_IDLE_WAIT_S: Final = 0.5
_STEP_TIME_WEIGHT: Final = 0.2
"""Of the newest step in the running mean of a step's time."""


class Hello(Wire, frozen=True, kw_only=True, tag=True):
    """Travels down the pipeline and comes back from the last stage: everybody is there."""


class RunStep(Wire, frozen=True, kw_only=True, tag=True):
    token_ids: list[int]
    sequences: list[SequenceSlice]


class Stop(Wire, frozen=True, kw_only=True, tag=True):
    """The last message: everything before it is computed when it comes back."""

    num_parked: int


_decoder = msgspec.msgpack.Decoder(Hello | RunStep | Stop)


@dataclass(slots=True)
class PipelineParts:
    """What a position needs to run; made while it is prepared."""

    position: Position
    model: StageModel | None
    """None once the pipeline has ended: its weights may be freed while its KV is still wanted."""
    pool: KvPool | None
    """None once the pipeline has ended: who still wants its KV holds the pool."""
    communicator: Communicator | None
    vocab_rows: list[int]
    """Vocabulary rows of each shard of the last stage."""
    hidden_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def num_stages(self) -> int:
        return len(self.position.pipeline.stages)

    @property
    def tensor(self) -> int:
        return self.position.pipeline.tensor


@dataclass(slots=True)
class _UnderWay:
    step: Step
    logits: Tensor | None
    """This rank's own, if it is the last stage too."""
    masks: Masks
    started_s: float


class PipelineThread:
    """Common life of leader and member: start, break, stop."""

    def __init__(self, parts: PipelineParts, events: PipelineEvents) -> None:
        self.parts = parts
        self.id = parts.position.pipeline.id
        self._events = events
        self._aborted: str | None = None
        self._thread = threading.Thread(target=self._main, name=self.id, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; False if it still runs."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def abort(self, cause: str) -> None:
        """Give up at once: whatever the thread waits for fails."""
        if self._aborted is None:
            self._aborted = cause
            self._wake()
            communicator = self.parts.communicator  # The thread may be dropping it.
            if communicator is not None:
                threading.Thread(target=communicator.abort, daemon=True).start()

    def _wake(self) -> None:
        """Make the thread look at its state."""

    def _run(self) -> int:
        """Serve until stopped; the number of sequences whose KV stays."""
        raise NotImplementedError

    def _main(self) -> None:
        cause: str
        try:
            with torch.inference_mode():
                num_parked = self._run()
        except PipelineBroken as error:
            cause = self._aborted or error.cause
        except Exception as error:  # A bug or no memory: the pipeline is broken, the rank goes on.
            logger.exception("pipeline=%s event=failed", self.id)
            cause = f"{type(error).__name__}: {error}"
        else:
            self._close()
            self._events.on_stopped(self.id, num_parked)
            return
        # Closing our connections tells the members that wait for us.
        if self.parts.communicator is not None:
            self.parts.communicator.abort()
        self._close()
        self._events.on_broken(self.id, cause)

    def _close(self) -> None:
        self.parts.communicator = None
        self.parts.model = None

    def _forward(self, batch: StageBatch, hidden: Tensor | None) -> Tensor:
        parts = self.parts
        assert parts.model is not None, f"{self.id} has ended"
        assert parts.pool is not None, f"{self.id} has ended"
        return parts.model.forward(batch, hidden, parts.pool)


class Member(PipelineThread):
    """Obeys the control messages of the rank before it."""

    def _run(self) -> int:
        parts, position = self.parts, self.parts.position
        communicator = parts.communicator
        assert communicator is not None, "a pipeline of one rank has no member"
        is_last = position.stage == parts.num_stages - 1
        before = position.index - parts.tensor if position.stage else 0
        after = None if is_last else position.index + parts.tensor
        is_first_message = True
        while True:
            body = communicator.receive_control(before)
            if after is not None:
                communicator.send_control(body, after)
            message = _decoder.decode(body)
            if isinstance(message, RunStep):
                self._step(communicator, message, before, after)
                continue
            if is_last:
                communicator.send(torch.ones(1), 0)
            if isinstance(message, Stop):
                communicator.flush()
                return message.num_parked
            if is_first_message:
                is_first_message = False
                self._events.on_ready(self.id)

    def _step(self, communicator: Communicator, message: RunStep, before: int, after: int | None) -> None:
        parts = self.parts
        hidden = None
        if parts.position.stage:
            shape = (len(message.token_ids), parts.hidden_size)
            hidden = communicator.receive(shape, parts.dtype, before)
        out = self._forward(StageBatch(message.token_ids, message.sequences), hidden)
        if after is not None:
            communicator.send(out, after)
        elif out.shape[0]:
            communicator.send(out, 0)


class Leader(PipelineThread):
    """Runs the scheduler, samples, and keeps the token log."""

    def __init__(
        self,
        parts: PipelineParts,
        events: PipelineEvents,
        scheduler: Scheduler,
        grammars: Grammars,
        *,
        arrange_margin_s: float,
    ) -> None:
        super().__init__(parts, events)
        self.scheduler = scheduler
        self._grammars = grammars
        # One at a time: the few threads of the event loop's pool have transfers to do.
        self._compiling = asyncio.Lock()
        self._sampler = StepSampler(GrammarMasks(grammars, 2 * scheduler.limits.max_batch, parts.device))
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._inbox_lock = threading.Lock()
        self._is_over = False
        self._arrange: tuple[float | None, float] | None = None
        self._margin_s = arrange_margin_s
        self._step_s = 0.05
        self._meter = StepMeter(parts.num_stages)
        self._under_way: deque[_UnderWay] = deque()
        self._snapshot = Snapshot()

    # --- called from the event loop ---------------------------------------------------------------------------

    async def submit(self, request: GenerateRequest) -> SubmitReply:
        """Hand a request to the scheduler; its grammar is compiled first, beside the steps."""
        grammar = request.sampling.grammar
        if grammar is not None and not self._grammars.knows(grammar):
            try:
                async with self._compiling:
                    await asyncio.to_thread(self._grammars.compile, grammar)
            except GrammarError as error:
                return SubmitReply(accepted=False, reason=RejectReason.INVALID, detail=f"sampling.grammar: {error}")
        rejected = SubmitReply(accepted=False, reason=RejectReason.NOT_LEADER, detail=f"{self.id} has stopped")
        reply = await self._ask(lambda: self.scheduler.submit(request, time.time()))
        return reply if reply is not None else rejected

    async def resend(self, request_id: str, choice: int, from_index: int) -> TokenEntry | None:
        """The log of a sequence from an index on; also after the pipeline has stopped."""
        if self._is_over:
            return self.scheduler.resend(request_id, choice, from_index)
        return await self._ask(lambda: self.scheduler.resend(request_id, choice, from_index))

    def cancel(self, request_id: str, attempt: int | None = None) -> None:
        """End all choices of a request, or those that run as `attempt` or an older one."""
        self._post(lambda: self._publish(self.scheduler.cancel(request_id, time.time(), attempt)))

    def pull_done(self, key: SequenceKey, *, ok: bool, pull_s: float) -> None:
        self._post(lambda: self.scheduler.pull_done(key, ok, pull_s, time.time()))

    def arrange(self, deadline_s: float | None, migration_s: float) -> None:
        """Stop at a token boundary, as late as the deadline allows (None: at the next one)."""
        self._arrange = (deadline_s, migration_s)
        self._wake()

    def carry_on(self) -> None:
        """Forget what `arrange` said; it may be too late."""
        self._arrange = None
        self._wake()

    def is_draining(self) -> bool:
        return self._arrange is not None

    def snapshot(self) -> Snapshot:
        return self._snapshot

    def _wake(self) -> None:
        self._inbox.put(lambda: None)

    def _post(self, action: Callable[[], None]) -> bool:
        with self._inbox_lock:
            if self._is_over:
                return False
            self._inbox.put(action)
            return True

    async def _ask(self, action: Callable[[], T]) -> T | None:
        """Run `action` in the thread; None if the pipeline is over."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T | None] = loop.create_future()

        def answer() -> None:
            result: T | None = None
            try:
                result = action()
            finally:  # Also when it fails, and the pipeline with it: somebody waits.
                loop.call_soon_threadsafe(_resolve, future, result)

        return await future if self._post(answer) else None

    # --- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> int:
        try:
            self._greet()
            self._take_snapshot()
            self._events.on_ready(self.id)
            while not self._should_stop():
                self._turn()
            return self._stop()
        finally:
            with self._inbox_lock:
                self._is_over = True
            self.scheduler.drain()  # What is in the inbox now must not be accepted.
            self._drain_inbox()

    def _greet(self) -> None:
        self._tell(Hello())
        self._collect_acknowledgements()

    def _turn(self) -> None:
        """One round: hear, admit, launch a step, finish the oldest one."""
        now_s = time.time()
        orders, entries = self.scheduler.tick(now_s)
        self._publish(entries)
        for order in orders:
            self._events.on_pull(self.id, order)
        step = self.scheduler.schedule(now_s)
        if step is not None:
            self._launch(step)
        is_idle = not self._under_way  # Asked before a step is finished, since that makes its sequences ready again.
        if self._under_way and (step is None or len(self._under_way) >= self.parts.num_stages):
            self._finish_oldest()
        self._take_snapshot()
        if is_idle and not orders and not entries:
            self._wait_for_work()
        self._drain_inbox()

    def _wait_for_work(self) -> None:
        deadline_s = self.scheduler.next_deadline_s()
        wait_s = _IDLE_WAIT_S if deadline_s is None else min(_IDLE_WAIT_S, max(0.001, deadline_s - time.time()))
        try:
            self._inbox.get(timeout=wait_s)()
        except queue.Empty:
            return

    def _drain_inbox(self) -> None:
        while True:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return

    def _should_stop(self) -> bool:
        if self._aborted is not None:
            raise PipelineBroken(self.id, self._aborted)
        arrange = self._arrange  # Once: the event loop may take it back.
        if arrange is None:
            return False
        deadline_s, migration_s = arrange
        counts = self.scheduler.counts()
        is_idle = counts.running == 0 and counts.waiting == 0
        steps = steps_before_stop(time.time(), deadline_s, migration_s, self._step_s, self._margin_s)
        return is_idle or steps <= 0

    def _stop(self) -> int:
        """Commit what is under way, park every sequence, and bring the members to a stop."""
        arrange = self._arrange
        self.scheduler.drain()
        while self._under_way:
            self._finish_oldest()
        entries = self.scheduler.park("pipeline retired", self._holders(), arrange[0] if arrange else None)
        num_parked = self.scheduler.counts().parked
        self._tell(Stop(num_parked=num_parked))
        # Only then has every stage computed all KV that the interrupted sequences carry along.
        self._collect_acknowledgements()
        self._publish(entries)
        self._take_snapshot()
        return num_parked

    def _holders(self) -> list[KvHolder]:
        position = self.parts.position
        return [
            KvHolder(
                rank=shard.rank,
                context_address=position.addresses[shard.rank].context_address,
                first_layer=stage.first_layer,
                last_layer=stage.last_layer,
                first_group=shard.first_group,
                last_group=shard.last_group,
            )
            for stage in position.pipeline.stages
            for shard in stage.shards
        ]

    # --- steps ------------------------------------------------------------------------------------------------

    def _launch(self, step: Step) -> None:
        started_s = time.perf_counter()
        parts = self.parts
        batch = StageBatch(
            [token for part in step.slices for token in part.token_ids],
            [
                SequenceSlice(len(part.token_ids), part.context_tokens, part.blocks, part.num_logits)
                for part in step.slices
            ],
        )
        self._meter.launched(len(part.token_ids) for part in step.slices)
        self._tell(RunStep(token_ids=batch.token_ids, sequences=batch.sequences))
        out = self._forward(batch, None)
        if parts.num_stages > 1:
            assert parts.communicator is not None
            parts.communicator.send(out, parts.tensor)
        own_logits = out if parts.num_stages == 1 else None
        self._under_way.append(_UnderWay(step, own_logits, self._sampler.masks(step), started_s))

    def _finish_oldest(self) -> None:
        done = self._under_way.popleft()
        step = done.step
        num_logits = sum(part.num_logits for part in step.slices)
        tokens: list[int] = []
        extras = StepExtras()
        if num_logits:
            tokens, extras = self._sampler.sample(step, self._gather_logits(num_logits, done.logits), done.masks)
        if tokens:
            took_s = time.perf_counter() - done.started_s
            self._step_s += _STEP_TIME_WEIGHT * (took_s - self._step_s)
            self._note_step(step, took_s)
        self._publish(self.scheduler.commit(step.step_id, tokens, time.time(), extras))

    def _note_step(self, step: Step, took_s: float) -> None:
        num_sequences = len(step.slices) + sum(len(other.step.slices) for other in self._under_way)
        mean_context_tokens = sum(part.context_tokens for part in step.slices) / len(step.slices)
        self._meter.finished(num_sequences, mean_context_tokens, took_s)

    def _gather_logits(self, num_rows: int, own: Tensor | None) -> Tensor:
        """Logits [num_rows, vocab] from the shards of the last stage."""
        parts = self.parts
        if own is not None and parts.tensor == 1:
            return own
        assert parts.communicator is not None
        first = (parts.num_stages - 1) * parts.tensor
        slices = [own] if own is not None else []
        for shard in range(len(slices), parts.tensor):
            shape = (num_rows, parts.vocab_rows[shard])
            slices.append(parts.communicator.receive(shape, torch.float32, first + shard))
        return torch.cat(slices, dim=1)

    def _tell(self, message: Hello | RunStep | Stop) -> None:
        communicator = self.parts.communicator
        if communicator is None:
            return
        body = msgspec.msgpack.encode(message)
        for shard in range(1, self.parts.tensor):
            communicator.send_control(body, shard)
        if self.parts.num_stages > 1:
            communicator.send_control(body, self.parts.tensor)

    def _collect_acknowledgements(self) -> None:
        communicator = self.parts.communicator
        if communicator is None:
            return
        first = (self.parts.num_stages - 1) * self.parts.tensor
        for shard in range(self.parts.tensor):
            if first + shard:
                communicator.receive((1,), torch.float32, first + shard)

    def _publish(self, entries: list[OutEntry]) -> None:
        if entries:
            self._events.on_entries(self.id, entries)

    def _take_snapshot(self) -> None:
        counts = self.scheduler.counts()
        block_tokens = self.scheduler.limits.block_tokens
        self._snapshot = Snapshot(
            running=counts.running,
            waiting=counts.waiting,
            parked=counts.parked,
            free_slots=0 if self.is_draining() else counts.free_slots,
            total_kv_blocks=counts.total_kv_blocks,
            free_kv_blocks=counts.free_kv_blocks,
            cached_kv_blocks=counts.cached_kv_blocks,
            kv_tokens=(counts.total_kv_blocks - counts.free_kv_blocks) * block_tokens,
            measured_step=self._meter.measured,
        )


def _resolve(future: asyncio.Future[T | None], result: T | None) -> None:
    if not future.done():
        future.set_result(result)
