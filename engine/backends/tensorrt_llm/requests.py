"""The requests of one engine: who waits, who runs, each one's token log, and what ends it. Pure.

The engine schedules; this decides what it may have at once (no more than it runs: what waits inside it cannot be
aborted), what of its output counts, and how a sequence goes on where the engine ended it too early. Effects are
collected until `take`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from engine.backends.tensorrt_llm.sampling import unsupported
from engine.backends.tensorrt_llm.trial import Trial
from engine.backends.tensorrt_llm.wire import Abort, Generate, Tokens
from engine.core.frames import shortened
from engine.core.scheduler_types import OutEntry
from engine.core.sequence import Event, Sequence, SequenceKey, invalid_field
from engine.protocol import (
    DEADLINE_PASSED,
    FinishReason,
    GenerateRequest,
    Interruption,
    RejectReason,
    SubmitReply,
    TokenEntry,
)

WAITING_PER_SLOT: Final = 4
ENDED_KEPT: Final = 512
ENDED_KEPT_S: Final = 120.0
TOGETHER_S: Final = 0.25
"""Errors of one forward pass all come within this time."""


@dataclass(frozen=True, slots=True)
class TableLimits:
    max_batch: int
    max_model_len: int
    max_kv_tokens: int
    vocab_size: int


@dataclass(slots=True)
class Effects:
    """Messages to the engine in the order in which they must go, and entries for the gateways."""

    messages: list[Abort | Generate] = field(default_factory=list)
    entries: list[OutEntry] = field(default_factory=list)


@dataclass(slots=True)
class _Run:
    """One stay of a sequence in the engine."""

    sequence: Sequence
    num_before: int
    """Committed tokens when it began."""
    error: str | None = None
    """The engine has failed it; whose fault that is shows when it is known who else fell."""
    failed_s: float = 0.0

    @property
    def has_moved(self) -> bool:
        """It got a token: it does not wait in the engine."""
        return self.sequence.num_committed > self.num_before


class RequestTable:
    """Times must not go back."""

    def __init__(
        self, pipeline: str, limits: TableLimits, breach: Callable[[str, list[int]], str | None] = lambda *_: None
    ) -> None:
        self.pipeline = pipeline
        self._breach = breach
        """Why ids are not a whole output of a grammar; None if they are."""
        self.limits = limits
        self.is_draining = False
        self.dead: str | None = None
        """Why the engine counts as dead."""
        self._trial = Trial()
        self.last_progress_s = -math.inf
        """When a token came, or the engine got its first request after none."""
        self._waiting: OrderedDict[SequenceKey, Sequence] = OrderedDict()
        self._runs: dict[int, _Run] = {}
        """By the id that the engine knows it by: new for each stay."""
        self._run_of: dict[SequenceKey, int] = {}
        self._ended: OrderedDict[SequenceKey, Sequence] = OrderedDict()
        self._next_id = 1
        self._effects = Effects()

    # --- Observation ------------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return len(self._runs)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._trial.held())

    @property
    def free_slots(self) -> int:
        return 0 if self.is_draining else max(0, self.limits.max_batch - self.num_running - self.num_waiting)

    @property
    def is_idle(self) -> bool:
        return not self._runs and not self.num_waiting

    def context_tokens(self) -> list[int]:
        """Of each running sequence."""
        return [len(run.sequence.tokens) for run in self._runs.values()]

    def take(self) -> Effects:
        """What is to be done since the last call."""
        effects, self._effects = self._effects, Effects()
        return effects

    def resend(self, request_id: str, choice: int, from_index: int) -> TokenEntry | None:
        """What is known of a live or lately ended sequence from `from_index` on; None if nothing is."""
        key = SequenceKey(request_id, choice)
        sequence = self._live(key) or self._ended.get(key)
        if sequence is None or not sequence.num_without_logprobs <= from_index <= sequence.num_committed:
            return None
        return shortened(sequence.entry(from_index))

    # --- Requests ---------------------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest, now_s: float) -> SubmitReply:
        """As `Scheduler.submit`: the same attempt again changes nothing, a higher one replaces the older."""
        key = SequenceKey(request.request_id, request.choice)
        known = self._live(key) or self._ended.get(key)
        if known is not None and request.attempt == known.request.attempt:
            return SubmitReply(accepted=True)
        if known is not None and request.attempt < known.request.attempt:
            return _refuse(RejectReason.INVALID, f"attempt: stale attempt, {known.request.attempt} is known")
        sequence = Sequence(request, (0, 0), now_s)
        sequence.finish = sequence.finish_reason(self.limits.max_model_len)
        refusal = self._refusal(sequence)
        if refusal is not None:
            return refusal
        self._remove(key)
        self._ended.pop(key, None)
        self._waiting[key] = sequence
        if sequence.resumes:  # Its client is in mid-stream: it goes before new ones.
            self._waiting.move_to_end(key, last=False)
        if sequence.finish is not None:
            self._end(sequence, now_s, sequence.num_committed)
        self._admit(now_s)
        return SubmitReply(accepted=True)

    def cancel(self, request_id: str, now_s: float, attempt: int | None = None) -> None:
        """End all choices of a request, or those that run as `attempt` or an older one."""
        for sequence in [s for s in self._all() if s.key.request_id == request_id]:
            if attempt is None or sequence.request.attempt <= attempt:
                sequence.finish = FinishReason.CANCELLED
                self._end(sequence, now_s, sequence.num_committed)
        self._admit(now_s)

    def tick(self, now_s: float) -> None:
        """End what is past its client's deadline, and forget what ended long ago."""
        for sequence in self._all():
            deadline_s = sequence.request.deadline_s
            if deadline_s is not None and deadline_s <= now_s:
                self._fail(sequence, DEADLINE_PASSED, now_s)
        while self._ended:
            key, oldest = next(iter(self._ended.items()))
            if len(self._ended) <= ENDED_KEPT and oldest.ended_s > now_s - ENDED_KEPT_S:
                break
            del self._ended[key]
        self._judge(now_s)
        self._admit(now_s)

    def interrupt_all(self, reason: str, now_s: float, *, broken: bool = False) -> None:
        """Hand every live sequence back, to be resumed elsewhere; nothing is taken after this."""
        self.is_draining = True
        for sequence in self._all():
            self._interrupt(sequence, reason, now_s, broken=broken)

    # --- What the engine says ---------------------------------------------------------------------------------

    def heard(self, news: Tokens, now_s: float) -> None:
        """Commit what is new of one request, and see whether that ends it. Of what has ended, nothing counts."""
        run = self._runs.get(news.id)
        if run is None or run.error is not None:
            return
        sequence, first = run.sequence, run.sequence.num_committed
        if news.ids:
            self.last_progress_s = now_s
        if news.ids or (news.finish_reason not in (None, "cancelled")):
            for convicted in self._trial.moved(sequence.key):
                self._fail(convicted.sequence, convicted.error, now_s, has_ended=True)
        self._append(sequence, news)
        if news.ended and sequence.finish is None:
            self._ended_by_engine(run, news, now_s)
        elif sequence.finish is not None:
            self._end(sequence, now_s, first, has_ended=news.ended)
        elif news.ids:
            self._emit(sequence, first, now_s)
        self._judge(now_s)
        self._admit(now_s)

    def _append(self, sequence: Sequence, news: Tokens) -> None:
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(news.cached_tokens, len(sequence.request.prompt_ids))
        for position, token_id in enumerate(news.ids):
            sequence.tokens.append(token_id)
            if news.logprobs is not None:
                sequence.logprobs.append(news.logprobs[position])
            sequence.finish = sequence.finish_reason(self.limits.max_model_len)
            if sequence.finish is not None:
                return  # What comes behind is not part of the answer.

    def _ended_by_engine(self, run: _Run, news: Tokens, now_s: float) -> None:
        """By our rules it goes on."""
        sequence, first = run.sequence, run.sequence.num_committed - len(news.ids)
        if news.error is not None:
            self._emit_if_new(sequence, first, now_s)
            run.error, run.failed_s = news.error, now_s
            return
        if news.finish_reason == "cancelled":  # Not by us, so the engine is going down: migrate.
            self._emit_if_new(sequence, first, now_s)
            self._interrupt(sequence, "the engine gave it up", now_s, has_ended=True)
            return
        if news.finish_reason == "stop" and self._was_taken_back(sequence, news.stop_id):
            first = self._put_back_stop(sequence, news.stop_id, first, now_s)
        if sequence.finish is not None:
            self._end(sequence, now_s, first, has_ended=True)
        elif sequence.num_committed > run.num_before:
            # Its length was clamped, or it met a stop token that does not end it by the request: resume at once.
            self._emit_if_new(sequence, first, now_s)
            self._forget_run(sequence)
            self._begin(sequence)
        else:
            self._fail(sequence, f"the engine ended it ({news.finish_reason}) without a token", now_s, has_ended=True)

    def _judge(self, now_s: float) -> None:
        """Whether those that the engine failed fell together, with all that were active, or each by itself."""
        failed = [run for run in self._runs.values() if run.error is not None]
        if not failed:
            return
        if len(failed) < len(self._runs) and now_s - failed[0].failed_s < TOGETHER_S:
            return  # The others may follow.
        others_move = any(run.has_moved for run in self._runs.values() if run.error is None)
        same = [run.sequence for run in failed if run.error == failed[0].error]
        is_tried = any(sequence.key == self._trial.on_trial for sequence in same)
        # What is wrong with a request itself is told before its first token.
        if is_tried or (not others_move and len(same) > 1 and any(run.has_moved for run in failed)):
            for sequence in same:
                self._forget_run(sequence)
            self.last_progress_s = now_s
            self.dead = self._trial.fell(same, failed[0].error or "", now_s)
            return
        for run in failed:
            self._fail(run.sequence, run.error or "", now_s, has_ended=True)

    def _was_taken_back(self, sequence: Sequence, stop_id: int | None) -> bool:
        """Whether the token that stopped it is missing in the log: a stop match removes it, and an EOS has no name."""
        if not sequence.num_committed:
            return True
        eos_ids = sequence.request.sampling.eos_token_ids
        return sequence.tokens[-1] != stop_id if stop_id is not None else sequence.tokens[-1] not in eos_ids

    def _put_back_stop(self, sequence: Sequence, stop_id: int | None, first: int, now_s: float) -> int:
        """The log ends with the token that stopped it. Returns the first index that is still to be told."""
        sampling = sequence.request.sampling
        token_id = stop_id if stop_id is not None else next(iter(sampling.eos_token_ids), None)
        if token_id is None or sampling.logprobs is not None:
            # Nobody knows its id, or its logprob: the choice ends without it, and its last token is none that ends it.
            self._emit_if_new(sequence, first, now_s)
            sequence.finish = FinishReason.STOP
            return sequence.num_committed
        sequence.tokens.append(token_id)
        sequence.finish = sequence.finish_reason(self.limits.max_model_len)
        return first

    # --- Helpers ----------------------------------------------------------------------------------------------

    def _refusal(self, sequence: Sequence) -> SubmitReply | None:
        limits, request = self.limits, sequence.request
        if self.is_draining:
            return _refuse(RejectReason.DRAINING, f"pipeline {self.pipeline} takes no new requests")
        problem = invalid_field(request, limits.vocab_size) or unsupported(request.sampling)
        if problem is not None:
            return _refuse(RejectReason.INVALID, problem)
        if sequence.finish is not None:
            return None
        num_prompt = len(request.prompt_ids)
        most_tokens = min(limits.max_model_len, limits.max_kv_tokens)
        if num_prompt >= most_tokens:
            return _refuse(RejectReason.TOO_LONG, f"prompt_ids: {num_prompt} of at most {most_tokens - 1} tokens")
        num_tokens = min(num_prompt + request.sampling.max_tokens, limits.max_model_len) - 1
        if num_tokens > limits.max_kv_tokens:
            return _refuse(
                RejectReason.TOO_LONG, f"KV of {num_tokens} tokens; the engine's pool holds {limits.max_kv_tokens}"
            )
        if self.num_waiting - (sequence.key in self._waiting) >= WAITING_PER_SLOT * limits.max_batch:
            return _refuse(RejectReason.FULL, f"{self.num_waiting} sequences are waiting")
        return None

    def _all(self) -> list[Sequence]:
        return [*(run.sequence for run in self._runs.values()), *self._trial.held(), *self._waiting.values()]

    def _live(self, key: SequenceKey) -> Sequence | None:
        run_id = self._run_of.get(key)
        if run_id is not None:
            return self._runs[run_id].sequence
        return self._waiting.get(key) or self._trial.find(key)

    def _admit(self, now_s: float) -> None:
        if self._trial.is_open and self.dead is None:
            suspect = self._trial.next()
            if suspect is not None:
                self._begin(suspect)
            elif not self._runs:
                self.dead = "forward passes failed, and nobody is left to show whose fault it was"
            return  # Nobody else begins before it is over.
        while self._waiting and len(self._runs) < self.limits.max_batch and not self.is_draining:
            _, sequence = self._waiting.popitem(last=False)
            sequence.apply(Event.START)
            if not self._runs:
                self.last_progress_s = now_s
            self._begin(sequence)

    def _begin(self, sequence: Sequence) -> None:
        request, run_id = sequence.request, self._next_id
        self._next_id += 1
        self._runs[run_id] = _Run(sequence, sequence.num_committed)
        self._run_of[sequence.key] = run_id
        room = self.limits.max_model_len - len(sequence.tokens)
        self._effects.messages.append(
            Generate(
                id=run_id,
                token_ids=list(sequence.tokens),
                num_prompt=len(request.prompt_ids),
                choice=request.choice,
                sampling=request.sampling,
                max_tokens=min(request.sampling.max_tokens - sequence.num_committed, room),
            )
        )

    def _forget_run(self, sequence: Sequence) -> int | None:
        run_id = self._run_of.pop(sequence.key, None)
        if run_id is not None:
            del self._runs[run_id]
        return run_id

    def _remove(self, key: SequenceKey, *, has_ended: bool = False) -> None:
        sequence = self._live(key)
        if sequence is None:
            return
        run_id = self._forget_run(sequence)
        self._waiting.pop(key, None)
        self._trial.remove(key)
        if run_id is not None and not has_ended:
            self._effects.messages.append(Abort(id=run_id))
        sequence.apply(Event.END)

    def _fail(self, sequence: Sequence, error: str, now_s: float, *, has_ended: bool = False) -> None:
        sequence.finish, sequence.error = FinishReason.ERROR, error
        self._end(sequence, now_s, sequence.num_committed, has_ended=has_ended)

    def _interrupt(
        self, sequence: Sequence, reason: str, now_s: float, *, has_ended: bool = False, broken: bool = False
    ) -> None:
        sequence.interruption = Interruption(reason=reason, kv_source=sequence.request.kv_source, broken=broken)
        self._end(sequence, now_s, sequence.num_committed, has_ended=has_ended)

    def _end(self, sequence: Sequence, now_s: float, from_index: int, *, has_ended: bool = False) -> None:
        sampling = sequence.request.sampling
        ends_by_itself = sequence.finish is FinishReason.STOP and sequence.tokens[-1] in sampling.eos_token_ids
        if ends_by_itself and sampling.grammar is not None:
            # The engine's processors cannot tell that they gave up: they can only end.
            breach = self._breach(sampling.grammar, sequence.tokens[len(sequence.request.prompt_ids) : -1])
            if breach is not None:
                sequence.finish, sequence.error = FinishReason.ERROR, f"sampling.grammar: {breach}"
        self._remove(sequence.key, has_ended=has_ended)
        sequence.ended_s = now_s
        self._ended[sequence.key] = sequence
        self._emit(sequence, from_index, now_s)

    def _emit_if_new(self, sequence: Sequence, from_index: int, now_s: float) -> None:
        if from_index < sequence.num_committed:
            self._emit(sequence, from_index, now_s)

    def _emit(self, sequence: Sequence, from_index: int, now_s: float) -> None:
        resume = None
        if sequence.resumes and from_index < sequence.num_committed:
            resume, sequence.resumes = sequence.resume_stats(now_s), False
        entry = sequence.entry(from_index, resume)
        self._effects.entries.append(OutEntry(sequence.request.gateway, entry))


def _refuse(reason: RejectReason, detail: str) -> SubmitReply:
    return SubmitReply(accepted=False, reason=reason, detail=detail)
