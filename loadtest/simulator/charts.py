"""The plots of a report, as plotly figures in plain data: built from results alone, thinned out, the same every time.

A figure is `data` (traces) and `layout` of https://plotly.com/javascript/reference/.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, Final

import msgspec

from loadtest.simulator.result import Fate, FleetSample, Outcome, Result
from loadtest.simulator.scenario import CapacityTrace

COLORS: Final = {
    "spotserve": "#0072B2",
    "spotserve-mixed": "#F0E442",
    "spotserve-paper": "#E69F00",
    "reparallelization": "#009E73",
    "rerouting": "#D55E00",
    "rerouting-strong": "#CC79A7",
    "replicas": "#56B4E9",
    "on-demand": "#555555",
}
"""Colours that also the colour-blind can tell apart (Okabe and Ito); a policy has the same one in every report."""
OTHER_COLORS: Final = ("#882255", "#117733", "#999933", "#332288")
PERCENTILES: Final = tuple(
    [p / 1 for p in range(91)] + [90 + p / 4 for p in range(1, 37)] + [99 + p / 20 for p in range(1, 19)] + [99.95]
)
TAIL_TICKS: Final = (0.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9)
MAX_MARKS: Final = 200
MAX_POINTS: Final = 1000
ROW_PX: Final = 115


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    title: str
    note: str
    """How to read it, in a sentence or two."""
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height_px: int = 380


class CostPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One policy in the plane of cost and latency."""

    policy: str
    usd_per_million_tokens: float | None
    mean_s: float | None
    p99_s: float | None


def color_of(policy: str, others: Sequence[str] = ()) -> str:
    """Its fixed colour; of a policy without one the next free one, by its place among `others`."""
    if policy in COLORS:
        return COLORS[policy]
    unknown = [name for name in others if name not in COLORS]
    return OTHER_COLORS[unknown.index(policy) % len(OTHER_COLORS)] if policy in unknown else OTHER_COLORS[0]


def latency_curves(results: Sequence[Result]) -> Chart:
    """Latency at each percentile of all requests; the axis is stretched towards the tail."""
    data = []
    for result in results:
        latencies = sorted(_latency_or_never(outcome) for outcome in result.outcomes)
        points = [(p, _at(latencies, p)) for p in PERCENTILES if latencies and p <= 100 - 100 / len(latencies)]
        data.append(
            _line(
                result.policy,
                results,
                x=[_tail(p) for p, _ in points],
                y=[_figure(latency_s) for _, latency_s in points],
                text=[f"P{p:g}" for p, _ in points],
                hovertemplate="%{text}: %{y:.3s} s",
            )
        )
    ticks = {"tickvals": [_tail(p) for p in TAIL_TICKS], "ticktext": [f"{p:g}" for p in TAIL_TICKS]}
    return Chart(
        id="latency-curves",
        title="Latency by percentile",
        note="End to end, of every request that arrived. An unfinished request counts with its age at the end; where "
        "requests were lost, the curve ends. Lower is better; the right half of the axis is the slowest tenth.",
        data=data,
        layout=_layout({"title": "percentile of requests", **ticks}, _log({"title": "latency (s)"})),
    )


def latency_over_time(results: Sequence[Result], trace: CapacityTrace) -> Chart:
    """A row a policy, a dot a request; of too many, the slowest and the median one of every short window."""
    layout = _rows([result.policy for result in results], _time(results), _log({}))
    data: list[dict[str, Any]] = []
    for row, result in enumerate(results):
        color = color_of(result.policy, [result.policy for result in results])
        axes = {"xaxis": "x", "yaxis": _y(row), "type": "scatter", "mode": "markers", "showlegend": False}
        for fate, symbol, mark in ((Fate.COMPLETED, "circle", color), (Fate.UNFINISHED, "circle-open", color)):
            shown = _thinned([outcome for outcome in result.outcomes if outcome.fate is fate], trace.end_s)
            data.append(
                {
                    **axes,
                    "x": [_seconds(outcome.arrival_s) for outcome in shown],
                    "y": [_round(max(outcome.latency_s, 1e-3)) for outcome in shown],
                    "marker": {"color": mark, "size": 4, "symbol": symbol, "opacity": 0.75},
                    "hovertemplate": f"arrived at %{{x:.0f}} s: %{{y:.3s}} s, {fate.value}<extra></extra>",
                }
            )
    layout |= {"shapes": [*_marks(trace, len(results))], "hovermode": "closest"}
    return Chart(
        id="latency-over-time",
        title="Latency by time of arrival",
        note="A dot a request (of many, the slowest and the median of each short window), seconds end to end; a ring: "
        "unfinished, with its age. Red marks: instances are taken away; green marks: instances join.",
        data=data,
        layout=layout,
        height_px=90 + ROW_PX * len(results),
    )


