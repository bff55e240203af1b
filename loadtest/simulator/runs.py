"""Running policies on one scenario, and what is written of it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.errors import InputError, SimulationError
from loadtest.simulator import charts
from loadtest.simulator.metrics import Summary
from loadtest.simulator.policies import POLICIES
from loadtest.simulator.policies.base import Policy
from loadtest.simulator.report import Page, Section
from loadtest.simulator.reproduce import reproduce
from loadtest.simulator.reproduction import Reproduction, summarize_reproduction
from loadtest.simulator.reproduction_page import FIGURES
from loadtest.simulator.result import Result
from loadtest.simulator.scenario import Scenario
from loadtest.simulator.setup import Setup
from loadtest.simulator.tables import costs_table, facts_table, fleet_table, policies_table, requests_table
from loadtest.simulator.what_if import FleetRow
from loadtest.simulator.workers import run_policies, run_policy

MANY_REQUESTS: Final = 5_000
"""Of a simulation that takes longer than a process needs to start."""


def policies_of(given: str) -> list[Policy]:
    """Names separated by commas. Raises InputError with the names that are known."""
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in POLICIES:
            raise InputError("--policies", None, None, f"{name!r} is not known; there are {', '.join(POLICIES)}")
    if len(set(names)) < len(names):
        raise InputError("--policies", None, None, f"{given!r} names a policy twice")
    return [POLICIES[name]() for name in names]


def run_all(
    scenario: Scenario, policies: Sequence[Policy], num_processes: int | None = None
) -> tuple[list[Result], list[str]]:
    """With a bar for each on a terminal (on standard error); side by side on `num_processes`, None: on all cores if
    the scenario is long enough to be worth their start.

    Returns the results, and a sentence for each policy that cannot run this scenario. Raises SimulationError if none
    can.
    """
    if num_processes is None:
        num_processes = (os.cpu_count() or 1) if len(scenario.requests) >= MANY_REQUESTS else 1
    num_processes = min(num_processes, len(policies))
    with _bar() as progress:
        tasks = [progress.add_task(policy.name, total=scenario.trace.end_s) for policy in policies]

        def advance(index: int, now_s: float) -> None:
            progress.update(tasks[index], completed=now_s)

        if num_processes > 1:
            outcomes = run_policies(scenario, policies, num_processes, advance)
        else:
            outcomes = [run_policy(scenario, policy, partial(advance, i)) for i, policy in enumerate(policies)]
    results = [outcome for outcome in outcomes if isinstance(outcome, Result)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if not results:
        raise SimulationError(" ".join(failures))
    return results, failures


def figures_of(given: str) -> list[int]:
    """Numbers of the paper's figures. Raises InputError."""
    known = [str(figure) for figure in FIGURES]
    words = [word.strip() for word in given.split(",")]
    for word in words:
        if word not in known:
            raise InputError("--figures", None, None, f"{word!r} is not one of {', '.join(known)}")
    return [int(word) for word in words]


def reproduce_with_bar(data: Path, num_processes: int) -> Reproduction:
    """Raises as `reproduce`."""
    with _bar() as progress:
        task = progress.add_task("reproduction", total=None)

        def on_task(num_done: int, num_all: int) -> None:
            progress.update(task, completed=num_done, total=num_all)

        outcomes = reproduce(data, num_processes=num_processes, on_task=on_task)
    return summarize_reproduction(outcomes)


def as_json(content: object) -> bytes:
    """Indented; what has no value is null."""
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def _bar() -> Progress:
    console = Console(stderr=True)
    columns = TextColumn("{task.description:>18}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %")
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that came out of one command."""

    setup: Setup
    fleet: list[FleetRow]
    results: list[Result]
    summaries: list[Summary]
    verdict: list[str]
    command: str

    def as_json(self) -> bytes:
        """For programs: no clock and no path in it, so that the same command gives the same bytes."""
        content = {
            "command": self.command,
            "scenario": self.setup.scenario.name,
            "assumptions": self.setup.facts,
            "verdict": self.verdict,
            "expected": [_expected(row) for row in self.fleet],
            "policies": [
                {
                    "summary": summary,
                    "instance_hours_spot": result.instance_hours_spot,
                    "instance_hours_on_demand": result.instance_hours_on_demand,
                    "end_s": result.end_s,
                    "fleet": result.fleet,
                    "pauses": result.pauses,
                }
                for summary, result in zip(self.summaries, self.results, strict=True)
            ],
        }
        return as_json(content)

    def as_page(self) -> Page:
        """For people."""
        scenario, results = self.setup.scenario, self.results
        return Page(
            title=f"{scenario.name}: {len(scenario.requests)} requests in {scenario.trace.end_s / 60:.0f} minutes",
            verdict=self.verdict,
            sections=[
                Section(
                    title="Figures",
                    tables=[requests_table(self.summaries), costs_table(self.summaries, results)],
                    charts=[charts.latency_curves(results), charts.cost_against_latency(self._cost_points())],
                ),
                Section(
                    title="Over time",
                    charts=[
                        charts.fleet_over_time(results, scenario.ranks_per_instance),
                        charts.configuration_over_time(results),
                        charts.latency_over_time(results, scenario.trace),
                        charts.pauses(results),
                    ],
                ),
                Section(title="Before the simulation", tables=[fleet_table(self.fleet)]),
                Section(title="Policies", tables=[policies_table([result.policy for result in results])]),
                Section(title="Assumptions", tables=[facts_table(self.setup.facts)]),
            ],
            command=self.command,
        )

    def _cost_points(self) -> list[charts.CostPoint]:
        return [
            charts.CostPoint(
                policy=summary.policy,
                usd_per_million_tokens=None if summary.usd_per_token is None else summary.usd_per_token * 1e6,
                mean_s=summary.latency.mean if summary.latency else None,
                p99_s=summary.latency.p99 if summary.latency else None,
            )
            for summary in self.summaries
        ]


def _expected(row: FleetRow) -> dict[str, object]:
    score = row.score
    return {
        "instances": row.num_instances,
        "share_of_time": row.share,
        "configuration": charts.describe_shapes(score.layout.shapes()) if score else None,
        "latency_s": score.latency_s if score and score.latency_s < math.inf else None,
        "throughput_per_s": score.throughput_per_s if score else 0.0,
        "usd_per_h": row.usd_per_h,
        "usd_per_million_tokens": row.usd_per_million_tokens,
    }
