"""The reports of `status` and `plan` as tables that a person reads at a glance. Pure: rich renderables come out."""

from __future__ import annotations

import time
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deploy.report import InstanceReport, PipelineReport, PlannerReport, ShardReport, StatusReport
from planner.protocol import Alternative, Explanation, InstanceState, ParallelConfig, Status

STATE_STYLES: Final = {
    InstanceState.REQUESTED: "blue",
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
        *_planner_lines(report.planner),
        _instance_table(report, now_s),
        _pipeline_table(report.pipelines) if report.pipelines else no_pipeline,
    )


def plan_tables(status: Status) -> Group:
    """The chosen configuration and why, the alternatives with their verdicts, advice, and what led to earlier plans."""
    if status.plan is None:
        return Group(Text("no plan yet: no instance has joined", style="yellow"))
    parts = _decision_parts(status.plan.explanation, f"plan {status.plan.epoch}")
    if status.history and status.history[0].advisory:
        parts += _decision_parts(status.history[0], "advice that nothing acts on")
    if status.history:
        parts.append(_history_table(status.history[:HISTORY_ROWS]))
    return _apart(*parts)


def history_tables(status: Status, num_decisions: int) -> Group:
    """The last decisions in full, newest first."""
    if not status.history:
        return Group(Text("no decision yet: no instance has joined", style="yellow"))
    parts: list[RenderableType] = []
    for explanation in status.history[:num_decisions]:
        kind = "advice that nothing acts on" if explanation.advisory else "plan"
        parts += _decision_parts(explanation, f"{_clock(explanation.decided_at_s)} {kind}")
    return _apart(*parts)


def _decision_parts(explanation: Explanation, title: str) -> list[RenderableType]:
    chosen = describe_configs([explanation.chosen, *explanation.others] if explanation.chosen else [])
    parts: list[RenderableType] = [Text(f"{title}: {chosen}", style="bold"), _facts_table(explanation)]
    if explanation.alternatives:
        parts.append(_alternatives_table(explanation.alternatives))
    return parts


def describe_configs(configs: list[ParallelConfig]) -> str:
    """`2 pipelines of 1 stage, tensor degree 3, up to 8 sequences each`, with `, and ` between shapes."""
    return ", and ".join(describe_config(config) for config in configs) or describe_config(None)


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
    table.add_row("load", _describe_load(explanation))
    if explanation.objective:
        table.add_row(
            "goal", f"{explanation.objective}; the next event is expected in {_span(explanation.expected_calm_s)}"
        )
    moved, reused = describe_bytes(explanation.bytes_moved), describe_bytes(explanation.bytes_reused)
    table.add_row("weights", f"{moved} moved, {reused} reused in place")
    table.add_row("pause", f"about {explanation.migration_s * 1000:.0f} ms to migrate (estimate)")
    for note in explanation.notes:
        table.add_row("note", note)
    return table


def _describe_load(explanation: Explanation) -> str:
    load = f"{explanation.arrivals_per_s:.2f} requests/s on {explanation.num_ranks} rank(s)"
    if explanation.prompt_tokens or explanation.output_tokens:
        load += f", {explanation.prompt_tokens:.0f} prompt and {explanation.output_tokens:.0f} output tokens each"
    return load


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _planner_lines(planner: PlannerReport) -> list[RenderableType]:
    """What is out of the ordinary."""
    lines: list[RenderableType] = []
    if planner.advisory:
        lines.append(Text("advisory: only what keeps the fleet serving is carried out", style="yellow"))
    if planner.last_failure:
        text = f"the planner could not decide ({planner.last_failure}): the last plan stands"
        lines.append(Text(text, style="red"))
    if planner.desired is not None:
        wanted = f"wanted: {planner.desired['spot']} spot, {planner.desired['on_demand']} on-demand"
        lines.append(Text(f"{wanted} ({planner.desired['reason']})"))
    return lines


def _decision_time(explanation: Explanation) -> str:
    return f"{max(0.0, explanation.decided_at_s - explanation.cause_at_s) * 1000:.0f} ms"


def _alternatives_table(alternatives: list[Alternative]) -> Table:
    """D x P x M of each; columns that nothing is known of are left out."""
    has_prices = any(one.usd_per_h for one in alternatives)
    has_moves = any(one.bytes_moved is not None or one.pause_s is not None for one in alternatives)
    columns = ["pipelines x stages x tensor", "batch", "ranks", "latency", "throughput"]
    table = _table(*columns, *["USD/h"] * has_prices, *["moves", "pause"] * has_moves, "verdict")
    for one in alternatives:
        cells = [
            " + ".join(f"{c.data}x{c.pipeline}x{c.tensor}" for c in [one.config, *one.others]),
            str(one.config.max_batch),
            str(one.num_ranks),
            f"{one.latency_s:.2f} s",
            f"{one.throughput_per_s:.2f}/s",
        ]
        if has_prices:
            cells.append(f"{one.usd_per_h:.2f}")
        if has_moves:
            cells.append("" if one.bytes_moved is None else describe_bytes(one.bytes_moved))
            cells.append("" if one.pause_s is None else f"{one.pause_s * 1000:.0f} ms")
        table.add_row(*cells, one.verdict)
    return table


def _history_table(history: list[Explanation]) -> Table:
    table = _table("decided", "cause", "chosen", "moved", "pause")
    for one in history:
        table.add_row(
            _clock(one.decided_at_s),
            one.cause,
            ("advice: " if one.advisory else "") + describe_configs([one.chosen, *one.others] if one.chosen else []),
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