def fleet_over_time(results: Sequence[Result], ranks_per_instance: int) -> Chart:
    """A row a policy: instances by market, and how many of them work."""
    data: list[dict[str, Any]] = []
    for row, result in enumerate(results):
        axes = {"xaxis": "x", "yaxis": _y(row)}
        samples = _until_end(result)
        stacked = {"stackgroup": str(row), "line": {"shape": "hv", "width": 0}, "mode": "lines", **axes}
        common = {"x": [_seconds(at_s) for at_s, _ in samples], "showlegend": row == 0}
        data += [
            _band("spot", [sample.num_spot for _, sample in samples], "#9ecae1", common | stacked),
            _band("on-demand", [sample.num_on_demand for _, sample in samples], "#fdae6b", common | stacked),
            {
                **common,
                **axes,
                "type": "scatter",
                "name": "at work",
                "legendgroup": "at work",
                "mode": "lines",
                "y": [_round(sample.num_ranks_used / ranks_per_instance) for _, sample in samples],
                "line": {"shape": "hv", "width": 2, "color": "#222222"},
                "hovertemplate": "at work: %{y}",
            },
        ]
    return Chart(
        id="fleet",
        title="Fleet over time",
        note="Instances that are paid for, by market, and (black line) how many of them have a place in a pipeline.",
        data=data,
        layout=_rows([result.policy for result in results], _time(results), {"rangemode": "tozero"}),
        height_px=90 + ROW_PX * len(results),
    )


def configuration_over_time(results: Sequence[Result]) -> Chart:
    """A strip a policy, cut where the pipelines that serve change."""
    data = []
    policies = [result.policy for result in results]
    for result in results:
        spans = _configuration_spans(result)
        color = color_of(result.policy, policies)
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": result.policy,
                "showlegend": False,
                "y": [result.policy for _ in spans],
                "base": [_seconds(first_s) for first_s, _, _ in spans],
                "x": [_seconds(last_s - first_s) for first_s, last_s, _ in spans],
                "text": [label for _, _, label in spans],
                "textposition": "inside",
                "insidetextanchor": "middle",
                "textangle": 0,
                "marker": {
                    "color": ["#f4c7c3" if label == NOTHING else f"{color}55" for _, _, label in spans],
                    "line": {"color": "#ffffff", "width": 1.5},
                },
                "textfont": {"color": "#222222", "size": 11},
                "hovertemplate": "%{base:.0f} s, for %{x:.0f} s: %{text}<extra>" + result.policy + "</extra>",
            }
        )
    layout = _layout(_time(results), {"autorange": "reversed", "automargin": True})
    layout |= {
        "barmode": "overlay",
        "bargap": 0.25,
        "uniformtext": {"mode": "hide", "minsize": 8},
        "hovermode": "closest",
    }
    return Chart(
        id="configuration",
        title="Configuration over time",
        note="2xP3T4: two pipelines of three stages, tensor degree 4. Red: nothing serves. Where there is no room for "
        "the words, hover.",
        data=data,
        layout=layout,
        height_px=110 + 46 * len(results),
    )


def cost_against_latency(points: Sequence[CostPoint]) -> Chart:
    """Mean and P99 of each policy over what its tokens cost."""
    policies = [point.policy for point in points]
    data = []
    for point in points:
        color = color_of(point.policy, policies)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": point.policy,
                "x": [_figure(point.usd_per_million_tokens)] * 2,
                "y": [_figure(point.mean_s), _figure(point.p99_s)],
                "line": {"color": color, "width": 1.5},
                "marker": {"color": ["#ffffff", color], "size": 11, "line": {"color": color, "width": 2}},
                "hovertemplate": "%{y:.3s} s at %{x:.3s} USD per million tokens",
                "cliponaxis": False,
            }
        )
    layout = _layout(
        {"title": "cost (USD per million tokens of completed requests)", "rangemode": "tozero"},
        _log({"title": "latency (s)"}),
    )
    layout["hovermode"] = "closest"
    return Chart(
        id="cost",
        title="Cost against latency",
        note="Empty circle: mean; full circle: P99. The lower left corner is where one wants to be.",
        data=data,
        layout=layout,
        height_px=440,
    )


