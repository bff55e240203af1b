"""The gateway in virtual time: requests arrive, wait first come first served, and the gateway's own router sends them.

It keeps every request's account until the end: each one becomes one Outcome.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import Final

from engine.protocol import PipelineState
from gateway.core.arrival_statistics import ArrivalStatistics
from gateway.core.router import Router
from loadtest.errors import SimulationError
from loadtest.simulator.clock import Clock
from loadtest.simulator.pipelines import Change, Interruption, Pipeline, Sequence
from loadtest.simulator.result import Fate, Outcome
from loadtest.simulator.scenario import Request
from planner.protocol import Explanation, LoadReport, ModelShape, Plan
from planner.protocol import Pipeline as Planned

LOAD_WINDOW_S: Final = 30.0
"""Over which the gateway counts arrivals."""


class Service:
    """`requests` ascending in arrival. Raises SimulationError for one that is longer than `max_model_len`."""

    def __init__(self, clock: Clock, requests: Items[Request], max_model_len: int) -> None:
        for request in requests:
            if request.prompt_tokens + request.output_tokens > max_model_len:
                num_tokens = request.prompt_tokens + request.output_tokens
                raise SimulationError(f"request {request.id} has {num_tokens} tokens, the model takes {max_model_len}")
        self.clock = clock
        self.pipelines: dict[str, Pipeline] = {}
        """Those that run, by id; one that stops takes no requests any more."""
        self.num_open = len(requests)
        self._router = Router()
        self._deadlines_s: dict[str, float] = {}
        self._sequences = [Sequence(request) for request in requests]
        self._queue: list[Sequence] = []
        self._next = 0
        self._num_advertised = 0
        self._ended_s: dict[int, float] = {}
        self._arrived: deque[Request] = deque()
        self._statistics = ArrivalStatistics()
        self._finished: deque[tuple[float, int]] = deque()
        self._recall()
        if requests:
            clock.at(requests[0].arrival_s, self._arrive)

    def _recall(self) -> None:
        """The service ran before the trace began: its last 30 s are taken to have been like the first 30 s of it."""
        early = [s.request for s in self._sequences if s.request.arrival_s < LOAD_WINDOW_S]
        for request in reversed(early):
            mirrored = Request(
                id=-1,
                arrival_s=-request.arrival_s,
                prompt_tokens=request.prompt_tokens,
                output_tokens=request.output_tokens,
            )
            self._arrived.append(mirrored)
            self._finished.append((mirrored.arrival_s, request.output_tokens))
            self._statistics.note(mirrored.arrival_s)

    # --- Pipelines ---

    def observe_plan(self, plan: Plan) -> None:
        """Pipelines that the plan does not name get no requests."""
        self._router.observe_plan(plan)

    def advertise(self, model: ModelShape) -> None:
        """For policies without a planner: all pipelines that run now get requests."""
        self._num_advertised += 1
        named = [
            Planned(id=p.id, stages=[], max_batch=p.limits.max_batch, num_kv_blocks=0) for p in self.pipelines.values()
        ]
        why = Explanation(
            cause="", cause_at_s=0.0, decided_at_s=0.0, arrivals_per_s=0.0, num_ranks=0, chosen=None, alternatives=[]
        )
        self._router.observe_plan(
            Plan(
                epoch=self._num_advertised,
                model=model,
                pipelines=named,
                retiring=[],
                transfers={},
                addresses={},
                explanation=why,
                next_pipeline_number=0,
            )
        )
        self.dispatch()

    def add(self, pipeline: Pipeline, deadline_s: float | None = None) -> None:
        """It serves from now on."""
        self.pipelines[pipeline.id] = pipeline
        if deadline_s is not None:
            self._deadlines_s[pipeline.id] = deadline_s

    def set_deadline(self, pipeline: str, deadline_s: float) -> None:
        """One of its instances will be preempted."""
        self._deadlines_s[pipeline] = min(deadline_s, self._deadlines_s.get(pipeline, deadline_s))

    def remove(self, pipeline: str) -> None:
        """It serves no more."""
        removed = self.pipelines.pop(pipeline, None)
        if removed is not None:
            removed.takes_requests = False
            self._router.observe_state(self._state(removed), self.clock.now_s)
        self._deadlines_s.pop(pipeline, None)

    def break_off(self, pipeline: Pipeline, change: Change, *, from_scratch: bool) -> None:
        """It lost a rank: its sequences are queued again, without KV; `from_scratch`: without their tokens, too."""
        self.remove(pipeline.id)
        sequences = pipeline.kill()
        interruption = Interruption(change, self.clock.now_s)
        for sequence in sequences:
            sequence.interrupt(interruption)
            sequence.lose_kv()
            if from_scratch:
                sequence.restart()
        self.enqueue(sequences)
        self.dispatch()

    # --- Requests ---

    def on_done(self, sequence: Sequence) -> None:
        self._ended_s[sequence.request.id] = self.clock.now_s
        self._finished.append((self.clock.now_s, sequence.request.output_tokens))
        self.num_open -= 1

    def enqueue(self, sequences: Iterable[Sequence]) -> None:
        """Interrupted ones keep the place of their arrival; `dispatch` is due."""
        for sequence in sequences:
            bisect.insort(self._queue, sequence, key=_place)

    def dispatch(self) -> None:
        """Send what there is room for: due when a request or a pipeline has come, or one has room again."""
        while self._queue:
            if all(pipeline.num_free_slots == 0 for pipeline in self.pipelines.values()):
                return  # as the router would say
            for pipeline in self.pipelines.values():
                self._router.observe_state(self._state(pipeline), self.clock.now_s)
            chosen = self._router.choose(self.clock.now_s, heir_of=self._queue[0].heir_of)
            if chosen is None:
                return
            self.pipelines[chosen].submit(self._queue.pop(0))

    def _state(self, pipeline: Pipeline) -> PipelineState:
        limits = pipeline.limits
        return PipelineState(
            pipeline=pipeline.id,
            epoch=0,
            ready=True,
            draining=not pipeline.takes_requests,
            running=len(pipeline.running) + len(pipeline.pulling),
            waiting=len(pipeline.waiting),
            free_slots=pipeline.num_free_slots,
            total_kv_blocks=limits.num_kv_blocks,
            free_kv_blocks=limits.num_kv_blocks - pipeline.num_blocks_used,
            deadline_s=self._deadlines_s.get(pipeline.id),
        )

    def _arrive(self) -> None:
        sequence = self._sequences[self._next]
        self._next += 1
        self._arrived.append(sequence.request)
        self._statistics.note(self.clock.now_s)
        if self._next < len(self._sequences):
            self.clock.at(self._sequences[self._next].request.arrival_s, self._arrive)
        self.enqueue([sequence])
        self.dispatch()

    # --- Accounts ---

    def load(self) -> LoadReport:
        """What the gateway reports once a second."""
        since_s = self.clock.now_s - LOAD_WINDOW_S
        while self._arrived and self._arrived[0].arrival_s <= since_s:
            self._arrived.popleft()
        while self._finished and self._finished[0][0] <= since_s:
            self._finished.popleft()
        return LoadReport(
            gateway="simulated",
            arrivals_per_s=len(self._arrived) / LOAD_WINDOW_S,
            running=sum(len(p.running) + len(p.pulling) + len(p.waiting) for p in self.pipelines.values()),
            waiting=len(self._queue),
            mean_prompt_tokens=_mean([r.prompt_tokens for r in self._arrived]),
            mean_output_tokens=_mean([tokens for _, tokens in self._finished]),
            arrivals_cv2=self._statistics.squared_cv(self.clock.now_s),
        )

    def outcomes(self, end_s: float) -> tuple[Outcome, ...]:
        """One for each request, in their order."""
        return tuple(self._outcome(sequence, end_s) for sequence in self._sequences)

    def _outcome(self, sequence: Sequence, end_s: float) -> Outcome:
        request = sequence.request
        is_done = request.id in self._ended_s
        return Outcome(
            id=request.id,
            fate=Fate.COMPLETED if is_done else Fate.UNFINISHED,
            arrival_s=request.arrival_s,
            ended_s=sequence.last_token_s if is_done else max(end_s, request.arrival_s),
            first_token_s=sequence.first_token_s,
            prompt_tokens=request.prompt_tokens,
            tokens_done=sequence.tokens,
            longest_gap_s=sequence.longest_gap_s,
            tokens_recomputed=sequence.tokens_recomputed,
        )


def _place(sequence: Sequence) -> tuple[float, int]:
    return sequence.request.arrival_s, sequence.request.id


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else 0.0
