"""Simulations side by side, in processes of their own. What comes out does not depend on how many there are."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Final

from loadtest.errors import SimulationError
from loadtest.simulator.policies.base import OnProgress, Policy
from loadtest.simulator.result import Result
from loadtest.simulator.scenario import Scenario

POLL_S: Final = 0.2
"""How often progress is looked at."""
STEPS: Final = 200
"""Of a simulation's progress: more would be too many messages."""

_reports: Any = None
"""In a worker: the queue for its progress."""


@contextmanager
def worker_pool(num_processes: int, reports: Any = None) -> Iterator[ProcessPoolExecutor]:
    """Left with an exception, it starts nothing that has not begun."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=spawn, initializer=_begin, initargs=(reports,)) as processes:
        try:
            yield processes
        except BaseException:
            processes.shutdown(cancel_futures=True)
            raise


def run_policy(scenario: Scenario, policy: Policy, on_progress: OnProgress) -> Result | str:
    """What came out, or why the policy cannot run this scenario."""
    try:
        return policy.run(scenario, on_progress)
    except SimulationError as error:
        return f"{policy.name} cannot run here: {error}."


def run_policies(
    scenario: Scenario, policies: Sequence[Policy], num_processes: int, on_progress: Callable[[int, float], None]
) -> list[Result | str]:
    """As `run_policy`, in the order of `policies`; `on_progress` gets the index of one and its virtual time."""
    reports = multiprocessing.get_context("spawn").Queue()
    with worker_pool(num_processes, reports) as processes:
        futures = [processes.submit(_run, scenario, policy, index) for index, policy in enumerate(policies)]
        pending: set[Future[Result | str]] = set(futures)
        while pending:
            _, pending = wait(pending, timeout=POLL_S, return_when=FIRST_COMPLETED)
            while not reports.empty():
                on_progress(*reports.get())
        return [future.result() for future in futures]


def _begin(reports: Any) -> None:
    """Ctrl-C is for the process that started the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    global _reports
    _reports = reports


def _run(scenario: Scenario, policy: Policy, index: int) -> Result | str:
    next_s = 0.0

    def report(now_s: float) -> None:
        nonlocal next_s
        if now_s >= next_s:
            next_s = now_s + scenario.trace.end_s / STEPS
            _reports.put((index, now_s))

    return run_policy(scenario, policy, report)