def pauses(results: Sequence[Result]) -> Chart:
    """What each change of the fleet cost; of too many, the longest."""
    policies = [result.policy for result in results]
    data = []
    for result in results:
        longest = sorted(result.pauses, key=lambda pause: (-pause.pause_s, pause.at_s))[:MAX_POINTS]
        shown = sorted(longest, key=lambda pause: pause.at_s)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": result.policy,
                "x": [_seconds(pause.at_s) for pause in shown],
                "y": [_figure(pause.pause_s) for pause in shown],
                "text": [
                    f"{pause.cause}<br>{pause.moved_bytes / 1e9:.1f} GB moved, "
                    f"{pause.tokens_recomputed} tokens recomputed"
                    for pause in shown
                ],
                "marker": {"color": color_of(result.policy, policies), "size": 9, "opacity": 0.8},
                "hovertemplate": "%{y:.3s} s: %{text}",
            }
        )
    layout = _layout(_time(results), {"title": "pause (s)", "rangemode": "tozero"})
    layout["hovermode"] = "closest"
    return Chart(
        id="pauses",
        title="Pause of each event",
        note="The longest time that a pipeline stood still for a change of the fleet.",
        data=data,
        layout=layout,
    )


def bars(
    chart_id: str, title: str, note: str, names: Sequence[str], values: Mapping[str, Sequence[float]], y_title: str
) -> Chart:
    """Groups of bars, one a name; in each a bar a policy."""
    data = [
        {
            "type": "bar",
            "name": policy,
            "x": list(names),
            "y": [_figure(value) for value in heights],
            "marker": {"color": color_of(policy, list(values))},
            "hovertemplate": f"{policy}: %{{y:.3s}}<extra></extra>",
        }
        for policy, heights in values.items()
    ]
    layout = _layout({}, _log({"title": y_title}))
    layout["hovermode"] = "closest"
    return Chart(id=chart_id, title=title, note=note, data=data, layout=layout, height_px=420)


NOTHING: Final = "nothing"


def describe_shapes(shapes: Iterable[tuple[int, int]]) -> str:
    """`2xP3T4 + 1xP1T4`: how many pipelines of how many stages and which tensor degree, largest first."""
    ordered = sorted(shapes, key=lambda shape: (-shape[0] * shape[1], shape))
    counted = [(len(list(same)), shape) for shape, same in groupby(ordered)]
    return " + ".join(f"{number}xP{pipeline}T{tensor}" for number, (pipeline, tensor) in counted) or NOTHING


def _configuration_spans(result: Result) -> list[tuple[float, float, str]]:
    """(from, to, label), neighbours with the same label joined."""
    samples = _until_end(result)
    steps = [
        (first_s, next_s, describe_shapes(sample.shapes))
        for (first_s, sample), (next_s, _) in pairwise(samples)
        if next_s > first_s
    ]
    joined = [list(same) for _, same in groupby(steps, key=lambda step: step[2])]
    return [(same[0][0], same[-1][1], same[0][2]) for same in joined]


def _until_end(result: Result) -> list[tuple[float, FleetSample]]:
    """The fleet's samples, the last one once more at the end."""
    samples = [(sample.at_s, sample) for sample in result.fleet if sample.at_s <= result.end_s]
    if samples:
        samples.append((result.end_s, samples[-1][1]))
    return samples


def _band(name: str, heights: list[int], color: str, common: dict[str, Any]) -> dict[str, Any]:
    hover = f"{name}: %{{y}}"
    return {
        **common,
        "type": "scatter",
        "name": name,
        "legendgroup": name,
        "y": heights,
        "fillcolor": color,
        "hovertemplate": hover,
    }


