"""The figures of simulations as tables, the same on the terminal and in a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from loadtest.report import Table
from loadtest.simulator.charts import describe_shapes
from loadtest.simulator.metrics import Percentiles, Summary
from loadtest.simulator.result import Result
from loadtest.simulator.setup import Fact
from loadtest.simulator.what_if import FleetRow

DESCRIPTIONS: Final = {
    "spotserve": "the planner of this project, on all that the trace offers; only touched pipelines stop",
    "spotserve-mixed": "the same on what the load needs, spot and on-demand, in the market of replicas",
    "spotserve-paper": "SpotServe as published: static batches, equal pipelines, all of them stop at each change",
    "reparallelization": "the paper's first baseline: as above, but restarts and loads weights at each change",
    "rerouting": "the paper's second baseline: one shape for good, pipelines come and go whole",
    "rerouting-strong": "the same with continuous batching and the best shape for the smallest fleet",
    "replicas": "as many whole replicas as the load needs, on spot with on-demand fallback, as SkyServe does",
    "on-demand": "as many on-demand instances, all the time, as the trace has at most",
}


def policies_table(names: Sequence[str]) -> Table:
    """One line on each."""
    return Table("", ["policy", "what it does"], [[name, DESCRIPTIONS.get(name, "")] for name in names])


def requests_table(summaries: Sequence[Summary]) -> Table:
    """What became of the requests, and how long they took."""
    columns = ["policy", "completed", "unfinished", "lost", "mean", "P50", "P90", "P99"]
    columns += ["TTFT P50", "TTFT P99", "TBT P50", "gap P99"]
    return Table(
        "Requests: latency, time to first token (TTFT), between tokens (TBT), longest gap between tokens; in seconds",
        columns,
        [
            [
                summary.policy,
                *(str(number) for number in (summary.num_completed, summary.num_unfinished, summary.num_lost)),
                *(_seconds(summary.latency, name) for name in ("mean", "p50", "p90", "p99")),
                _seconds(summary.ttft, "p50"),
                _seconds(summary.ttft, "p99"),
                _seconds(summary.token_gap, "p50"),
                _seconds(summary.longest_gap, "p99"),
            ]
            for summary in summaries
        ],
    )


def costs_table(summaries: Sequence[Summary], results: Sequence[Result]) -> Table:
    """What the policies cost, and what the changes of the fleet did."""
    columns = ["policy", "USD", "USD/M tokens", "USD/k requests", "spot h", "on-demand h"]
    columns += ["pauses", "mean (s)", "longest (s)", "GB moved", "recomputed"]
    return Table(
        "Cost, for a million tokens (in and out) and a thousand requests completed; pauses, bytes, tokens recomputed",
        columns,
        [
            [
                summary.policy,
                f"{summary.usd:.2f}",
                money(_times(summary.usd_per_token, 1e6)),
                money(_times(summary.usd_per_completed, 1e3)),
                f"{result.instance_hours_spot:.2f}",
                f"{result.instance_hours_on_demand:.2f}",
                str(summary.num_pauses),
                f"{summary.mean_pause_s:.2f}",
                f"{summary.longest_pause_s:.2f}",
                f"{summary.moved_bytes / 1e9:.1f}",
                str(summary.tokens_recomputed),
            ]
            for summary, result in zip(summaries, results, strict=True)
        ],
    )


def facts_table(facts: Sequence[Fact]) -> Table:
    """What the figures depend on."""
    return Table("", ["what", "value", "from"], [[fact.name, fact.value, fact.source] for fact in facts])


def fleet_table(rows: Sequence[FleetRow]) -> Table:
    """What the planner would choose on each fleet of the trace, and what the cost model expects of it."""
    columns = ["instances", "of the time", "configuration", "latency (s)", "requests/s", "spot USD/h", "USD/M tokens"]
    return Table("Expected on each fleet of the trace; requests/s: at most", columns, [_fleet_row(row) for row in rows])


def _fleet_row(row: FleetRow) -> list[str]:
    score = row.score
    return [
        str(row.num_instances),
        f"{row.share:.0%}",
        describe_shapes(score.layout.shapes()) if score else "the model does not fit",
        ("overloaded" if score.latency_s == math.inf else f"{score.latency_s:.2f}") if score else "-",
        f"{score.throughput_per_s:.2f}" if score else "0",
        f"{row.usd_per_h:.2f}",
        money(row.usd_per_million_tokens),
    ]


def money(usd: float | None) -> str:
    """Three significant digits and at least cents, `-` where there is nothing."""
    if usd is None:
        return "-"
    return f"{usd:.2f}" if usd >= 1 or usd == 0 else f"{usd:.3g}"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _seconds(percentiles: Percentiles | None, name: str) -> str:
    if percentiles is None:
        return "-"
    value: float = getattr(percentiles, name)
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
