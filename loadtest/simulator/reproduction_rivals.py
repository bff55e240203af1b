"""Ours beside its rivals, cell by cell of Fig. 6: latency, cost, and how far a policy could go at all."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Final

from loadtest.report import Table
from loadtest.simulator.paper_setup import MODELS, TRACES, Arrivals
from loadtest.simulator.reproduce import MIXED_AT_COST, OUR_PREFILL, OURS, REPLICAS, STRONG
from loadtest.simulator.reproduction_figures import Figures, usd_per_100k_tokens

RIVALS: Final = ("spotserve-paper", OUR_PREFILL, STRONG, REPLICAS)
CELLS: Final = tuple((model, trace) for model in MODELS for trace in TRACES)
BOUND: Final = "in brackets: over a lone request on the best shape, which no policy can beat"


def rivals_table(figures: Figures, arrivals: Arrivals) -> Table:
    """P99 of all requests: theirs over ours."""
    rows = []
    for model, trace in CELLS:
        row = [model, trace]
        row += [f"{figures.latency(6, trace, OURS, name, arrivals, model=model):.1f}" for name in ("mean", "p99")]
        for rival in RIVALS:
            ratio = figures.p99_ratio(6, trace, (rival, OURS), arrivals, model=model)
            bound = figures.bound_ratio(trace, rival, arrivals, model=model)
            p99_s = figures.latency(6, trace, rival, "p99", arrivals, model=model)
            row += [f"{p99_s:.1f}", f"{ratio:.2f} ({bound:.2f})"]
        rows.append(row)
    medians = [
        f"{median(rival_ratios(figures, rival, arrivals)):.2f} ({median(bounds(figures, rival, arrivals)):.2f})"
        for rival in RIVALS
    ]
    rows.append(["median", "", "", "", *(cell for ratio in medians for cell in ("", ratio))])
    columns = ["model", "trace", "mean", "P99", *(cell for rival in RIVALS for cell in (rival, "ratio"))]
    return Table(
        f"Ours: P99 in seconds of all requests, and theirs over it; {arrivals} arrivals; {BOUND}", columns, rows
    )


def market_table(figures: Figures, arrivals: Arrivals) -> Table:
    """Ours in the market of `replicas`: what it makes of it with no more money than that."""
    rows = []
    for model, trace in CELLS:
        bound = figures.bound_ratio(trace, REPLICAS, arrivals, model=model)
        replicas_s = figures.latency(6, trace, REPLICAS, "p99", arrivals, model=model)
        row = [model, trace, f"{replicas_s:.1f}", f"{figures.usd(trace, REPLICAS, arrivals, model=model):.2f}"]
        row.append(f"{figures.latency(6, trace, MIXED_AT_COST, 'p99', arrivals, model=model):.1f}")
        row.append(f"{figures.p99_ratio(6, trace, (REPLICAS, MIXED_AT_COST), arrivals, model=model):.2f} ({bound:.2f})")
        row.append(f"{figures.cost_ratio(trace, (MIXED_AT_COST, REPLICAS), arrivals, model=model):.2f}")
        rows.append(row)
    ratios = rival_ratios(figures, REPLICAS, arrivals, ours=MIXED_AT_COST)
    costs = cost_ratios(figures, MIXED_AT_COST, arrivals)
    rows += [
        ["median", "", "", "", "", f"{median(ratios):.2f}", f"{median(costs):.2f}"],
        ["worst", "", "", "", "", f"{min(ratios):.2f}", f"{max(costs):.2f}"],
    ]
    columns = ["model", "trace", REPLICAS, "USD", "spotserve-mixed", "ratio", "cost"]
    title = f"Ours in the market of replicas: P99 in seconds, theirs over it, our cost over theirs; {arrivals} arrivals"
    return Table(f"{title}; {BOUND}", columns, rows)


def rival_costs_table(figures: Figures) -> Table:
    """What the P99 of `rivals_table` costs."""
    policies = (OURS, STRONG, REPLICAS)
    rows = []
    for model, trace in CELLS:
        outcomes = [figures.outcome(6, trace, policy, model=model) for policy in policies]
        rows.append([model, trace, *(f"{usd_per_100k_tokens(o, o.summary.usd):.2f}" for o in outcomes)])
    return Table("Ours: USD for 100,000 tokens of logged requests", ["model", "trace", *policies], rows)


def rival_ratios(figures: Figures, rival: str, arrivals: Arrivals, *, ours: str = OURS) -> list[float]:
    """P99, theirs over ours, of the twelve cells."""
    return [figures.p99_ratio(6, trace, (rival, ours), arrivals, model=model) for model, trace in CELLS]


def cost_ratios(figures: Figures, ours: str, arrivals: Arrivals) -> list[float]:
    """Ours over that of `replicas`, of the twelve cells."""
    return [figures.cost_ratio(trace, (ours, REPLICAS), arrivals, model=model) for model, trace in CELLS]


def bounds(figures: Figures, rival: str, arrivals: Arrivals) -> list[float]:
    """The greatest ratio that any policy could have over `rival`, of the twelve cells."""
    return [figures.bound_ratio(trace, rival, arrivals, model=model) for model, trace in CELLS]


def bound_note(figures: Figures) -> str:
    """How far a ratio could go at all."""

    def told(values: Sequence[float]) -> str:
        return f"{median(values):.2f} in the median cell ({sum(value >= 1.5 for value in values)} of 12 reach 1.5)"

    rivals = [f"{rival}: {told(bounds(figures, rival, Arrivals.ARTIFACT))}" for rival in (STRONG, REPLICAS)]
    return (
        "Bounds. A request that is alone on the pipeline of least latency takes so long that no policy, with whatever "
        "instances, can have a P99 that is better, on the artifact's arrivals, by more than this: over "
        + "; over ".join(rivals)
        + "."
    )
