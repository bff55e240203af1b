"""The reproduction's page: the tables of the figures asked for, targets, differences, plots."""

from __future__ import annotations

import pytest

from loadtest.errors import InputError
from loadtest.report import Check, Table
from loadtest.simulator.metrics import Percentiles, Summary
from loadtest.simulator.report import render
from loadtest.simulator.reproduce import Outcome, Task, tasks
from loadtest.simulator.reproduction import Reproduction
from loadtest.simulator.reproduction_page import reproduction_page, shown_tables
from loadtest.simulator.runs import figures_of


def outcome(task: Task) -> Outcome:
    times = Percentiles(mean=5.0, p50=1.0, p90=1.0, p95=1.0, p96=1.0, p97=1.0, p98=1.0, p99=10.0 + task.seed)
    return Outcome(
        task=task,
        summary=Summary(
            policy=task.policy,
            scenario="s",
            num_completed=100,
            num_unfinished=0,
            num_lost=0,
            oldest_unfinished_s=0,
            latency=times,
            completed_latency=times,
            ttft=None,
            token_gap=None,
            longest_gap=None,
            usd=6.4,
            usd_per_output_token=None,
            usd_per_token=None,
            usd_per_completed=None,
            num_pauses=0,
            mean_pause_s=0,
            longest_pause_s=0,
            moved_bytes=0,
            tokens_recomputed=0,
        ),
        logged=times,
        num_logged=1000,
        lone_s=1.0,
    )


REPRODUCTION = Reproduction(
    tables=[Table("Ours", ["a"], [["of 6"]]), *(Table(f"Fig. {n}: x", ["a"], [[f"of {n}"]]) for n in (6, 7, 8, 9))],
    checks=[Check(name="good", value=1.0, unit="", target=2.0), Check(name="bad", value=3.0, unit="", target=2.0)],
    notes=["It differs because of <that>."],
    outcomes=[outcome(task) for task in tasks() if task.figure == 6],
)


def test_only_the_figures_asked_for_are_shown():
    assert [table.rows[0][0] for table in shown_tables(REPRODUCTION, [6, 9])] == ["of 6", "of 6", "of 9"]


def test_page_has_tables_targets_differences_and_plots():
    text = render(reproduction_page(REPRODUCTION, [6, 8], "spotserve simulate reproduce --data x"))
    assert "1 of 2 targets are met." in text
    assert "It differs because of &lt;that&gt;." in text
    assert "<td>of 8</td>" in text
    assert "<td>of 9</td>" not in text
    assert text.count('<div id="p99-') == 2
    assert "11.0" in text  # the median of the seeds


def test_figures_that_the_paper_has():
    assert figures_of("6, 9") == [6, 9]
    with pytest.raises(InputError, match="'5' is not one of 6, 7, 8, 9"):
        figures_of("6,5")
