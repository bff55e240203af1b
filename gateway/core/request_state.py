"""The life of one choice of a request, across preemptions. Pure: `handle(event, now_s)` gives effects.

    queued -> dispatched -> streaming -> finished
      ^           |             |
      +-----------+-------------+   interrupted: back to the front of the queue, attempt + 1, with the tokens so far

The token log is accepted by index: what was seen is dropped, a gap is asked for again, and what another attempt
or another pipeline than the current one says is fenced off.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from engine.protocol import (
    DEADLINE_PASSED,
    FinishReason,
    GenerateRequest,
    KvSource,
    RejectReason,
    ResumeStats,
    SamplingParams,
    TokenEntry,
    TokenLogprobs,
)

SILENCE_S = 1.5
"""Without an entry for so long, ask for what may have been lost."""
ASK_AGAIN_S = 0.5
"""Between two questions while the answers help nothing."""
MAX_BROKEN = 16
"""Pipelines that may break without notice under one request: after these it is suspected of doing it."""
MAX_UNKNOWN = 3
"""Unhelpful answers in a row after which the pipeline has lost the sequence."""


class Phase(StrEnum):
    QUEUED = "queued"
    DISPATCHED = "dispatched"
    STREAMING = "streaming"
    FINISHED = "finished"


class Event(msgspec.Struct, frozen=True):
    """Base of what can happen to a choice."""


class Dispatched(Event, frozen=True):
    """It was taken from the queue for `pipeline`."""

    pipeline: str


class SubmitFailed(Event, frozen=True):
    """The pipeline refused attempt `attempt`, or (`reason` None) did not answer."""

    attempt: int
    reason: RejectReason | None
    detail: str = ""


class EntryArrived(Event, frozen=True):
    pipeline: str
    entry: TokenEntry


class ResendAnswered(Event, frozen=True):
    """Answer to `AskResend`: `responded` False means nobody is there."""

    pipeline: str
    attempt: int
    responded: bool
    entry: TokenEntry | None
    in_plan: bool
    """Whether the plan still counts on the pipeline."""
    noticed: bool = False
    """The pipeline was under notice."""


class PipelineBroken(Event, frozen=True):
    """The plan says that the pipeline is gone with all that it computed."""

    pipeline: str
    reason: str
    noticed: bool = False
    """It was under notice: that is not the request's doing."""


class PipelineRetires(Event, frozen=True):
    """The pipeline will hand its sequences back by itself; after `give_up_s` it is not waited for."""

    pipeline: str
    give_up_s: float


class BusReturned(Event, frozen=True):
    """The connection was gone and is back: nothing may be concluded from the silence."""


class Tick(Event, frozen=True):
    """Time has passed."""


class Effect(msgspec.Struct, frozen=True):
    """Base of what the dispatcher carries out for a choice."""


class Deliver(Effect, frozen=True):
    """New tokens for the client; `finish` is "stop" or "length" with the last ones."""

    ids: list[int]
    finish: str | None
    cached_tokens: int
    logprobs: list[TokenLogprobs] | None = None
    """Of `ids`, if they were asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Once, if they were asked for."""


class Fail(Effect, frozen=True):
    """The choice ends without the rest of its tokens."""

    message: str
    reason: RejectReason | None = None


class TimedOut(Effect, frozen=True):
    """The engine has seen before us that the client's time is over."""


class Requeue(Effect, frozen=True):
    """Back to the front of the queue; prefer the heir of `pipeline`."""

    pipeline: str
    reason: str
    backoff: bool
    """The pipeline refused: not again at once."""


class AskResend(Effect, frozen=True):
    pipeline: str
    from_index: int


class Cancel(Effect, frozen=True):
    """The pipeline need not go on with it: with this attempt and older ones."""

    pipeline: str
    attempt: int


class ReleaseHeld(Effect, frozen=True):
    """The KV that these holders keep for this sequence is not needed any more."""

    source: KvSource


class Resumed(Effect, frozen=True):
    """The first entry after an interruption, with what the resume cost."""

    stats: ResumeStats


