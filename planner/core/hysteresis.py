"""Whether a change of layout is worth it: it must repay its pause before the fleet changes again."""

from __future__ import annotations

import math
from typing import Final

import msgspec

from planner.core.layout import Score

MIN_GAIN: Final = 0.10
"""Predictions are not better than that: a smaller gain in latency or throughput may be none."""


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """What a change of layout costs."""

    pause_s: float
    """How long a pipeline that it stops stands still: its KV moves."""
    prepare_s: float
    """Until the new pipelines have their weights; the old ones serve meanwhile."""
    bytes_moved: int
    num_sequences: float
    """Live ones of the pipelines that it stops."""
    stopped_share: float
    """Of the arrivals: those to pipelines that it stops."""


FREE: Final = Move(pause_s=0.0, prepare_s=0.0, bytes_moved=0, num_sequences=0.0, stopped_share=0.0)


def is_worth(
    new: Score,
    stay: Score,
    move: Move,
    arrivals_per_s: float,
    calm_s: float,
    *,
    num_waiting: float = 0.0,
    throughput_only: bool = False,
) -> tuple[bool, str]:
    """Compare `new` with what can be had without stopping anything, and say why or why not.

    Gain and loss are in request-seconds over the `calm_s` until the next event. While a layout does not keep up, or
    `num_waiting` requests wait, its queue counts, which grows by the arrivals and drains by the throughput; how long
    requests are in service does not, as a full batch that is larger only moves its queue inside. A pause is waited out
    by all sequences of the stopped pipelines, and half of it in the mean by requests that come meanwhile. With
    `throughput_only` both are in requests.
    """
    both_keep_up = new.keeps_up and stay.keeps_up
    latency_gain_s = _latency_s(stay, new) - _latency_s(new, stay)
    is_clear = (
        latency_gain_s >= MIN_GAIN * _latency_s(stay, new)
        or new.throughput_per_s >= (1 + MIN_GAIN) * stay.throughput_per_s
    )
    if not is_clear:
        return False, f"better than the present layout by less than {MIN_GAIN:.0%}: not worth a change"
    useful_s = max(0.0, calm_s - move.prepare_s - move.pause_s)
    if throughput_only:
        gain = (new.throughput_per_s - stay.throughput_per_s) * useful_s
        loss = stay.throughput_per_s * move.stopped_share * move.pause_s
        unit = "requests"
    else:
        gain = _queue_s(stay, num_waiting, arrivals_per_s, useful_s)
        gain -= _queue_s(new, num_waiting, arrivals_per_s, useful_s)
        if both_keep_up:
            gain += latency_gain_s * arrivals_per_s * useful_s
        loss = move.num_sequences * move.pause_s + arrivals_per_s * move.stopped_share * move.pause_s**2 / 2
        unit = "request-seconds"
    is_idle = arrivals_per_s == 0 and loss == 0 and not throughput_only
    figures = f"gains {gain:.1f} and costs {loss:.1f} {unit} in the {calm_s:.0f} s to the next event"
    if gain > loss or is_idle:
        return True, f"a change {figures}"
    if gain <= 0:
        return False, "better, but not for the present load: not worth a change"
    return False, f"a change {figures}: it does not repay its pause of {move.pause_s:.1f} s"


def _queue_s(score: Score, num_waiting: float, arrivals_per_s: float, useful_s: float) -> float:
    """Request-seconds in the queue within `useful_s`."""
    drain_per_s = score.throughput_per_s - arrivals_per_s
    until_s = min(useful_s, num_waiting / drain_per_s) if drain_per_s > 0 else useful_s
    return num_waiting * until_s - drain_per_s * until_s**2 / 2


def _latency_s(score: Score, other: Score) -> float:
    """With queueing if both keep up; a queue without end is counted as deficit."""
    both_keep_up = math.inf not in (score.latency_s, other.latency_s)
    return score.latency_s if both_keep_up else score.service_s
