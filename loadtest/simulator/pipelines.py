"""A pipeline with continuous batching in virtual time, as the engine's scheduler runs it.

Like the engine: first come first served among interrupted, then new sequences; all KV blocks of the tokens known at
admission and one more at a time afterwards; the youngest is evicted when none is left; prompts are prefilled in chunks
beside the decoding sequences; it stops at a token boundary only. Simpler than the engine: the micro-batches of all
stages make one round, in which every decoding sequence gets one token, so a sequence that is admitted waits for the
end of the round rather than for a free micro-batch; blocks are counted, not numbered.

Rounds without prefill are run many at once, until something can change: the next finish, arrival, stop or lack of
blocks. A token's time is the same as if they had been run one by one.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from engine.core.arranger import steps_before_stop
from loadtest.simulator.clock import Clock, Timer
from loadtest.simulator.scenario import Request

MAX_STEP_TOKENS: Final = 256
"""Rows of one micro-batch: the engine's default."""
ROUNDING: Final = 1e-9
"""Steps; times are sums and multiples of steps, with a float's errors."""


class StepTimes(Protocol):
    """Step times of one shape."""

    def step_s(self, num_decoding: int, prefill_tokens: int, context_tokens: float) -> float: ...


class Pull(Protocol):
    """KV that another pipeline still holds for one sequence."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def instances(self) -> frozenset[str]: ...

    def start(self, target: str, num_tokens: int, now_s: float) -> float | None:
        """Pull `num_tokens` to the pipeline `target`: when it is done, None if that is not sooner than to compute."""


@dataclass(slots=True, eq=False)
class Change:
    """One change of the fleet and what it costs; sequences that it interrupts add to it."""

    at_s: float
    cause: str
    moved_bytes: int = 0
    tokens_recomputed: int = 0
    pause_s: float = 0.0


@dataclass(slots=True, eq=False)
class Interruption:
    """One pipeline's stop, until the first of its sequences goes on."""

    change: Change
    stopped_s: float
    resumed_s: float | None = None

    def note_token(self, at_s: float) -> None:
        if self.resumed_s is None:
            self.resumed_s = at_s
            self.change.pause_s = max(self.change.pause_s, at_s - self.stopped_s)


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way; it outlives the pipelines that run it."""

    request: Request
    is_new: bool = True
    """It came to its pipeline without tokens of an earlier one."""
    tokens: int = 0
    """Committed output tokens."""
    computed: int = 0
    """Tokens, prompt first, whose KV its pipeline holds."""
    first_token_s: float | None = None
    last_token_s: float = 0.0
    longest_gap_s: float = 0.0
    tokens_recomputed: int = 0
    pull: Pull | None = None
    interruption: Interruption | None = None
    """It has had no token since."""
    heir_of: str | None = None
    """The pipeline that had it before."""

    @property
    def num_tokens(self) -> int:
        return self.request.prompt_tokens + self.tokens

    @property
    def num_to_feed(self) -> int:
        return self.request.prompt_tokens + self.tokens - self.computed

    @property
    def is_done(self) -> bool:
        return self.tokens >= self.request.output_tokens

    @property
    def priority(self) -> tuple[bool, float, int]:
        return self.is_new, self.request.arrival_s, self.request.id

    def lose_kv(self) -> None:
        """What had been computed must be computed again."""
        self._note_recomputed(self.computed)
        self.computed = 0

    def pulled(self, num_tokens: int) -> None:
        """Of the KV that it could pull, so many tokens have come; the others are computed again."""
        if self.pull is not None:
            self._note_recomputed(self.pull.num_tokens - num_tokens)
            self.computed, self.pull = num_tokens, None

    def restart(self) -> None:
        """From scratch, for a client that sends the request again: the tokens that it had are gone too."""
        self.pulled(0)
        self.lose_kv()
        self.tokens, self.first_token_s = 0, None

    def interrupt(self, interruption: Interruption, heir_of: str | None = None) -> None:
        """Its pipeline has stopped."""
        self.interruption, self.heir_of = interruption, heir_of

    def _note_recomputed(self, num_tokens: int) -> None:
        self.tokens_recomputed += num_tokens
        if self.interruption is not None:  # else it was evicted for others
            self.interruption.change.tokens_recomputed += num_tokens

    def commit(self, num_tokens: int, first_s: float, step_s: float) -> None:
        """`num_tokens` more, the first at `first_s`, then one each `step_s`."""
        if self.first_token_s is None:
            self.first_token_s = first_s
        else:
            self.longest_gap_s = max(self.longest_gap_s, first_s - self.last_token_s)
        if self.interruption is not None:
            self.interruption.note_token(first_s)
            self.interruption = None
        if num_tokens > 1:
            self.longest_gap_s = max(self.longest_gap_s, step_s)
        self.tokens += num_tokens
        assert self.tokens <= self.request.output_tokens, f"request {self.request.id} has a token too many"
        self.last_token_s = first_s + (num_tokens - 1) * step_s


@dataclass(frozen=True, slots=True)
class Limits:
    max_batch: int
    num_kv_blocks: int
    block_tokens: int
    num_stages: int = 1
    max_step_tokens: int = MAX_STEP_TOKENS

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)


@dataclass(slots=True)
class _Round:
    """`num_steps` equal steps; more than one only without prefill."""

    start_s: float
    step_s: float
    num_steps: int
    decoding: list[Sequence]
    prefilling: list[tuple[Sequence, int]]
    """And the rows of each."""

    @property
    def end_s(self) -> float:
        return self.start_s + self.num_steps * self.step_s

    def num_begun(self, now_s: float) -> int:
        return min(self.num_steps, max(1, math.ceil((now_s - self.start_s) / self.step_s - ROUNDING)))

    def num_ended(self, now_s: float) -> int:
        return min(self.num_steps, math.floor((now_s - self.start_s) / self.step_s + ROUNDING))


@dataclass(slots=True)
class _Stop:
    """It was arranged: engine.core.arranger says how long it goes on."""

    deadline_s: float | None
    migration_s: float
    margin_s: float
    then: Callable[[list[Sequence]], None]


@dataclass(slots=True)
class Pipeline:
    """`on_done(sequence)` for each that has all its tokens; `on_change()` when it may have room again."""

    clock: Clock
    id: str
    times: StepTimes
    limits: Limits
    on_done: Callable[[Sequence], None]
    on_change: Callable[[], None]
    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)
    pulling: list[Sequence] = field(default_factory=list)
    takes_requests: bool = True
    num_blocks_used: int = 0
    _round: _Round | None = None
    _timer: Timer | None = None
    _stop: _Stop | None = None
    _ended: bool = False

    # --- Requests ---

    @property
    def num_free_slots(self) -> int:
        if not self.takes_requests:
            return 0
        return max(0, self.limits.max_batch - len(self.running) - len(self.pulling) - len(self.waiting))

    def can_hold(self, request: Request) -> bool:
        """Alone in the pool it would come to its end."""
        num_tokens = request.prompt_tokens + request.output_tokens - 1
        return self.limits.blocks_for(num_tokens) <= self.limits.num_kv_blocks

    def kv_tokens(self) -> int:
        """Tokens of live sequences whose KV it holds now."""
        num_grown = 0
        if self._round is not None:
            num_grown = len(self._round.decoding) * self._round.num_ended(self.clock.now_s)
        return sum(s.computed for s in self.running) + num_grown

    def submit(self, sequence: Sequence) -> None:
        assert self.takes_requests, f"{self.id} takes no requests any more"
        assert self.can_hold(sequence.request), f"request {sequence.request.id} is longer than the KV of {self.id}"
        sequence.is_new = sequence.tokens == 0 and sequence.pull is None
        bisect.insort(self.waiting, sequence, key=lambda s: s.priority)
        if len(self.running) + len(self.pulling) < self.limits.max_batch:
            self._wake()

    # --- Interruption ---

    def stop(
        self, deadline_s: float | None, migration_s: float, margin_s: float, then: Callable[[list[Sequence]], None]
    ) -> None:
        """Stop at a token boundary, as late as the deadline allows; without a deadline at the next one.

        `then` gets all its sequences: those that have `computed` tokens have their KV here.
        """
        assert not self._ended, f"{self.id} has ended"
        self.takes_requests = False
        self._stop = _Stop(deadline_s, migration_s, margin_s, then)
        if self._round is None:
            self._next_round()
        else:
            begun = self._round.num_begun(self.clock.now_s)
            begun_end_s = self._round.start_s + begun * self._round.step_s
            self._cut(begun + min(self._round.num_steps - begun, self._steps_left(begun_end_s, self._round.step_s)))

    def kill(self) -> list[Sequence]:
        """It lost a rank: steps that have ended count. Returns all its sequences; the caller says what becomes of
        their KV.
        """
        assert not self._ended, f"{self.id} has ended"
        if self._round is not None:
            num_ended = self._round.num_ended(self.clock.now_s)
            if num_ended:
                self._round.num_steps = num_ended
                self._settle()
        return self._end()

    def fail_pulls(self, instance: str) -> None:
        """Whoever pulls from `instance` computes instead."""
        for sequence in [s for s in self.pulling if s.pull is not None and instance in s.pull.instances]:
            self._pulled(sequence, 0)

    # --- Rounds ---

    def _wake(self) -> None:
        """Something waits: the round is cut at the end of the step in flight."""
        if self._round is None:
            self._next_round()
        else:
            self._cut(self._round.num_begun(self.clock.now_s))

    def _cut(self, num_steps: int) -> None:
        assert self._round is not None, "no round to cut"
        if num_steps < self._round.num_steps and self._timer is not None:
            self._timer.cancel()
            self._round.num_steps = num_steps
            self._timer = self.clock.at(self._round.end_s, self._end_of_round)

    def _end_of_round(self) -> None:
        if self._settle():
            self.on_change()
        if self._round is None:
            self._next_round()

    def _next_round(self) -> None:
        if self._ended:
            return
        self._admit()
        self._make_room()
        decoding = [s for s in self.running if s.request.prompt_tokens + s.tokens - s.computed == 1]
        prefilling = self._chunks(len(decoding)) if len(decoding) < len(self.running) else []
        if not decoding and not prefilling:
            if self._stop is not None:
                self._finish_stop()
            return
        num_steps = 1 if prefilling else min(s.request.output_tokens - s.tokens for s in decoding)
        if num_steps > 1:
            num_steps = self._steps_with_blocks(num_steps)
        context = sum(s.computed for s in decoding) / len(decoding) + num_steps / 2 if decoding else 0.0
        step_s = self.times.step_s(len(decoding), sum(rows for _, rows in prefilling), context)
        num_steps = min(num_steps, self._steps_left(self.clock.now_s, step_s))
        if num_steps == 0:
            self._finish_stop()
            return
        self._round = _Round(self.clock.now_s, step_s, num_steps, decoding, prefilling)
        self._timer = self.clock.at(self._round.end_s, self._end_of_round)

    def _settle(self) -> int:
        """The steps of the round have run. How many sequences that has completed."""
        round_, self._round = self._round, None
        assert round_ is not None, "no round has run"
        if self._timer is not None:
            self._timer.cancel()
        first_s = round_.start_s + round_.step_s
        for sequence in round_.decoding:
            sequence.computed += round_.num_steps
            sequence.commit(round_.num_steps, first_s, round_.step_s)
        for sequence, rows in round_.prefilling:
            sequence.computed += rows
            if sequence.num_to_feed == 0:
                sequence.commit(1, first_s, round_.step_s)
        done = [s for s in self.running if s.tokens >= s.request.output_tokens]
        if done:
            self.running = [s for s in self.running if not s.is_done]
        self._recount()
        for sequence in done:
            self.on_done(sequence)
        return len(done)

    def _chunks(self, num_decoding: int) -> list[tuple[Sequence, int]]:
        rows_left = self.limits.max_step_tokens * self.limits.num_stages - num_decoding
        chunks = []
        for sequence in sorted((s for s in self.running if s.num_to_feed > 1), key=lambda s: s.priority):
            rows = min(rows_left, sequence.num_to_feed)
            if rows > 0:
                chunks.append((sequence, rows))
                rows_left -= rows
        return chunks

    def _steps_left(self, now_s: float, step_s: float) -> int:
        if self._stop is None:
            return 1 << 60
        stop = self._stop
        return steps_before_stop(now_s, stop.deadline_s, stop.migration_s, step_s, stop.margin_s)

    # --- Blocks ---

    def _admit(self) -> None:
        while self.waiting and len(self.running) + len(self.pulling) < self.limits.max_batch:
            sequence = self.waiting[0]
            num_needed = self.limits.blocks_for(sequence.num_tokens)
            num_live = len(self.running) + len(self.pulling)
            if self.num_blocks_used + num_needed + num_live > self.limits.num_kv_blocks:
                return
            del self.waiting[0]
            self._start(sequence)
            self._recount()

    def _start(self, sequence: Sequence) -> None:
        pull = sequence.pull
        num_tokens = min(pull.num_tokens, sequence.num_tokens - 1) if pull is not None else 0
        ready_s = pull.start(self.id, num_tokens, self.clock.now_s) if pull is not None and num_tokens else None
        if ready_s is None:
            sequence.pulled(0)
            self.running.append(sequence)
        else:
            self.pulling.append(sequence)
            self.clock.at(ready_s, lambda: self._pulled(sequence, num_tokens))

    def _pulled(self, sequence: Sequence, num_tokens: int) -> None:
        if sequence not in self.pulling:  # it failed before, or the pipeline has ended
            return
        self.pulling.remove(sequence)
        sequence.pulled(num_tokens)
        self.running.append(sequence)
        self._wake()

    def _make_room(self) -> None:
        """Every decoding sequence can take one step; if need be, the youngest give up their KV."""
        while self._most_growth(1) > self._num_free_blocks < self._growth(1):
            youngest = max(self.running, key=lambda s: s.priority)
            self.running.remove(youngest)
            youngest.lose_kv()
            bisect.insort(self.waiting, youngest, key=lambda s: s.priority)
            self._recount()

    def _steps_with_blocks(self, num_steps: int) -> int:
        num_free = self._num_free_blocks
        if self._most_growth(num_steps) <= num_free or self._growth(num_steps) <= num_free:
            return num_steps
        fits = bisect.bisect_right(range(1, num_steps), num_free, key=self._growth)
        return max(1, fits)

    @property
    def _num_free_blocks(self) -> int:
        return self.limits.num_kv_blocks - self.num_blocks_used

    def _most_growth(self, num_steps: int) -> int:
        """`_growth` is no more: known without a look at every sequence."""
        return len(self.running) * self.limits.blocks_for(num_steps)

    def _growth(self, num_steps: int) -> int:
        """Blocks that decoding sequences need in addition for `num_steps` more steps."""
        blocks_for = self.limits.blocks_for
        return sum(
            blocks_for(s.computed + num_steps) - blocks_for(s.computed) for s in self.running if s.num_to_feed == 1
        )

    def _recount(self) -> None:
        """In prefill the blocks of all tokens known are taken at once, as in the engine."""
        # Spelled out: most of a long simulation is spent in this loop.
        block_tokens, num_blocks = self.limits.block_tokens, 0
        for sequence in self.running:
            num_tokens = sequence.request.prompt_tokens + sequence.tokens
            num_blocks -= -(sequence.computed if num_tokens - sequence.computed == 1 else num_tokens) // block_tokens
        self.num_blocks_used = num_blocks + sum(self.limits.blocks_for(s.num_tokens) for s in self.pulling)
        assert self.num_blocks_used <= self.limits.num_kv_blocks, f"{self.id}: more KV than there is room for"

    # --- Ends ---

    def _finish_stop(self) -> None:
        assert self._stop is not None, "nobody asked it to stop"
        then = self._stop.then
        then(self._end())

    def _end(self) -> list[Sequence]:
        self.takes_requests, self._ended, self._round = False, True, None
        if self._timer is not None:
            self._timer.cancel()
        sequences = sorted([*self.running, *self.pulling, *self.waiting], key=lambda s: s.priority)
        self.running, self.pulling, self.waiting, self.num_blocks_used = [], [], [], 0
        return sequences
