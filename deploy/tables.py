"""The reports of `status` and `plan` as tables that a person reads at a glance. Pure: rich renderables come out."""

from __future__ import annotations

import time
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deploy.report import InstanceReport, PipelineReport, ShardReport, StatusReport
from planner.protocol import Alternative, Explanation, InstanceState, ParallelConfig, Status

STATE_STYLES: Final = {
    InstanceState.STARTING: "cyan",
    InstanceState.READY: "green",
    InstanceState.GRACE: "yellow",
    InstanceState.LOST: "red",
}
HISTORY_ROWS: Final = 10


def status_tables(report: StatusReport, now_s: float) -> Group:
    """Instances, pipelines and requests; deadlines count down from `now_s`."""
    requests = report.requests
    counts = (
        "requests unknown (the gateway does not answer)"
        if requests.running is None
        else f"{requests.running} running, {requests.waiting} waiting"
    )
    no_pipeline = Text("no pipeline: requests wait", style="yellow")
    return _apart(
        Text(f"epoch {report.epoch}, {counts}", style="bold"),
        _instance_table(report, now_s),
        _pipeline_table(report.pipelines) if report.pipelines else no_pipeline,
    )


def plan_tables(status: Status) -> Group:
    """The chosen configuration, the alternatives with their verdicts, and what led to earlier plans."""
    if status.plan is None:
        return Group(Text("no plan yet: no instance has joined", style="yellow"))
    explanation = status.plan.explanation
    parts: list[RenderableType] = [
        Text(f"plan {status.plan.epoch}: {describe_config(explanation.chosen)}", style="bold"),
        _facts_table(explanation),
    ]
    if explanation.alternatives:
        parts.append(_alternatives_table(explanation.alternatives))
    if status.history:
        parts.append(_history_table(status.history[:HISTORY_ROWS]))
    return _apart(*parts)


def describe_config(config: ParallelConfig | None) -> str:
    """`2 pipelines of 1 stage, tensor degree 3, up to 8 sequences each`."""
    if config is None:
        return "nothing to run on"
    return (
        f"{config.data} pipeline{'s' * (config.data != 1)} of {config.pipeline} stage{'s' * (config.pipeline != 1)}, "
        f"tensor degree {config.tensor}, up to {config.max_batch} sequences each"
    )


def describe_bytes(num_bytes: float) -> str:
    """`12.3 MB`."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def _apart(*parts: RenderableType) -> Group:
    """With an empty line between two parts."""
    spaced = [line for part in parts for line in (part, Text())]
    return Group(*spaced[:-1])


def _instance_table(report: StatusReport, now_s: float) -> Table:
    table = _table("instance", "market", "state", "leaves in", "ranks")
    for instance in report.instances:
        state = Text(instance.state.value, style=STATE_STYLES[instance.state])
        table.add_row(instance.id, instance.market.value, state, _countdown(instance, now_s), ", ".join(instance.ranks))
    return table


def _countdown(instance: InstanceReport, now_s: float) -> str:
    if instance.deadline_s is None or instance.state is InstanceState.LOST:
        return ""
    return f"{max(0.0, instance.deadline_s - now_s):.0f} s"


def _pipeline_table(pipelines: list[PipelineReport]) -> Table:
    table = _table("pipeline", "running", "stage", "layers", "ranks (head groups)")
    for pipeline in pipelines:
        for number, stage in enumerate(pipeline.stages):
            head = (pipeline.id, str(pipeline.running)) if number == 0 else ("", "")
            shards = ", ".join(_describe_shard(shard) for shard in stage.shards)
            table.add_row(*head, str(number), f"{stage.layers[0]}-{stage.layers[1]}", shards)
    return table


def _describe_shard(shard: ShardReport) -> str:
    first, last = shard.head_groups
    return f"{shard.rank} ({first}-{last})" if first != last else f"{shard.rank} ({first})"


def _facts_table(explanation: Explanation) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("cause", explanation.cause)
    table.add_row("decided", f"{_clock(explanation.decided_at_s)}, {_decision_time(explanation)} after the cause")
    table.add_row("load", f"{explanation.arrivals_per_s:.2f} requests/s on {explanation.num_ranks} rank(s)")
    moved, reused = describe_bytes(explanation.bytes_moved), describe_bytes(explanation.bytes_reused)
    table.add_row("weights", f"{moved} moved, {reused} reused in place")
    table.add_row("pause", f"about {explanation.migration_s * 1000:.0f} ms to migrate (estimate)")
    for note in explanation.notes:
        table.add_row("note", note)
    return table


def _decision_time(explanation: Explanation) -> str:
    return f"{max(0.0, explanation.decided_at_s - explanation.cause_at_s) * 1000:.0f} ms"


def _alternatives_table(alternatives: list[Alternative]) -> Table:
    table = _table("pipelines", "stages", "tensor", "batch", "ranks", "latency", "throughput", "verdict")
    for one in alternatives:
        table.add_row(
            str(one.config.data),
            str(one.config.pipeline),
            str(one.config.tensor),
            str(one.config.max_batch),
            str(one.num_ranks),
            f"{one.latency_s:.2f} s",
            f"{one.throughput_per_s:.2f}/s",
            one.verdict,
        )
    return table


def _history_table(history: list[Explanation]) -> Table:
    table = _table("decided", "cause", "chosen", "moved", "pause")
    for one in history:
        table.add_row(
            _clock(one.decided_at_s),
            one.cause,
            describe_config(one.chosen),
            describe_bytes(one.bytes_moved),
            f"{one.migration_s * 1000:.0f} ms",
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _clock(at_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at_s))
