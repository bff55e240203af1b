"""The reproduction of the paper's figures as a page, or the tables of some of its figures. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from loadtest.report import Table
from loadtest.simulator.charts import Chart, bars
from loadtest.simulator.paper_figures import SYSTEMS
from loadtest.simulator.paper_setup import MODELS, TRACES, Arrivals
from loadtest.simulator.report import Page, Section
from loadtest.simulator.reproduce import MIXED_AT_COST, OURS, REPLICAS, STRONG
from loadtest.simulator.reproduction import Reproduction
from loadtest.simulator.reproduction_figures import Figures

FIGURES: Final = (6, 7, 8, 9)
WORDS: Final = {
    Arrivals.ARTIFACT: "the artifact's arrivals, nearly evenly spaced",
    Arrivals.BURSTY: "arrivals with a true coefficient of variation of 6",
}


def shown_tables(reproduction: Reproduction, figures: Collection[int]) -> list[Table]:
    """Those of `figures`; a table that names none is of the runs of Fig. 6."""
    return [table for table in reproduction.tables if _figure_of(table) in figures]


def reproduction_page(reproduction: Reproduction, figures: Collection[int], command: str) -> Page:
    """For people."""
    num_met = sum(check.is_met for check in reproduction.checks)
    met = f"{num_met} of {len(reproduction.checks)} targets are met."
    sections = [Section(title="Targets", tables=[_checks_table(reproduction)])]
    for figure in sorted(figures):
        tables = [table for table in reproduction.tables if _figure_of(table) == figure]
        charts = [_p99_chart(reproduction, arrivals) for arrivals in Arrivals] if figure == 6 else []
        sections.append(Section(title=f"Fig. {figure}", tables=tables, charts=charts))
    notes = Section(title="Differences from what is printed", paragraphs=reproduction.notes)
    lead = "The experiments of the SpotServe paper, simulated, beside what it and its artifact print, and ours on them."
    return Page(
        title="SpotServe's figures, reproduced", verdict=[lead, met], sections=[*sections, notes], command=command
    )


def _figure_of(table: Table) -> int:
    found = re.search(r"Fig\. (\d+)", table.title)
    return int(found[1]) if found else FIGURES[0]


def _checks_table(reproduction: Reproduction) -> Table:
    rows = [
        [
            check.name,
            "-" if check.value is None else f"{check.value:.3g}",
            f"{'>=' if check.higher_is_better else '<='} {check.target:g}",
            "met" if check.is_met else "missed",
        ]
        for check in reproduction.checks
    ]
    return Table("Figures beside their targets", ["figure", "value", "target", ""], rows)


def _p99_chart(reproduction: Reproduction, arrivals: Arrivals) -> Chart:
    figures = Figures(reproduction.outcomes)
    cells = [(model, trace) for model in MODELS for trace in TRACES]
    values = {
        policy: [figures.latency(6, trace, policy, "p99", arrivals, model=model) for model, trace in cells]
        for policy in (OURS, *SYSTEMS, STRONG, REPLICAS, MIXED_AT_COST)
    }
    return bars(
        f"p99-{arrivals}",
        f"P99 of the twelve cells, {WORDS[arrivals]}",
        "Of all requests, in seconds; lower is better.",
        [f"{model}<br>{trace}" for model, trace in cells],
        values,
        "P99 (s)",
    )
