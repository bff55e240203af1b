"""The leader's scheduler: continuous batching over paged KV, in micro-batches that keep all stages of a pipeline busy.

Pure: the runtime calls in what happened and carries out what comes back (steps, pulls, token log entries). A
sequence's life is the table in `sequence.py`. It gets all blocks for the tokens that it has when it is admitted, and
one more at a time as it grows; where none is left, the youngest gives up its KV, and computes it again later.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter, deque

import msgspec

from engine.core.arranger import KvMove, choose_kv_moves
from engine.core.block_tables import BlockTables
from engine.core.frames import shortened
from engine.core.prefix_index import ROOT, Prefix
from engine.core.scheduler_types import (
    CostEstimate,
    Counts,
    OutEntry,
    PullOrder,
    SchedulerLimits,
    Step,
    StepExtras,
    StepSlice,
)
from engine.core.sequence import Event, Sequence, SequenceKey, State, invalid_field
from engine.errors import ProtocolError
from engine.protocol import (
    DEADLINE_PASSED,
    FinishReason,
    GenerateRequest,
    Interruption,
    KvHolder,
    KvSource,
    RejectReason,
    SubmitReply,
    TokenEntry,
    TokenLogprobs,
)

__all__ = [
    "CostEstimate",
    "Counts",
    "OutEntry",
    "PullOrder",
    "Scheduler",
    "SchedulerLimits",
    "SequenceKey",
    "Step",
    "StepExtras",
    "StepSlice",
]

WAITING_PER_SLOT = 4
ENDED_KEPT = 512
ENDED_KEPT_S = 120.0
STORY_EVENTS = 64
SCORED_ROWS = 64
"""Prompt rows of one step for which all logits go to the leader."""
NO_EXTRAS = StepExtras()


class Scheduler:
    """Calls must come with times that do not go back. `cost` may be replaced by newer figures at any time."""

    def __init__(self, limits: SchedulerLimits, cost: CostEstimate, pipeline: str) -> None:
        self.limits = limits
        self.cost = cost
        self.pipeline = pipeline
        self._tables = BlockTables(limits)
        # Waiting, pulling, running or parked.
        self._sequences: dict[SequenceKey, Sequence] = {}
        # Waiting, by priority.
        self._waiting: list[Sequence] = []
        # Running, with tokens to feed; in the order in which they came back.
        self._ready: dict[SequenceKey, Sequence] = {}
        self._retiring: dict[SequenceKey, Sequence] = {}
        # Retiring or finished, kept for `resend`; the oldest first.
        self._ended: dict[SequenceKey, Sequence] = {}
        self._steps: dict[int, list[tuple[StepSlice, Sequence]]] = {}
        self._outbox: list[OutEntry] = []
        self._num_submitted = 0
        self._num_steps = 0
        self._draining = False
        self._now_s = 0.0
        self._story: deque[tuple[object, ...]] = deque(maxlen=STORY_EVENTS)

    # --- Requests ---------------------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest, now_s: float) -> SubmitReply:
        """Take a sequence in, or say why not. The same attempt again is accepted and changes nothing.

        A higher attempt replaces the older one, which ends without an entry. A resume that is complete already
        ends at once; its entry comes out of the next `tick`.
        """
        self._now_s = now_s
        key = SequenceKey(request.request_id, request.choice)
        known = self._sequences.get(key) or self._ended.get(key)
        if known is not None and request.attempt == known.request.attempt:
            return SubmitReply(accepted=True)
        if known is not None and request.attempt < known.request.attempt:
            return _refuse(RejectReason.INVALID, f"attempt: stale attempt, {known.request.attempt} is known")
        # Interrupted sequences were admitted once and their clients are in mid-stream: they go before new ones.
        is_new = not request.committed_ids and request.kv_source is None
        sequence = Sequence(request, (int(is_new), self._num_submitted), now_s)
        sequence.finish = sequence.finish_reason(self.limits.max_model_len)
        refusal = self._refusal(sequence)
        if refusal is not None:
            return refusal
        self._num_submitted += 1
        self._tell("submit", key, request.attempt)
        self._forget(key)
        self._sequences[key] = sequence
        self._queue(sequence)
        if sequence.finish is not None:
            self._outbox.append(self._end(sequence))
        return SubmitReply(accepted=True)

    def cancel(self, request_id: str, now_s: float, attempt: int | None = None) -> list[OutEntry]:
        """End all choices of a request, or those that run as `attempt` or an older one.

        Parked ones belong to another pipeline now and end without an entry.
        """
        self._now_s = now_s
        out = []
        for sequence in [s for s in self._sequences.values() if s.key.request_id == request_id]:
            if attempt is not None and sequence.request.attempt > attempt:
                continue
            parked = sequence.state is State.PARKED
            if not parked:
                sequence.finish = FinishReason.CANCELLED
            entry = self._end(sequence)
            if not parked:
                out.append(entry)
        return out

    def drain(self) -> None:
        """Take no new requests any more; those that are here go on."""
        self._draining = True

    def resend(self, request_id: str, choice: int, from_index: int) -> TokenEntry | None:
        """What is known of a live, parked or lately ended sequence from `from_index` on; None if nothing is.

        As much of it as fits into a message.
        """
        key = SequenceKey(request_id, choice)
        sequence = self._sequences.get(key) or self._ended.get(key)
        if sequence is None or not sequence.num_without_logprobs <= from_index <= sequence.num_committed:
            return None
        return shortened(sequence.entry(from_index))

    # --- Steps ------------------------------------------------------------------------------------------------

    def tick(self, now_s: float) -> tuple[list[PullOrder], list[OutEntry]]:
        """Drop what is past its deadline and admit what fits. Due after each call that frees or adds something."""
        self._now_s = now_s
        for sequence in list(self._sequences.values()):
            deadline_s = sequence.request.deadline_s
            if deadline_s is not None and deadline_s <= now_s and sequence.state is not State.PARKED:
                sequence.finish, sequence.error = FinishReason.ERROR, DEADLINE_PASSED
                self._outbox.append(self._end(sequence))
        self._prune_ended()
        out, self._outbox = self._outbox, []
        return self._admit(), out

    def schedule(self, now_s: float) -> Step | None:
        """The next micro-batch, or None if nothing can run now or all stages have their step.

        Decodes go first, then prefill chunks, up to `max_step_tokens` rows. Running sequences are spread evenly
        over the micro-batches: a step takes its share of those that are ready, so that the other stages get theirs.
        The chunks of one prompt follow each other through the stages: none waits for the one before to return.
        """
        self._now_s = now_s
        num_free_steps = self.limits.num_micro_batches - len(self._steps)
        if not num_free_steps or not self._ready:
            return None
        in_flight: list[tuple[StepSlice, Sequence]] = []
        num_rows_left = self.limits.max_step_tokens
        num_slices_left = self._share(num_free_steps)
        for sequence in self._by_urgency():
            if not num_rows_left or not num_slices_left:
                break
            most_rows = min(num_rows_left, SCORED_ROWS) if sequence.scores_prompt else num_rows_left
            num_rows = min(most_rows, sequence.num_to_feed)
            # One that was evicted for another in this loop is not ready any more.
            if sequence.key in self._ready and self._grow(sequence, sequence.num_fed + num_rows):
                in_flight.append((self._slice(sequence, num_rows), sequence))
                self._feed(sequence, num_rows)
                num_rows_left -= num_rows
                num_slices_left -= 1
        if not in_flight:
            return None
        self._num_steps += 1
        self._steps[self._num_steps] = in_flight
        self._tell("schedule", self._num_steps, *(s.key for _, s in in_flight))
        return Step(self._num_steps, [slice_ for slice_, _ in in_flight])

    def commit(self, step_id: int, sampled: list[int], now_s: float, extras: StepExtras = NO_EXTRAS) -> list[OutEntry]:
        """A step has run: one sampled id for each slice with `samples`, in order.

        Raises ProtocolError, with no change, for a step that is not in flight, a wrong number of ids, or a step that
        returns before an earlier chunk of one of its prompts.
        """
        self._now_s = now_s
        if step_id not in self._steps:
            raise ProtocolError(f"pipeline {self.pipeline}: step {step_id} is not in flight")
        num_samples = sum(slice_.samples for slice_, _ in self._steps[step_id])
        if len(sampled) != num_samples:
            raise ProtocolError(f"step {step_id} samples {num_samples} tokens, not {len(sampled)}")
        for slice_, sequence in self._steps[step_id]:
            if slice_.context_tokens != sequence.num_computed:
                raise ProtocolError(f"step {step_id} has overtaken an earlier one of {sequence.key}")
        self._tell("commit", step_id, sampled)
        ids = iter(sampled)
        out = []
        for slice_, sequence in self._steps.pop(step_id):
            token_id = next(ids) if slice_.samples else None
            sequence.num_computed += len(slice_.token_ids)
            if self._came_back(sequence):
                self._tables.index(sequence)
                if slice_.num_logits and sequence.scores_prompt:
                    sequence.prompt_logprobs += extras.prompt_logprobs.get(sequence.key, [])
                if sequence.key in extras.errors:
                    sequence.finish, sequence.error = FinishReason.ERROR, extras.errors[sequence.key]
                    out.append(self._end(sequence))
                elif token_id is not None:
                    out.append(self._append(sequence, token_id, extras.logprobs.get(sequence.key)))
        return out

    def pull_done(self, key: SequenceKey, ok: bool, pull_s: float, now_s: float) -> None:
        """The pull ordered for `key` has ended, in `pull_s`; if not `ok`, all its KV is computed again.

        Raises ProtocolError if none is in flight.
        """
        self._now_s = now_s
        self._tell("pull_done", key, ok)
        retiring = self._retiring.get(key)
        if retiring is not None and not retiring.num_steps:
            self._retire(retiring)
            return
        sequence = self._sequences.get(key)
        if sequence is None or sequence.state is not State.PULLING or sequence.kv_source is None:
            raise ProtocolError(f"pipeline {self.pipeline}: no pull in flight for {key}")
        sequence.apply(Event.PULLED)
        sequence.pull_s += pull_s
        if ok:
            sequence.pulled_tokens = sequence.num_computed = sequence.num_fed = sequence.kv_source.num_tokens
            self._tables.index(sequence)
        sequence.kv_source = None
        self._ready[key] = sequence

    # --- Interruption -----------------------------------------------------------------------------------------

    def park(self, reason: str, holders: list[KvHolder], deadline_s: float | None) -> list[OutEntry]:
        """Interrupt every live sequence; nothing is taken after this. `holders` hold this pipeline's KV until
        `deadline_s`; none means that it is lost.

        Sequences with KV keep it, parked until `release`; the others name the KV that they came with, if they
        have not pulled it yet. Raises ProtocolError while a step is in flight: commit it first.
        """
        if self._steps:
            raise ProtocolError(f"pipeline {self.pipeline}: steps {list(self._steps)} are in flight")
        self._draining = True
        live = [s for s in self._sequences.values() if s.state is not State.PARKED]
        return [self._interrupt(sequence, reason, holders, deadline_s) for sequence in live]

    def release(self, request_id: str, choice: int) -> None:
        """Parked KV was taken over or is not wanted; anything else of that name is left alone."""
        sequence = self._sequences.get(SequenceKey(request_id, choice))
        if sequence is not None and sequence.state is State.PARKED:
            self._end(sequence)

    # --- Observation ------------------------------------------------------------------------------------------

    def counts(self) -> Counts:
        num_parked = sum(s.state is State.PARKED for s in self._sequences.values())
        num_live = len(self._sequences) - num_parked
        num_free = max(0, self.limits.max_batch - num_live - len(self._retiring))
        return Counts(
            running=num_live - len(self._waiting),
            waiting=len(self._waiting),
            parked=num_parked,
            free_slots=0 if self._draining else num_free,
            free_kv_blocks=self._tables.pool.num_free,
            total_kv_blocks=self._tables.pool.num_blocks,
            cached_kv_blocks=self._tables.pool.num_cached,
            steps_in_flight=len(self._steps),
        )

    def next_deadline_s(self) -> float | None:
        """When `tick` is due at the latest, for the sequence whose deadline comes first."""
        live = (s.request.deadline_s for s in self._sequences.values() if s.state is not State.PARKED)
        return min((deadline_s for deadline_s in live if deadline_s is not None), default=None)

    def check_invariants(self) -> None:
        """Raises AssertionError, with the last events, for a leaked, wrongly shared or twice freed block or a
        sequence whose state, blocks and queues do not agree. Walks the whole pool: for tests and idle times.
        """
        try:
            self._tables.check_invariants(self._owners())
            self._check_queues()
            for sequence in self._owners():
                self._check_sequence(sequence)
        except AssertionError as error:
            raise AssertionError("\n".join(map(str, [error, "the last events:", *self._story]))) from None

    def _check_queues(self) -> None:
        in_flight = [s for step in self._steps.values() for _, s in step]
        num_steps = Counter(id(s) for s in in_flight)
        assert all(num_steps[id(s)] == s.num_steps for s in self._owners()), "a step does not know its sequence"
        assert len(self._steps) <= self.limits.num_micro_batches, "too many steps in flight"
        assert self._num_slots_taken() <= self.limits.max_batch, "too many sequences with blocks"
        assert self._waiting == sorted(self._waiting, key=lambda s: s.priority), "waiting out of order"
        states = [(k, s.state) for k, s in self._sequences.items()]
        assert {s.key for s in self._waiting} == {k for k, v in states if v is State.WAITING}, "waiting"
        assert all(s.state is State.RETIRING for s in self._retiring.values()), "retiring"
        assert set(self._ready) == {
            s.key for s in self._sequences.values() if s.state is State.RUNNING and s.num_to_feed
        }, "ready"

    def _check_sequence(self, s: Sequence) -> None:
        what = f"{s.key} ({s.state}, {s.num_computed}, {s.num_fed} of {len(s.tokens)} tokens, {s.num_steps} steps): "
        assert not s.num_steps or s.state in (State.RUNNING, State.RETIRING), what + "in a step"
        slices = [slice_ for step in self._steps.values() for slice_, other in step if other is s]
        assert s.num_fed == s.num_computed + sum(len(slice_.token_ids) for slice_ in slices), what + "fed"
        assert s.num_fed <= len(s.tokens), what + "fed what it does not have"
        assert bool(s.blocks) == (s.state is not State.WAITING), what + f"blocks {s.blocks}"
        assert s.num_computed < len(s.tokens), what + "nothing to feed"
        if s.state in (State.WAITING, State.PULLING):
            assert not s.num_computed, what + "KV that it cannot have"
        if s.state is State.PARKED:
            assert s.num_computed, what + "parked without KV"

    # --- Admission --------------------------------------------------------------------------------------------

    def _refusal(self, sequence: Sequence) -> SubmitReply | None:
        limits, request = self.limits, sequence.request
        if self._draining:
            return _refuse(RejectReason.DRAINING, f"pipeline {self.pipeline} takes no new requests")
        problem = invalid_field(request, limits.vocab_size)
        if problem is not None:
            return _refuse(RejectReason.INVALID, problem)
        if sequence.finish is not None:
            return None
        num_prompt = len(request.prompt_ids)
        if num_prompt >= limits.max_model_len:
            return _refuse(
                RejectReason.TOO_LONG, f"prompt_ids: {num_prompt} of at most {limits.max_model_len - 1} tokens"
            )
        # Alone in the pool it must be able to come to its end; the last token is never fed.
        num_tokens = min(num_prompt + max(request.sampling.max_tokens, 1), limits.max_model_len) - 1
        if self._tables.pool.blocks_for(num_tokens) > limits.num_blocks:
            room = limits.num_blocks * limits.block_tokens
            return _refuse(RejectReason.TOO_LONG, f"KV of {num_tokens} tokens; the pool holds {room}")
        replaces = SequenceKey(request.request_id, request.choice) in self._sequences
        if len(self._waiting) - replaces >= WAITING_PER_SLOT * limits.max_batch:
            return _refuse(RejectReason.FULL, f"{len(self._waiting)} sequences are waiting")
        return None

    def _admit(self) -> list[PullOrder]:
        orders = []
        num_slots_taken = self._num_slots_taken()
        # First come, first served: nobody overtakes one that does not fit yet.
        for sequence in list(self._waiting):
            # Its predecessor's step or pull would be taken for its own.
            if sequence.key in self._retiring:
                continue
            if num_slots_taken >= self.limits.max_batch:
                break
            prefix = self._tables.reusable(sequence)
            source = self._worth_pulling(sequence, len(prefix.blocks) * self.limits.block_tokens)
            if source is not None:
                prefix = Prefix(ROOT, [])  # What is pulled is written, and must not be shared.
            # One block to spare for each one that grows, or it would soon evict what is admitted here.
            if not self._tables.open(sequence, prefix, num_spare=num_slots_taken):
                break
            num_slots_taken += 1
            self._waiting.remove(sequence)
            order = self._start(sequence, source)
            if order is not None:
                orders.append(order)
        return orders

    def _start(self, sequence: Sequence, source: KvSource | None) -> PullOrder | None:
        sequence.kv_source = source
        self._tell("admit", sequence.key, sequence.num_computed, "recompute" if source is None else source.num_tokens)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(sequence.reused_tokens, len(sequence.request.prompt_ids))
        if sequence.scores_prompt:
            sequence.prompt_logprobs = [None]
        if source is None:
            sequence.apply(Event.START)
            self._ready[sequence.key] = sequence
            return None
        sequence.apply(Event.ORDER_PULL)
        return PullOrder(sequence.key, source, self._tables.covering(sequence, source.num_tokens))

    def _worth_pulling(self, sequence: Sequence, num_reusable: int) -> KvSource | None:
        """The part of its KV source that is worth pulling: at least the last token must be fed, for its logits."""
        source, cost = sequence.kv_source, self.cost
        if source is None or sequence.scores_prompt:  # KV does not give the logits of the prompt.
            return None
        num_tokens = min(source.num_tokens, len(sequence.tokens) - 1)
        moving = choose_kv_moves(
            [KvMove(sequence.key, num_tokens - num_reusable, num_tokens * cost.kv_bytes_per_token)],
            cost.transfer_bytes_per_s,
            cost.prefill_s_per_token,
            math.inf if source.deadline_s is None else source.deadline_s - self._now_s,
            latency_s=cost.transfer_latency_s,
            link_busy_s=self._pulls_s(),
            prefill_busy_s=self._prefills_s(),
        )
        return msgspec.structs.replace(source, num_tokens=num_tokens) if moving else None

    def _pulls_s(self) -> float:
        sources = (s.kv_source for s in self._sequences.values() if s.state is State.PULLING)
        return sum(self.cost.pull_s(source.num_tokens) for source in sources if source is not None)

    def _prefills_s(self) -> float:
        running = (s.num_to_feed for s in self._sequences.values() if s.state is State.RUNNING)
        num_tokens = sum(num_to_feed for num_to_feed in running if num_to_feed > 1)
        return num_tokens * self.cost.prefill_s_per_token if num_tokens else 0.0

    def _queue(self, sequence: Sequence) -> None:
        bisect.insort(self._waiting, sequence, key=lambda s: s.priority)

    # --- Steps ------------------------------------------------------------------------------------------------

    def _share(self, num_free_steps: int) -> int:
        # The first bound fills the steps that are free now; the second keeps one micro-batch from swallowing
        # all newcomers for good, since only its members are ready when it returns.
        in_flight = {s.key for step in self._steps.values() for _, s in step}
        num_running = len(in_flight | self._ready.keys())
        return min(-(-len(self._ready) // num_free_steps), -(-num_running // self.limits.num_micro_batches))

    def _by_urgency(self) -> list[Sequence]:
        """Decodes in the order in which they came back, then prefills by priority."""
        decodes = [s for s in self._ready.values() if s.num_to_feed == 1]
        prefills = [s for s in self._ready.values() if s.num_to_feed > 1]
        return decodes + sorted(prefills, key=lambda s: s.priority)

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make its block table cover `num_tokens`; False if it must wait, since all others have precedence."""
        while not self._tables.extend(sequence, num_tokens):
            # Those in a step come back; never evicting an older one for a younger makes sure that it ends.
            at_rest = [s for s in self._ready.values() if not s.num_steps or s is sequence]
            youngest = max(at_rest, key=lambda s: s.priority)
            if youngest is sequence:
                return False
            self._evict(youngest)
        return True

    def _evict(self, sequence: Sequence) -> None:
        sequence.apply(Event.EVICT)
        self._tell("evict", sequence.key)
        del self._ready[sequence.key]
        self._tables.close(sequence)
        sequence.num_computed = sequence.num_fed = sequence.pulled_tokens = sequence.reused_tokens = 0
        self._queue(sequence)

    def _slice(self, sequence: Sequence, num_rows: int) -> StepSlice:
        first, last = sequence.num_fed, sequence.num_fed + num_rows
        return StepSlice(
            key=sequence.key,
            token_ids=sequence.tokens[first:last],
            context_tokens=first,
            blocks=self._tables.covering(sequence, last),
            samples=last == len(sequence.tokens),
            num_logits=num_rows if sequence.scores_prompt else int(last == len(sequence.tokens)),
            sampling=sequence.request.sampling,
            tokens=sequence.tokens,
            num_prompt_tokens=len(sequence.request.prompt_ids),
        )

    def _feed(self, sequence: Sequence, num_rows: int) -> None:
        sequence.num_fed += num_rows
        sequence.num_steps += 1
        if not sequence.num_to_feed:
            del self._ready[sequence.key]

    def _came_back(self, sequence: Sequence) -> bool:
        """Take it out of a step; whether it is still wanted."""
        sequence.num_steps -= 1
        if sequence.state is State.RETIRING and not sequence.num_steps:
            self._retire(sequence)
        return sequence.state is State.RUNNING

    def _append(self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> OutEntry:
        index = sequence.num_committed
        if sequence.request.sampling.max_tokens:
            sequence.tokens.append(token_id)
            if logprobs is not None:
                sequence.logprobs.append(logprobs)
            sequence.finish = sequence.finish_reason(self.limits.max_model_len)
        else:
            sequence.finish = FinishReason.LENGTH  # The prompt was to be scored, and nothing more.
        resume = sequence.resume_stats(self._now_s) if sequence.resumes else None
        sequence.resumes = False
        if sequence.finish is not None:
            self._end(sequence)
        else:
            self._ready[sequence.key] = sequence
        return OutEntry(sequence.request.gateway, sequence.entry(index, resume))

    # --- Ends -------------------------------------------------------------------------------------------------

    def _end(self, sequence: Sequence) -> OutEntry:
        """Take it out of service; its blocks stay while a step or a pull may still write into them."""
        self._tell("end", sequence.key, sequence.finish or sequence.interruption)
        del self._sequences[sequence.key]
        self._ready.pop(sequence.key, None)
        if sequence.state is State.WAITING:
            self._waiting.remove(sequence)
        if sequence.state is State.PULLING or sequence.num_steps:
            sequence.apply(Event.RETIRE)
            self._retiring[sequence.key] = sequence
        else:
            sequence.apply(Event.END)
            self._tables.close(sequence)
        sequence.ended_s = self._now_s
        self._ended[sequence.key] = sequence
        return OutEntry(sequence.request.gateway, sequence.entry(sequence.num_committed))

    def _interrupt(
        self, sequence: Sequence, reason: str, holders: list[KvHolder], deadline_s: float | None
    ) -> OutEntry:
        num_tokens = sequence.num_computed if holders else 0
        if not num_tokens:
            sequence.interruption = Interruption(reason=reason, kv_source=sequence.kv_source)
            return self._end(sequence)
        sequence.apply(Event.PARK)
        self._tell("park", sequence.key, num_tokens)
        del self._ready[sequence.key]
        source = KvSource(
            pipeline=self.pipeline,
            num_tokens=num_tokens,
            holders=holders,
            blocks=self._tables.covering(sequence, num_tokens),
            deadline_s=deadline_s,
        )
        sequence.interruption = Interruption(reason=reason, kv_source=source)
        return OutEntry(sequence.request.gateway, sequence.entry(sequence.num_committed))

    def _forget(self, key: SequenceKey) -> None:
        """A newer attempt takes the place of whatever was known under this key."""
        sequence = self._sequences.get(key)
        if sequence is not None:
            self._end(sequence)
        self._ended.pop(key, None)

    def _retire(self, sequence: Sequence) -> None:
        del self._retiring[sequence.key]
        sequence.apply(Event.END)
        self._tables.close(sequence)

    def _prune_ended(self) -> None:
        while self._ended:
            key, oldest = next(iter(self._ended.items()))
            if len(self._ended) <= ENDED_KEPT and self._now_s - oldest.ended_s < ENDED_KEPT_S:
                break
            del self._ended[key]

    def _num_slots_taken(self) -> int:
        num_parked = sum(s.state is State.PARKED for s in self._sequences.values())
        return len(self._sequences) - len(self._waiting) - num_parked + len(self._retiring)

    def _owners(self) -> list[Sequence]:
        return [*self._sequences.values(), *self._retiring.values()]

    def _tell(self, event: str, *details: object) -> None:
        self._story.append((self._now_s, event, *details))


def _refuse(reason: RejectReason, detail: str) -> SubmitReply:
    return SubmitReply(accepted=False, reason=reason, detail=detail)
