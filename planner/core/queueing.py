"""The queue before one pipeline with continuous batching.

A pipeline shares itself among the sequences that it decodes, and decodes at most `max_batch` at once: a queue with
processor sharing, a service rate that depends on the number in service, and a waiting room before it. It is neither
M/D/1 (a newcomer does not wait for those before it to finish) nor a multi-server queue (those in service slow each
other down). With Poisson arrivals, the number of requests is the birth-death chain with death rate X(n): for n within
the batch this is exact whatever the lengths are distributed like (processor sharing is insensitive to it; Cohen, "The
multiple phase service network with generalized processor sharing", Acta Informatica 12, 1979). The waiting room
beyond is exact for random arrivals of exponential lengths; for others its content is scaled by their variability
(ca^2 + cs^2) / 2, as in the formulas of Kingman and of Allen and Cunneen: ca is the coefficient of variation of the
gaps between arrivals, cs that of the lengths.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def mean_service_and_wait_s(
    completions_per_s: NDArray[np.float64], arrivals_per_s: float, variability: float = 0.5
) -> tuple[float, float]:
    """Mean time in service and mean time in the waiting room; the default is for random arrivals of equal lengths.

    `completions_per_s[n - 1]` is the throughput with n sequences in service, all positive. Infinite where the
    arrivals are as many as the throughput of the full batch.
    """
    if arrivals_per_s <= 0:
        return 1 / float(completions_per_s[0]), 0.0
    load = arrivals_per_s / float(completions_per_s[-1])
    if load >= 1:
        return math.inf, math.inf
    max_batch = len(completions_per_s)
    logs = np.concatenate(([0.0], np.cumsum(np.log(arrivals_per_s / completions_per_s))))
    weights = np.exp(logs - logs.max())
    full = float(weights[-1])
    waiting = full * load / (1 - load)
    total = float(weights.sum()) + waiting
    in_service = (float(weights @ np.arange(max_batch + 1)) + max_batch * waiting) / total
    in_queue = waiting / (1 - load) / total
    return in_service / arrivals_per_s, in_queue * variability / arrivals_per_s


def pooled_wait_s(wait_s: float, load: float, num_pipelines: int) -> float:
    """Of requests that go to the first of `num_pipelines` that has room, if it is `wait_s` with one pipeline for each
    part of the arrivals. Sakasegawa's approximation of the multi-server queue, relative to one server.
    """
    return wait_s * load ** (math.sqrt(2 * (num_pipelines + 1)) - 2) / num_pipelines if load > 0 else 0.0
