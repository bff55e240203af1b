"""The paper's serving in virtual time: one queue, pipelines that run static batches, engines that stop on a deadline.

As in the artifact: the API server keeps the requests in the order of arrival and sends power-of-two groups of them to
the pipelines; a pipeline runs what it was sent in power-of-two batches, each to its end. A pipeline that was told to
stop decides before each batch how many steps the time that is left has room for.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import msgspec

from loadtest.simulator.clock import Clock
from loadtest.simulator.result import Fate, Outcome
from loadtest.simulator.scenario import Request
from planner.core import paper_mode
from planner.core.paper_mode import PaperConfig
from planner.core.profile import Profile

NOW_S: Final = 1e-9
"""A wait that is shorter is none."""


class BatchTimes:
    """What batches take in pipelines of one shape."""

    def __init__(self, profile: Profile, config: PaperConfig, max_batch: int, *, corrected: bool) -> None:
        """Raises ProfileError if a power of two up to `max_batch` was not measured."""
        self.max_batch = max_batch
        self.shape = config.pipeline, config.tensor
        self._profile = profile
        self._configs = {1 << i: _of_batch(config, 1 << i) for i in range(max_batch.bit_length())}
        self._step_s = {
            num: profile.fix_factor
            * paper_mode.decode_step_ms(profile, *self.shape, num, c.decode_micro_batches)
            / 1000
            for num, c in self._configs.items()
        }
        self._start_s = {
            num: paper_mode.batch_latency_s(
                profile,
                *self.shape,
                num,
                c.prefill_micro_batches,
                c.decode_micro_batches,
                output_tokens=0,
                corrected=corrected,
            )
            for num, c in self._configs.items()
        }

    def step_s(self, num: int) -> float:
        """One token for each of the `num` requests of a batch."""
        return self._step_s[num]

    def prefill_s(self, num: int, prompt_tokens: int) -> float:
        """Until the first decode step, embeddings included; prompts of `prompt_tokens`, padded to the longest."""
        return self._start_s[num] * prompt_tokens / self._profile.prompt_tokens

    def steps_within(self, num: int, slot_s: float, whole: int, *, cautious: bool, is_resumed: bool) -> int:
        """The arranger's S_t: steps of a batch that need `whole` of them; digest, sections 3 and 6."""
        if is_resumed:
            slot_s += self.expected_prefill_s(num, cautious=cautious)
        return paper_mode.steps_within(
            self._profile, self._configs[num], slot_s, conservative=cautious, output_tokens=whole
        )

    def expected_prefill_s(self, num: int, *, cautious: bool = True) -> float:
        """What the arranger takes a prefill for."""
        scale = self._profile.fix_factor if cautious else 1 / self._profile.fix_factor
        micro_batches = self._configs[num].prefill_micro_batches
        return scale * paper_mode.prefill_ms(self._profile, *self.shape, num, micro_batches) / 1000


def _of_batch(config: PaperConfig, num: int) -> PaperConfig:
    """A batch that cannot be cut into as many micro-batches is not cut at all, as in the artifact's engine."""
    return msgspec.structs.replace(
        config,
        batch=num,
        prefill_micro_batches=_micro_batches(config.prefill_micro_batches, num),
        decode_micro_batches=_micro_batches(config.decode_micro_batches, num),
    )


def _micro_batches(wanted: int, num: int) -> int:
    return wanted if num % wanted == 0 else 1


