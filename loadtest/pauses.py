"""How long streams pause, and why: gaps between chunks are matched to the events that caused them. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from enum import StrEnum
from itertools import pairwise

import msgspec

from engine.protocol import ResumeStats
from planner.protocol import Phase, Plan, RankProgress

CLOCK_SLACK_S = 0.05
"""Between the clocks of two processes of one machine."""


class Kind(StrEnum):
    NOTICE = "notice"
    KILL = "kill"
    ADD = "add"


class StreamLog(msgspec.Struct):
    """One request as its client saw it."""

    request_id: str = ""
    num_tokens: int = 0
    chunk_times_s: list[float] = []
    """Unix time of each chunk that brought tokens."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something done to the fleet at `at_s`; by `until_s` all streams went on again."""

    kind: Kind
    instance: str
    at_s: float
    until_s: float
    context_tokens: float = 0.0
    """Mean over the streams at `at_s`."""


class Heard(msgspec.Struct, kw_only=True):
    """What went over NATS during a run, each with the Unix time at which it was heard."""

    plans: list[tuple[float, Plan]] = []
    progress: list[tuple[float, RankProgress]] = []
    interruptions: list[tuple[float, str]] = []
    """By request id: stopped at a token boundary."""
    resumes: list[tuple[float, str, ResumeStats]] = []
    """By request id: the first tokens after a resume."""


class Gap(msgspec.Struct, frozen=True):
    """Between two neighbouring chunks of a stream."""

    from_s: float
    to_s: float

    @property
    def length_s(self) -> float:
        return self.to_s - self.from_s


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """Where the gap went that a resume ended; None: not on the way of this one.

    With notice: arrange + hand_over + transfer + first_token = the gap; what lies before went on beside the decoding.
    Without: since_token + detect + plan + publish + hand_over + transfer + first_token = the gap.
    """

    since_token_s: float | None = None
    """Last chunk before the event -> event."""
    detect_s: float | None = None
    """Event -> the planner's cause."""
    plan_s: float | None = None
    """Cause -> decision."""
    publish_s: float | None = None
    """Decision -> the plan is heard."""
    arrange_s: float | None = None
    """Last chunk -> the interruption is heard: the stop of every stage. 0 where it comes with the last token."""
    hand_over_s: float | None = None
    """The pipeline has stopped (killed: the plan is out) -> the sequence is submitted to another."""
    weights_s: float | None = None
    """Of that (with notice: before it): weights pulled or read; the slowest rank."""
    regroup_s: float | None = None
    """Of that (with notice: before it): waiting for the new process group; the slowest rank."""
    transfer_s: float | None = None
    """KV pulled."""
    first_token_s: float | None = None
    """Queue, recompute, and the first step after it, until the client has the chunk."""


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """One stream, interrupted by one event."""

    request_id: str
    pause_s: float
    parts: Parts
    pulled_tokens: int
    recomputed_tokens: int


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    num: int
    p50_s: float | None
    p90_s: float | None
    p99_s: float | None
    max_s: float | None


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that at least `percent` of all do not exceed; None of nothing."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def spread(values: Sequence[float]) -> Spread:
    """Number and percentiles of `values`."""
    p50_s, p90_s, p99_s, max_s = (percentile(values, percent) for percent in (50, 90, 99, 100))
    return Spread(num=len(values), p50_s=p50_s, p90_s=p90_s, p99_s=p99_s, max_s=max_s)


def longest_gap(times_s: Sequence[float], after_s: float, before_s: float) -> Gap | None:
    """Of the gaps that overlap `after_s`..`before_s`."""
    gaps = [Gap(a, b) for a, b in pairwise(times_s) if b > after_s and a < before_s]
    return max(gaps, key=lambda gap: gap.length_s, default=None)


def gaps_within(times_s: Sequence[float], windows: Iterable[tuple[float, float]]) -> list[float]:
    """Lengths of the gaps that lie wholly in one of the windows."""
    return [b - a for start_s, end_s in windows for a, b in pairwise(times_s) if a >= start_s and b <= end_s]