class ChoiceState:
    """One choice; `request_id` is its own on the wire, so that it can be cancelled alone."""

    def __init__(
        self,
        request_id: str,
        choice: int,
        prompt_ids: list[int],
        sampling: SamplingParams,
        deadline_s: float,
        max_broken: int = MAX_BROKEN,
    ) -> None:
        """It fails when `max_broken` pipelines have broken under it, without notice."""
        self.request_id = request_id
        self.choice = choice
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.deadline_s = deadline_s
        self.phase = Phase.QUEUED
        self.cancelled = False
        self.attempt = 0
        self.num_broken = 0
        self._max_broken = max_broken
        self.pipeline: str | None = None
        self.last_pipeline: str | None = None
        """Of the attempt before; its heir is the first choice."""
        self.reached_last_pipeline = False
        """The attempt before may still run there."""
        self.token_ids: list[int] = []
        self._has_prompt_logprobs = False
        self._kv_source: KvSource | None = None
        self._to_release: list[KvSource] = []
        self._ask_at_s = 0.0
        self._asking = False
        self._num_unknown = 0
        self._last_entry_s = 0.0
        self._give_up_s: float | None = None

    def generate_request(self, gateway: str) -> GenerateRequest:
        """What the pipeline gets: prompt and committed tokens of the current attempt."""
        return GenerateRequest(
            request_id=self.request_id,
            choice=self.choice,
            attempt=self.attempt,
            gateway=gateway,
            prompt_ids=self.prompt_ids,
            committed_ids=list(self.token_ids),
            sampling=self.sampling,
            kv_source=self._kv_source,
            deadline_s=self.deadline_s,
        )

    @property
    def interrupted(self) -> bool:
        """It had been admitted before: it is not refused for want of room."""
        return self.phase is Phase.QUEUED and self.attempt > 0

    def handle(self, event: Event, now_s: float) -> list[Effect]:  # one line an event
        """Take in `event`; what must be done now, in order."""
        if self.phase is Phase.FINISHED:
            return []
        match event:
            case Dispatched():
                return self._dispatch(event.pipeline, now_s)
            case SubmitFailed():
                return self._submit_failed(event, now_s)
            case EntryArrived():
                return self._entry(event.pipeline, event.entry, now_s)
            case ResendAnswered():
                return self._resend_answered(event, now_s)
            case PipelineBroken() if event.pipeline == self.pipeline:
                return self._broken(event.reason, noticed=event.noticed)
            case PipelineRetires() if event.pipeline == self.pipeline:
                self._give_up_s = event.give_up_s
            case BusReturned():
                self._last_entry_s, self._num_unknown = now_s, 0
                self._ask_at_s = now_s + ASK_AGAIN_S
            case Tick():
                return self._tick(now_s)
            case _:
                pass
        return []

    def cancel(self) -> list[Effect]:
        """Finish now (client gone, stop string, timed out)."""
        if self.phase is Phase.FINISHED:
            return []
        self.cancelled = True
        maybe_running = self.pipeline or (self.last_pipeline if self.reached_last_pipeline else None)
        cancelled: list[Effect] = [Cancel(maybe_running, self.attempt)] if maybe_running else []
        return cancelled + self._end()

    def check_invariants(self) -> None:
        """Raise AssertionError if the state contradicts itself; for tests."""
        assert (self.pipeline is not None) == (self.phase in (Phase.DISPATCHED, Phase.STREAMING))
        assert len(self.token_ids) <= self.sampling.max_tokens
        assert self.attempt >= 0
        assert self._num_unknown < MAX_UNKNOWN

    def _dispatch(self, pipeline: str, now_s: float) -> list[Effect]:
        assert self.phase is Phase.QUEUED, self.phase
        self.phase, self.pipeline = Phase.DISPATCHED, pipeline
        self._asking, self._num_unknown, self._give_up_s = False, 0, None
        self._last_entry_s, self._ask_at_s = now_s, now_s + SILENCE_S
        return []

    def _submit_failed(self, event: SubmitFailed, now_s: float) -> list[Effect]:
        if event.attempt != self.attempt or self.phase is not Phase.DISPATCHED:
            return []
        if event.reason in (RejectReason.INVALID, RejectReason.TOO_LONG):
            return [*self._end(), Fail(event.detail or str(event.reason), event.reason)]
        assert self.pipeline is not None
        pipeline, attempted = self.pipeline, self.attempt
        self._back_to_queue(reached=event.reason is None)
        if event.reason is not None:
            # Refused means not taken in: the same attempt can be offered to another pipeline.
            self.attempt = attempted
        reason = "no answer" if event.reason is None else str(event.reason)
        return [Requeue(pipeline, reason, backoff=True)]

    def _entry(self, pipeline: str, entry: TokenEntry, now_s: float) -> list[Effect]:
        if pipeline != self.pipeline or entry.attempt != self.attempt:
            return []
        self._last_entry_s, self._num_unknown = now_s, 0
        if not self._asking:
            self._ask_at_s = now_s + SILENCE_S
        num_seen = len(self.token_ids)
        if entry.index > num_seen:
            return self._ask(now_s)
        new_ids = entry.ids[num_seen - entry.index :]
        new_logprobs = entry.logprobs[num_seen - entry.index :] if entry.logprobs is not None else None
        prompt_logprobs = None if self._has_prompt_logprobs else entry.prompt_logprobs
        self._has_prompt_logprobs = self._has_prompt_logprobs or entry.prompt_logprobs is not None
        self.token_ids.extend(new_ids)
        effects: list[Effect] = []
        if self.phase is Phase.DISPATCHED and (new_ids or entry.finish):
            self.phase = Phase.STREAMING
            effects += self._release()
            if entry.resume is not None:
                effects.append(Resumed(entry.resume))
        finish = str(entry.finish) if entry.finish in (FinishReason.STOP, FinishReason.LENGTH) else None
        if new_ids or finish is not None:
            effects.append(Deliver(new_ids, finish, entry.cached_tokens, new_logprobs, prompt_logprobs))
        if entry.interruption is not None:
            if entry.interruption.broken:
                return effects + self._broken(entry.interruption.reason, noticed=False)
            return effects + self._interrupt(entry.interruption.reason, entry.interruption.kv_source)
        if finish is not None:
            return effects + self._end()
        if entry.error == DEADLINE_PASSED:
            return [*effects, *self._end(), TimedOut()]
        if entry.finish is not None:
            return [*effects, *self._end(), Fail(entry.error or f"generation ended: {entry.finish}")]
        return effects

    def _ask(self, now_s: float) -> list[Effect]:
        if self._asking or self.pipeline is None:
            return []
        self._asking = True
        return [AskResend(self.pipeline, len(self.token_ids))]

    def _resend_answered(self, event: ResendAnswered, now_s: float) -> list[Effect]:
        if event.pipeline != self.pipeline or event.attempt != self.attempt:
            return []
        self._asking = False
        if event.entry is not None:
            self._ask_at_s = now_s + SILENCE_S
            return self._entry(event.pipeline, event.entry, now_s)
        self._ask_at_s = now_s + ASK_AGAIN_S
        # Silence from a pipeline that the plan counts on proves nothing (its leader may be cut off for a moment);
        # a leader that answers and does not know the sequence has lost it.
        if event.responded or not event.in_plan:
            self._num_unknown += 1
        if self._num_unknown < MAX_UNKNOWN:
            return []
        return self._broken("the pipeline does not know the sequence", noticed=event.noticed)

    def _tick(self, now_s: float) -> list[Effect]:
        if self.pipeline is None:
            return []
        silent = now_s >= self._last_entry_s + SILENCE_S
        if self._give_up_s is not None and now_s >= self._give_up_s and silent:
            return self._interrupt("the retiring pipeline did not hand it back in time", None)
        return self._ask(now_s) if now_s >= self._ask_at_s else []

    def _broken(self, reason: str, *, noticed: bool) -> list[Effect]:
        self.num_broken += not noticed
        if self.num_broken < self._max_broken:
            return self._interrupt(reason, None)
        return [*self._end(), Fail(f"{self.num_broken} pipelines broke while they ran it; the last: {reason}")]

    def _interrupt(self, reason: str, kv_source: KvSource | None) -> list[Effect]:
        assert self.pipeline is not None
        pipeline = self.pipeline
        self._back_to_queue(reached=kv_source is None)
        if kv_source is not None:
            self._to_release.append(kv_source)
        self._kv_source = kv_source
        return [Requeue(pipeline, reason, backoff=False)]

    def _back_to_queue(self, *, reached: bool) -> None:
        self.last_pipeline, self.reached_last_pipeline = self.pipeline, reached
        self.phase, self.pipeline = Phase.QUEUED, None
        self.attempt += 1
        self._asking, self._num_unknown = False, 0

    def _end(self) -> list[Effect]:
        self.phase, self.pipeline = Phase.FINISHED, None
        return self._release()

    def _release(self) -> list[Effect]:
        sources, self._to_release = self._to_release, []
        return [ReleaseHeld(source) for source in sources]