@dataclass(eq=False, slots=True)
class Job:
    """One request on its way. Ordered by arrival."""

    request: Request
    step: int = 0
    """Tokens that are committed: a batch that resumes goes on from here."""
    tokens_made: int = 0
    """The most that any of its runs has made: what a client that reads along has seen."""
    first_token_s: float | None = None
    last_token_s: float = 0.0
    longest_gap_s: float = 0.0
    tokens_recomputed: int = 0
    ended_s: float | None = None
    is_lost: bool = False

    def __lt__(self, other: Job) -> bool:
        return (self.request.arrival_s, self.request.id) < (other.request.arrival_s, other.request.id)

    def restart(self) -> int:
        """Its context is gone; how many tokens it must compute again."""
        again = self.request.prompt_tokens + self.step if self.step else 0
        self.tokens_recomputed += again
        self.step = 0
        return again

    def advance(self, step: int, first_at_s: float, step_s: float) -> None:
        """A run has made the tokens after `self.step` up to `step`, the first of them at `first_at_s`."""
        run_start, self.step = self.step, step
        if step <= self.tokens_made:
            return
        new_at_s = first_at_s + (self.tokens_made - run_start) * step_s
        if self.first_token_s is None:
            self.first_token_s = new_at_s
        else:
            self.longest_gap_s = max(self.longest_gap_s, new_at_s - self.last_token_s)
        if step > self.tokens_made + 1:
            self.longest_gap_s = max(self.longest_gap_s, step_s)
        self.last_token_s = first_at_s + (step - run_start - 1) * step_s
        self.tokens_made = step

    def outcome(self, end_s: float) -> Outcome:
        fate = Fate.LOST if self.is_lost else Fate.UNFINISHED if self.ended_s is None else Fate.COMPLETED
        return Outcome(
            id=self.request.id,
            fate=fate,
            arrival_s=self.request.arrival_s,
            ended_s=max(end_s, self.request.arrival_s) if self.ended_s is None else self.ended_s,
            first_token_s=self.first_token_s,
            prompt_tokens=self.request.prompt_tokens,
            tokens_done=self.tokens_made,
            longest_gap_s=self.longest_gap_s,
            tokens_recomputed=self.tokens_recomputed,
        )


class Stop(msgspec.Struct, frozen=True, kw_only=True):
    """The order to stop by `by_s`."""

    by_s: float
    cautious: bool
    """Before a preemption: rather a step less than one too many. Else (an acquisition) stop right after it."""


@dataclass(eq=False, slots=True)
class StaticPipeline:
    times: BatchTimes
    instances: frozenset[str]
    running: list[Job] = field(default_factory=list)
    resumed: list[Job] = field(default_factory=list)
    """An interrupted batch of another pipeline: this one goes on with it first."""
    sent: list[Job] = field(default_factory=list)
    stop: Stop | None = None
    is_last_batch: bool = False
    stopped_s: float | None = None
    interrupted: list[Job] = field(default_factory=list)
    """The batch that was cut when it stopped."""

    @property
    def num_held(self) -> int:
        return len(self.running) + len(self.resumed) + len(self.sent)


class BatchingRules(msgspec.Struct, frozen=True, kw_only=True):
    pool_batches: int = 2
    """The API server sends a pipeline no more while it holds this many full batches, the running one included."""
    whole_batches: bool = False
    """It sends only to pipelines that hold nothing: the artifact's newer batching."""
    cut_resumed: bool = True
    """A resumed batch can be cut again; not so in the artifact."""