def _thinned(outcomes: Sequence[Outcome], end_s: float) -> list[Outcome]:
    """All, or of every short window of arrivals the slowest and the median one."""
    if len(outcomes) <= MAX_POINTS:
        return list(outcomes)
    windows: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        windows.setdefault(int(outcome.arrival_s / max(end_s, 1e-9) * MAX_POINTS / 2), []).append(outcome)
    kept = []
    for number in sorted(windows):
        ascending = sorted(windows[number], key=lambda outcome: outcome.latency_s)
        kept += [ascending[len(ascending) // 2], ascending[-1]] if len(ascending) > 1 else ascending
    return kept


def _marks(trace: CapacityTrace, num_rows: int) -> Iterable[dict[str, Any]]:
    """A line at the foot of every row: red for each removal, green for each addition after the start."""
    events = [event for event in trace.events if event.at_s > 0 and (event.removed or event.added)][:MAX_MARKS]
    for event in events:
        line = {"color": "#c0392b" if event.removed else "#27ae60", "width": 2}
        for row in range(num_rows):
            foot = f"{_y(row)} domain"
            at_s = _seconds(event.at_s)
            yield {"type": "line", "xref": "x", "yref": foot, "x0": at_s, "x1": at_s, "y0": 0, "y1": 0.1, "line": line}


def _rows(titles: Sequence[str], x_axis: dict[str, Any], y_axis: dict[str, Any]) -> dict[str, Any]:
    """Layout of plots above each other that share the axis of time."""
    layout = _layout({**x_axis, "anchor": _y(len(titles) - 1)}, {})
    del layout["yaxis"]
    for row, title in enumerate(titles):
        top = 1 - row / len(titles)
        layout["yaxis" if row == 0 else f"yaxis{row + 1}"] = {
            **_axis(y_axis),
            "title": {"text": title, "font": {"size": 11}},
            **({"matches": "y"} if row else {}),
            "domain": [round(top - 0.86 / len(titles), 4), round(top, 4)],
        }
    return layout


def _time(results: Sequence[Result]) -> dict[str, Any]:
    """The axis of time, whole."""
    return {"title": "time (s)", "range": [0, _seconds(max((result.end_s for result in results), default=0.0))]}


def _y(row: int) -> str:
    """Plotly's name of the y axis of a row."""
    return "y" if row == 0 else f"y{row + 1}"


def _log(axis: dict[str, Any]) -> dict[str, Any]:
    """A logarithmic axis with plain numbers at 1, 2, 5 of every decade."""
    ticks = [digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)]
    return {**axis, "type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _line(
    policy: str, results: Sequence[Result], *, line: dict[str, Any] | None = None, **fields: Any
) -> dict[str, Any]:
    color = color_of(policy, [result.policy for result in results])
    style = {"color": color, "width": 2, **(line or {})}
    return {"type": "scatter", "mode": "lines", "name": policy, "line": style, **fields}


def _layout(x_axis: dict[str, Any], y_axis: dict[str, Any]) -> dict[str, Any]:
    return {
        "template": {"layout": {"font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222222"}}},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "margin": {"l": 70, "r": 20, "t": 20, "b": 50},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "x unified",
        "xaxis": _axis(x_axis),
        "yaxis": _axis(y_axis),
    }


def _axis(given: dict[str, Any]) -> dict[str, Any]:
    title = given.get("title")
    named = {"title": {"text": title}} if isinstance(title, str) else {}
    return {"gridcolor": "#e6e6e6", "zerolinecolor": "#cccccc", "linecolor": "#888888", **given, **named}


def _latency_or_never(outcome: Outcome) -> float:
    return math.inf if outcome.fate is Fate.LOST else outcome.latency_s


def _at(ascending: Sequence[float], percentile: float) -> float:
    """As `metrics.percentiles` counts: the value at index n * p / 100."""
    return ascending[min(len(ascending) - 1, int(len(ascending) * percentile / 100 + 1e-9))]


def _tail(percentile: float) -> float:
    return round(-math.log10(1 - percentile / 100), 4)


def _figure(value: float | None) -> float | None:
    """None where there is none, which leaves a gap."""
    return None if value is None or not math.isfinite(value) else _round(value)


def _round(value: float) -> float:
    """Four significant digits: more would only make the file large."""
    return float(f"{value:.4g}")


def _seconds(value: float) -> float:
    return round(value, 2)