def pauses_of(event: Event, logs: Iterable[StreamLog], heard: Heard) -> list[Pause]:
    """Of every stream that `event` interrupted after its first token."""
    by_request = {log.request_id: log for log in logs}
    found = []
    for name in sorted({name for _, name, _ in heard.resumes} & by_request.keys()):
        times_s = by_request[name].chunk_times_s
        longest = longest_gap(times_s, event.at_s, event.until_s)
        resumes = [(t, stats) for t, request, stats in heard.resumes if request == name]
        ended = [
            (gap, at_s, stats)
            for at_s, stats in resumes
            if event.at_s <= at_s <= event.until_s and (gap := _gap_ended_at(times_s, at_s)) is not None
        ]
        if longest is None or not ended:
            continue
        # A sequence may be resumed more than once in an event; and its longest gap may have another reason.
        gap, resumed_at_s, stats = max(ended, key=lambda one: one[0].length_s)
        found.append(
            Pause(
                request_id=name,
                pause_s=longest.length_s,
                parts=parts_of(event, gap, resumed_at_s, stats, name, heard),
                pulled_tokens=stats.pulled_tokens,
                recomputed_tokens=stats.recomputed_tokens,
            )
        )
    return found


def _gap_ended_at(times_s: Sequence[float], at_s: float) -> Gap | None:
    """The gap whose later chunk is the one nearest to `at_s`."""
    gaps = [Gap(a, b) for a, b in pairwise(times_s)]
    return min(gaps, key=lambda gap: abs(gap.to_s - at_s), default=None)


def longest_untouched_gaps(event: Event, logs: Iterable[StreamLog], pauses: Iterable[Pause]) -> list[float]:
    """The longest gap around `event` of each stream that it did not interrupt."""
    interrupted = {pause.request_id for pause in pauses}
    others = [log for log in logs if log.request_id not in interrupted]
    gaps = [longest_gap(log.chunk_times_s, event.at_s, event.until_s) for log in others]
    return [gap.length_s for gap in gaps if gap is not None]


def parts_of(event: Event, gap: Gap, resumed_at_s: float, stats: ResumeStats, request_id: str, heard: Heard) -> Parts:
    """Split a pause by what was heard around it."""
    plan_at_s, plan = _plan_for(event, heard)
    stops = [at_s for at_s, name in heard.interruptions if name == request_id and event.at_s <= at_s <= resumed_at_s]
    stopped_at_s = max(stops, default=None)
    submitted_at_s = resumed_at_s - stats.waited_s
    free_at_s = stopped_at_s if stopped_at_s is not None else plan_at_s
    prepared = _prepared_for(plan, heard)
    return Parts(
        since_token_s=event.at_s - gap.from_s if stopped_at_s is None else None,
        detect_s=plan.explanation.cause_at_s - event.at_s if plan else None,
        plan_s=plan.explanation.decided_at_s - plan.explanation.cause_at_s if plan else None,
        publish_s=plan_at_s - plan.explanation.decided_at_s if plan and plan_at_s is not None else None,
        arrange_s=max(0.0, stopped_at_s - gap.from_s) if stopped_at_s is not None else None,
        hand_over_s=submitted_at_s - free_at_s if free_at_s is not None else None,
        weights_s=max((progress.pull_s for progress in prepared), default=None),
        regroup_s=max((progress.regroup_s for progress in prepared), default=None),
        transfer_s=stats.pull_s,
        first_token_s=gap.to_s - submitted_at_s - stats.pull_s,
    )


def _plan_for(event: Event, heard: Heard) -> tuple[float | None, Plan | None]:
    """The first plan that the event caused."""
    for at_s, plan in heard.plans:
        caused = plan.explanation.cause_at_s >= event.at_s - CLOCK_SLACK_S
        if caused and event.at_s <= at_s <= event.until_s and event.instance in plan.explanation.cause:
            return at_s, plan
    return None, None


def _prepared_for(plan: Plan | None, heard: Heard) -> list[RankProgress]:
    """Of the ranks that `plan` gave a new position."""
    epoch = plan.epoch if plan else None
    return [p for _, p in heard.progress if p.phase is Phase.PREPARED and p.epoch == epoch]