class BatchServer:
    """The API server and its pipelines. `clock` drives it; `on_stopped` hears of each pipeline that has stopped."""

    def __init__(
        self, clock: Clock, requests: Sequence[Request], rules: BatchingRules, on_stopped: Callable[[], None]
    ) -> None:
        self.pipelines: list[StaticPipeline] = []
        self._clock = clock
        self._rules = rules
        self._on_stopped = on_stopped
        self._jobs = [Job(request) for request in requests]
        self._waiting: list[Job] = []
        for job in self._jobs:
            clock.at(job.request.arrival_s, partial(self.requeue, [job]))

    @property
    def num_open(self) -> int:
        """Requests that have not ended, those included that have not come yet."""
        return sum(job.ended_s is None and not job.is_lost for job in self._jobs)

    def outcomes(self, end_s: float) -> tuple[Outcome, ...]:
        return tuple(job.outcome(end_s) for job in self._jobs)

    def start(self, pipeline: StaticPipeline, resumed: Sequence[Job] = ()) -> None:
        """It serves from now on, first the batch that it resumes."""
        pipeline.resumed = list(resumed)
        self.pipelines.append(pipeline)
        self._serve(pipeline)
        self._dispatch()

    def tell_to_stop(self, pipeline: StaticPipeline, stop: Stop) -> None:
        pipeline.stop = stop
        self._serve(pipeline)

    def remove(self, pipeline: StaticPipeline) -> list[Job]:
        """One that has stopped. Returns what it was sent and did not run; `interrupted` stays with it."""
        assert pipeline.stopped_s is not None
        self.pipelines.remove(pipeline)
        unserved, pipeline.sent = pipeline.sent, []
        return unserved

    def requeue(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            insort(self._waiting, job)
        self._dispatch()

    # --- API server ---

    def _dispatch(self) -> None:
        while self._waiting and (pipeline := self._receiver()) is not None:
            num = _power_of_two(min(len(self._waiting), pipeline.times.max_batch))
            for job in self._waiting[:num]:
                insort(pipeline.sent, job)
            del self._waiting[:num]
            self._serve(pipeline)

    def _receiver(self) -> StaticPipeline | None:
        """The one that holds least, the first of equals, if it has room."""
        serving = [p for p in self.pipelines if p.stopped_s is None]
        least = min(serving, key=lambda p: p.num_held, default=None)
        if least is None or least.num_held == 0:
            return least
        limit = 0 if self._rules.whole_batches else self._rules.pool_batches * least.times.max_batch
        return least if least.num_held < limit else None

    # --- Engine of a pipeline ---

    def _serve(self, p: StaticPipeline) -> None:
        """What it does next, if it is free."""
        if p.running or p.stopped_s is not None:
            return
        num = len(p.resumed) or _power_of_two(min(len(p.sent), p.times.max_batch))
        if p.is_last_batch:
            self._stopped(p)
        elif p.stop is not None:
            self._serve_until(p, p.stop, num)
        elif num:
            self._run(p, num)

    def _serve_until(self, p: StaticPipeline, stop: Stop, num: int) -> None:
        left_s = stop.by_s - self._clock.now_s
        idle_s = left_s - p.times.expected_prefill_s(1)
        if not num and idle_s > NOW_S:
            self._clock.at(self._clock.now_s + idle_s, lambda: self._serve(p))
            return
        whole, steps = self._steps(p, stop, num, left_s) if num else (0, 0)
        if whole and steps >= whole:
            self._run(p, num)
        elif steps > 0:
            p.is_last_batch = True
            self._run(p, num, steps)
        else:
            self._stopped(p)

    def _steps(self, p: StaticPipeline, stop: Stop, num: int, left_s: float) -> tuple[int, int]:
        """(that the next batch needs, that there is time for)."""
        batch = p.resumed or p.sent[:num]
        whole = _longest_output(batch) - _step(batch)
        if p.resumed and not self._rules.cut_resumed:
            return whole, whole
        if left_s <= (0.0 if p.resumed else p.times.expected_prefill_s(1)):
            return whole, 0
        is_resumed = bool(p.resumed)
        return whole, p.times.steps_within(num, left_s, whole, cautious=stop.cautious, is_resumed=is_resumed)

    def _run(self, p: StaticPipeline, num: int, steps: int | None = None) -> None:
        """The next batch, all of it or `steps` steps."""
        is_resumed = bool(p.resumed)
        batch, p.resumed = p.resumed or p.sent[:num], []
        if not is_resumed:
            del p.sent[:num]
        first_step = _step(batch)
        last_step = _longest_output(batch) if steps is None else first_step + steps
        step_s = p.times.step_s(len(batch))
        prefill_s = 0.0 if is_resumed else p.times.prefill_s(len(batch), _longest_prompt(batch))
        first_s = self._clock.now_s + prefill_s + step_s
        p.running = batch
        is_whole = steps is None
        ended_s = first_s + (last_step - first_step - 1) * step_s
        self._clock.at(ended_s, lambda: self._ran(p, last_step, first_s, step_s, is_whole=is_whole))

    def _ran(self, p: StaticPipeline, last_step: int, first_s: float, step_s: float, *, is_whole: bool) -> None:
        batch, p.running = p.running, []
        for job in batch:
            job.advance(min(last_step, job.request.output_tokens), first_s, step_s)
            if is_whole:
                job.ended_s = self._clock.now_s
        if not is_whole:
            p.interrupted = batch
        self._serve(p)
        self._dispatch()

    def _stopped(self, p: StaticPipeline) -> None:
        p.stopped_s = self._clock.now_s
        if p.resumed:
            p.interrupted, p.resumed = p.resumed, []
        self._on_stopped()


def _longest_output(batch: Sequence[Job]) -> int:
    return max(job.request.output_tokens for job in batch)


def _longest_prompt(batch: Sequence[Job]) -> int:
    return max(job.request.prompt_tokens for job in batch)


def _step(batch: Sequence[Job]) -> int:
    """All of a batch are at the same step, but for those that had no more to make."""
    return max(job.step for job in batch)


def _power_of_two(num: int) -> int:
    """The largest that is not above `num`; 0 of 0."""
    return 1 << (num.bit_length() - 1) if num else 0
