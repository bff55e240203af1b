"""The paper's experiments again: Figs. 6 to 9, for the artifact's arrivals and for truly bursty ones, with ours beside.

Every run is a small task of its own; tasks are spread over processes, and the same data gives the same figures.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from loadtest.simulator.metrics import Percentiles, Summary, percentiles, summarize
from loadtest.simulator.paper_figures import ABLATION_LEVELS, ON_DEMAND_SECONDS, SYSTEMS
from loadtest.simulator.paper_setup import (
    MODELS,
    TRACES,
    WORKLOAD_MODEL,
    WORKLOAD_TRACES,
    Arrivals,
    constant_scenario,
    paper_scenario,
    workload_scenario,
)
from loadtest.simulator.policies.base import Policy
from loadtest.simulator.policies.mixed import SpotServeMixed
from loadtest.simulator.policies.on_demand import OnDemand
from loadtest.simulator.policies.paper import PaperPolicy
from loadtest.simulator.policies.paper_run import PaperOptions
from loadtest.simulator.policies.replicas import Replicas
from loadtest.simulator.policies.rerouting_strong import ReroutingStrong
from loadtest.simulator.policies.spotserve import SpotServe, SpotServeOptions
from loadtest.simulator.policies.static_batches import BatchingRules
from loadtest.simulator.policies.step_times import lone_request_s
from loadtest.simulator.result import Fate, Result
from loadtest.simulator.scenario import Scenario
from loadtest.simulator.workers import worker_pool

BURSTY_SEEDS: Final = (0, 1, 2)
ABLATED_TRACES: Final = ("A_S", "B_S")
ABLATED_PARTS: Final = ("controller", "migration_planner", "arranger", "device_mapper")
OWN_FLEETS: Final = (3, 4, 6, 7, 8, 9, 10)
"""On-demand instances of Fig. 7 with our own engine."""
OUR_PREFILL: Final = "spotserve-paper, our prefill"
ONE_BATCH: Final = "spotserve-paper, one batch"
OURS: Final = "spotserve"
STRONG: Final = "rerouting-strong"
REPLICAS: Final = "replicas"
MIXED_AT_COST: Final = "spotserve-mixed, at the cost of replicas"

OnTask = Callable[[int, int], None]
"""Called after each task with the number that are done, and of all."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    figure: int
    """Of the paper: 6 to 9."""
    model: str
    trace: str
    """As in the paper; for Fig. 7 also the number of on-demand instances."""
    policy: str
    arrivals: Arrivals
    seed: int = 0
    level: int = 0
    """Fig. 9: how many parts are switched off."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    task: Task
    summary: Summary
    """All requests, which may finish after the end of the trace."""
    logged: Percentiles | None
    """Latency of those completed before the end of the trace: what the artifact counts."""
    num_logged: int
    lone_s: float
    """Latency of a request that has the pipeline of least latency for itself."""


def reproduce(data: Path, *, num_processes: int = 2, on_task: OnTask | None = None) -> list[Outcome]:
    """All runs, in the order of `tasks()`. Raises InputError or ProfileError for missing or damaged data."""
    todo = tasks()
    done: dict[Task, Outcome] = {}
    paper_scenario(data, WORKLOAD_MODEL, "A_S")  # what is missing should be told before processes start
    with worker_pool(num_processes) as processes:
        for future in as_completed([processes.submit(run_task, data, task) for task in todo]):
            outcome = future.result()
            done[outcome.task] = outcome
            if on_task is not None:
                on_task(len(done), len(todo))
    return [done[task] for task in todo]


def run_task(data: Path, task: Task) -> Outcome:
    """In whatever process."""
    scenario = scenario_of(data, task)
    result = policy_of(task, scenario).run(scenario, _ignore)
    logged_s = _logged_s(result, scenario)
    return Outcome(
        task=task,
        summary=summarize(result, scenario),
        logged=percentiles(logged_s),
        num_logged=len(logged_s),
        lone_s=lone_request_s(scenario),
    )


def tasks() -> list[Task]:
    """Of all figures; the bursty arrivals with several seeds."""
    return [
        make(arrivals=arrivals, seed=seed)
        for arrivals, seeds in ((Arrivals.ARTIFACT, (0,)), (Arrivals.BURSTY, BURSTY_SEEDS))
        for seed in seeds
        for make in (*_fig6(), *_fig7(), *_fig8(), *_fig9())
    ]


MakeTask = Callable[..., Task]


def _fig6() -> list[MakeTask]:
    policies = (*SYSTEMS, OUR_PREFILL, OURS, STRONG, REPLICAS, MIXED_AT_COST)
    return [
        partial(Task, figure=6, model=model, trace=trace, policy=policy)
        for model in MODELS
        for trace in TRACES
        for policy in policies
    ]


def _fig7() -> list[MakeTask]:
    return [
        partial(Task, figure=7, model=WORKLOAD_MODEL, trace=str(num), policy=policy)
        for num in OWN_FLEETS
        for policy in ((ONE_BATCH, "spotserve-paper", "on-demand") if num in ON_DEMAND_SECONDS else ("on-demand",))
    ]


def _fig8() -> list[MakeTask]:
    return [
        partial(Task, figure=8, model=WORKLOAD_MODEL, trace=trace, policy=policy)
        for trace in WORKLOAD_TRACES
        for policy in (*SYSTEMS, OURS, STRONG, REPLICAS)
    ]


def _fig9() -> list[MakeTask]:
    return [
        partial(Task, figure=9, model=WORKLOAD_MODEL, trace=trace, policy=policy, level=level)
        for trace in ABLATED_TRACES
        for policy in ("spotserve-paper", OURS)
        for level in range(len(ABLATION_LEVELS))
    ]


def scenario_of(data: Path, task: Task) -> Scenario:
    """Raises InputError or ProfileError for missing or damaged data."""
    if task.figure == 7:
        return constant_scenario(data, task.model, int(task.trace), task.arrivals, task.seed)
    if task.figure == 8:
        return workload_scenario(data, task.trace, task.arrivals, task.seed)
    return paper_scenario(data, task.model, task.trace, task.arrivals, task.seed)


def policy_of(task: Task, scenario: Scenario) -> Policy:
    """As the artifact's scripts run it; the newer batching is theirs for Fig. 8."""
    if task.policy == MIXED_AT_COST:
        return SpotServeMixed(Replicas().run(scenario, _ignore).cost_usd / (scenario.trace.end_s / 3600))
    on = [part not in ABLATED_PARTS[: task.level] for part in ABLATED_PARTS]
    parts = dict(zip(ABLATED_PARTS, on, strict=True))
    if task.policy == OURS:
        return SpotServe(SpotServeOptions(**parts))
    if task.policy == "on-demand":
        return OnDemand(int(task.trace))
    if task.policy == STRONG:
        return ReroutingStrong()
    if task.policy == REPLICAS:
        return Replicas()
    options = PaperOptions(
        batching=BatchingRules(
            pool_batches=1 if task.policy == ONE_BATCH else 2,
            whole_batches=task.figure == 8,
        ),
        corrected_prefill=task.policy == OUR_PREFILL,
        controller_min_ranks=16,
    )
    return PaperPolicy(task.policy.partition(",")[0], msgspec.structs.replace(options, **parts))


def _ignore(now_s: float) -> None:
    pass


def _logged_s(result: Result, scenario: Scenario) -> list[float]:
    return [
        outcome.latency_s
        for outcome in result.outcomes
        if outcome.fate is Fate.COMPLETED and outcome.ended_s <= scenario.trace.end_s
    ]
