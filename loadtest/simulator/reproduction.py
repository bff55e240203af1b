"""The runs of `reproduce` as tables beside what the paper prints, and as figures beside the targets."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Final

import msgspec

from loadtest.report import Check, Table
from loadtest.simulator.paper_figures import (
    ABLATION,
    ABLATION_LEVELS,
    BATCH_BIAS,
    KNOWN_DIFFERENCES,
    NODE_MINUTES,
    ON_DEMAND_MINUTES,
    ON_DEMAND_SECONDS,
    ON_DEMAND_USD_PER_100K_TOKENS,
    P99_RATIOS,
    SECONDS,
    SYSTEMS,
    USD_PER_100K_TOKENS,
    WORKLOAD_RATIOS,
)
from loadtest.simulator.paper_setup import MODELS, TRACES, WORKLOAD_TRACES, Arrivals
from loadtest.simulator.reproduce import (
    ABLATED_TRACES,
    MIXED_AT_COST,
    ONE_BATCH,
    OURS,
    OWN_FLEETS,
    REPLICAS,
    STRONG,
    Outcome,
)
from loadtest.simulator.reproduction_figures import Figures, usd_per_100k_tokens, value_of
from loadtest.simulator.reproduction_rivals import (
    bound_note,
    cost_ratios,
    market_table,
    rival_costs_table,
    rival_ratios,
    rivals_table,
)
from loadtest.simulator.scenario import PAPER_PRICES

PAPER, REPARALLELIZATION, REROUTING = SYSTEMS
PERCENTS: Final = ("mean", "p90", "p95", "p96", "p97", "p98", "p99")
CHECKED_TRACES: Final = ("A_S", "B_S")


class Reproduction(msgspec.Struct, frozen=True, kw_only=True):
    tables: list[Table]
    checks: list[Check]
    notes: list[str]
    """Where ours differs from what is printed, and why."""
    outcomes: list[Outcome]

    def __str__(self) -> str:
        notes = "\n".join(f"- {note}" for note in self.notes)
        return "\n\n".join([*map(str, self.tables), f"Differences\n{notes}", "\n".join(map(str, self.checks))])


def summarize_reproduction(outcomes: Sequence[Outcome]) -> Reproduction:
    """Of all outcomes of `reproduce`."""
    figures = Figures(outcomes)
    return Reproduction(
        tables=[
            seconds_table(figures),
            ratios_table(figures),
            percentiles_table(figures),
            on_demand_table(figures),
            costs_table(figures),
            workload_table(figures),
            ablation_table(figures),
            *(table(figures, arrivals) for arrivals in Arrivals for table in (rivals_table, market_table)),
            rival_costs_table(figures),
        ],
        checks=checks(figures),
        notes=[*KNOWN_DIFFERENCES, own_saving_note(figures), bound_note(figures)],
        outcomes=list(outcomes),
    )


# --- Fig. 6 ---


def seconds_table(figures: Figures) -> Table:
    """GPT-20B beside the artifact's raw seconds."""
    rows = []
    for trace, printed in SECONDS.items():
        for system in SYSTEMS:
            row = [trace, system]
            for name, paper in zip(("mean", "p99"), printed[system], strict=True):
                ours = figures.logged(6, trace, system, name)
                row += [f"{ours:.1f}", f"{paper:.1f}", f"{ours / paper:.2f}"]
            row += [f"{figures.latency(6, trace, system, name):.1f}" for name in ("mean", "p99")]
            rows.append(row)
    columns = ["trace", "system", "mean", "paper", "ratio", "P99", "paper", "ratio", "mean, all", "P99, all"]
    return Table("GPT-20B, latency in seconds, logged requests beside the artifact's figures", columns, rows)


def ratios_table(figures: Figures) -> Table:
    """The twelve panels' P99."""
    rows = []
    for model, traces in P99_RATIOS.items():
        for trace, printed in traces.items():
            row = [model, trace]
            for system, paper in zip((REPARALLELIZATION, REROUTING), printed, strict=True):
                ours = logged_ratio(figures, model, trace, system)
                everything = figures.p99_ratio(6, trace, (system, PAPER), model=model)
                bursty = figures.p99_ratio(6, trace, (system, PAPER), Arrivals.BURSTY, model=model)
                side = "" if (ours > 1) == (paper > 1) else " (!)"
                row += [f"{ours:.2f}{side}", f"{paper:.2f}", f"{everything:.2f}", f"{bursty:.2f}"]
            rows.append(row)
    over = ["paper", "all", "CV 6"]
    columns = ["model", "trace", "over reparallelization", *over, "over rerouting", *over]
    return Table("Fig. 6: P99 of the baselines over that of SpotServe (!: on the other side of 1)", columns, rows)


def percentiles_table(figures: Figures) -> Table:
    """The twelve panels' curves, and ours."""
    rows = [
        [model, trace, system, *(f"{figures.logged(6, trace, system, name, model=model):.1f}" for name in PERCENTS)]
        for model in MODELS
        for trace in TRACES
        for system in (*SYSTEMS, OURS)
    ]
    return Table(
        "Fig. 6: latency in seconds, logged requests",
        ["model", "trace", "system", *(name.replace("p", "P") for name in PERCENTS)],
        rows,
    )


def logged_ratio(figures: Figures, model: str, trace: str, system: str) -> float:
    """P99 as the artifact counts, over that of SpotServe."""
    p99_s = [figures.logged(6, trace, policy, "p99", model=model) for policy in (system, PAPER)]
    return p99_s[0] / p99_s[1]


# --- Fig. 7 ---


def on_demand_table(figures: Figures) -> Table:
    """The constant fleets of Fig. 7."""
    rows = []
    for num, printed in ON_DEMAND_SECONDS.items():
        row = [str(num)]
        for name, paper, bias in zip(("mean", "p99"), printed, BATCH_BIAS, strict=True):
            one, two = (figures.logged(7, str(num), policy, name) for policy in (ONE_BATCH, PAPER))
            row += [f"{one:.1f}", f"{paper:.1f}", f"{one / paper:.2f}", f"{two:.1f}", f"{paper + bias:.1f}"]
        row += [f"{figures.latency(7, str(num), 'on-demand', name):.1f}" for name in ("mean", "p99")]
        rows.append(row)
    columns = ["instances"]
    for name in ("mean", "P99"):
        columns += [f"{name}, one batch", "paper", "ratio", "two batches", "drawn"]
    columns += ["mean, ours", "P99, ours"]
    return Table(
        "Fig. 7: GPT-20B on demand, latency in seconds, by queue depth; ours counts all requests", columns, rows
    )


def costs_table(figures: Figures) -> Table:
    """USD for 100,000 tokens, as the artifact counts them."""
    rows = []
    for trace, printed in USD_PER_100K_TOKENS.items():
        paper, ours = (figures.outcome(6, trace, policy) for policy in (PAPER, OURS))
        rows.append([
            f"spot {trace}",
            f"{usd_per_100k_tokens(paper, billed_usd(trace)):.2f}",
            f"{printed:.2f}",
            f"{value_of(paper.logged, 'mean'):.1f}",
            f"{usd_per_100k_tokens(ours, ours.summary.usd):.2f}",
            f"{value_of(ours.logged, 'mean'):.1f}",
        ])  # fmt: skip
    for num in OWN_FLEETS:
        ours = figures.outcome(7, str(num), "on-demand")
        row = [f"on demand {num}", "", "", "", f"{usd_per_100k_tokens(ours, ours.summary.usd):.2f}"]
        if num in ON_DEMAND_SECONDS:
            paper = figures.outcome(7, str(num), ONE_BATCH)
            row[1] = f"{usd_per_100k_tokens(paper, billed_on_demand_usd(num)):.2f}"
            row[2] = f"{ON_DEMAND_USD_PER_100K_TOKENS[num]:.2f}"
            row[3] = f"{value_of(paper.logged, 'mean'):.1f}"
        rows.append([*row, f"{value_of(ours.logged, 'mean'):.1f}"])
    columns = ["fleet", "spotserve-paper", "paper", "mean (s)", "ours", "mean (s)"]
    return Table("Fig. 7: GPT-20B, USD for 100,000 tokens of logged requests, and their mean latency", columns, rows)


def billed_usd(trace: str) -> float:
    """What the artifact's plot script bills."""
    spot_min, on_demand_min = NODE_MINUTES[trace]
    return (spot_min * PAPER_PRICES.spot_per_h + on_demand_min * PAPER_PRICES.on_demand_per_h) / 60


def billed_on_demand_usd(num_instances: int) -> float:
    """The same, for a constant fleet."""
    return num_instances * ON_DEMAND_MINUTES / 60 * PAPER_PRICES.on_demand_per_h


def printed_saving(figures: Figures) -> float:
    """As the paper compares: ours on B_S with eight on-demand instances of SpotServe's, which are slower."""
    spot, fleet = figures.outcome(6, "B_S", OURS), figures.outcome(7, "8", ONE_BATCH)
    fleet_usd = usd_per_100k_tokens(fleet, billed_on_demand_usd(8))
    return 1 - usd_per_100k_tokens(spot, spot.summary.usd) / fleet_usd


def own_saving_note(figures: Figures) -> str:
    """Ours on B_S, against on-demand instances with our own engine: the fewest that are as fast."""
    spot = figures.outcome(6, "B_S", OURS)
    for num in OWN_FLEETS:
        fleet = figures.outcome(7, str(num), "on-demand")
        if value_of(fleet.logged, "mean") <= value_of(spot.logged, "mean"):
            fleet_usd = usd_per_100k_tokens(fleet, fleet.summary.usd)
            saving = 1 - usd_per_100k_tokens(spot, spot.summary.usd) / fleet_usd
            return f"Ours on B_S saves {saving:.0%} against {num} on-demand instances with our own engine, as fast."
    return f"Even {OWN_FLEETS[-1]} on-demand instances with our own engine are slower on the mean than ours on B_S."


# --- Figs. 8 and 9 ---


def workload_table(figures: Figures) -> Table:
    """Fluctuating load."""
    rows = []
    for trace in WORKLOAD_TRACES:
        for policy in (*SYSTEMS, OURS, STRONG, REPLICAS):
            row = [trace, policy]
            for arrivals in Arrivals:
                row += [f"{figures.latency(8, trace, policy, name, arrivals):.1f}" for name in ("mean", "p99")]
                row.append(f"{figures.p99_ratio(8, trace, (policy, PAPER), arrivals):.2f}")
            rows.append(row)
    return Table(
        f"Fig. 8: GPT-20B, fluctuating load, seconds, all requests; P99 over SpotServe's (printed: {WORKLOAD_RATIOS})",
        ["trace", "system", "mean", "P99", "ratio", "mean, CV 6", "P99, CV 6", "ratio, CV 6"],
        rows,
    )


def ablation_table(figures: Figures) -> Table:
    """SpotServe's parts, and ours."""
    rows = []
    for trace in ABLATED_TRACES:
        for level, title in enumerate(ABLATION_LEVELS):
            row = [trace, title]
            for name in ("mean", "p99"):
                row.append(f"{_ablated(figures, trace, PAPER, name, level):.2f}")
                row.append(f"{ABLATION[trace][name][level]:.2f}")
                row.append(f"{_ablated(figures, trace, PAPER, name, level, Arrivals.BURSTY):.2f}")
                row.append(f"{_ablated(figures, trace, OURS, name, level):.2f}")
            rows.append(row)
    columns = ["trace", "parts"]
    for name in ("mean", "P99"):
        columns += [name, "paper", "CV 6", "ours"]
    return Table(
        "Fig. 9: GPT-20B, latency of all requests over that of the full system, parts removed one after the other",
        columns,
        rows,
    )


def _ablated(
    figures: Figures, trace: str, policy: str, name: str, level: int, arrivals: Arrivals = Arrivals.ARTIFACT
) -> float:
    full, ablated = (figures.latency(9, trace, policy, name, arrivals, level=number) for number in (0, level))
    return ablated / full


# --- Targets ---


def checks(figures: Figures) -> list[Check]:
    """Figures beside their targets."""
    off = [
        abs(figures.logged(6, trace, system, name) / printed - 1)
        for trace in CHECKED_TRACES
        for system in SYSTEMS
        for name, printed in zip(("mean", "p99"), SECONDS[trace][system], strict=True)
    ]
    sides = [
        logged_ratio(figures, model, trace, system) > 1
        for model, traces in P99_RATIOS.items()
        for trace in traces
        for system in (REPARALLELIZATION, REROUTING)
    ]
    against_paper = rival_ratios(figures, PAPER, Arrivals.ARTIFACT)
    return [
        Check(name="GPT-20B on A_S and B_S: worst difference from the artifact", value=max(off), unit="", target=0.2),
        _at_least("P99 ratios on the printed side of 1, of 24", sum(sides), 24),
        _at_least("median P99 of spotserve-paper over ours", median(against_paper), 1.3),
        _at_least("worst P99 of spotserve-paper over ours", min(against_paper), 1.0),
        *(
            _at_least(f"median P99 of {rival} over ours, {arrivals} arrivals", ratio, 1.5)
            for rival in (STRONG, REPLICAS)
            for arrivals in Arrivals
            for ratio in [median(rival_ratios(figures, rival, arrivals))]
        ),
        *(
            _at_least(f"median P99 of replicas over ours at its cost, {arrivals} arrivals", ratio, 1.5)
            for arrivals in Arrivals
            for ratio in [median(rival_ratios(figures, REPLICAS, arrivals, ours=MIXED_AT_COST))]
        ),
        _at_most(
            "the cost of ours at the cost of replicas, over that: worst cell",
            max(ratio for arrivals in Arrivals for ratio in cost_ratios(figures, MIXED_AT_COST, arrivals)),
            1.0,
        ),
        _at_least("saving on B_S against on-demand, as the paper compares", printed_saving(figures), 0.54),
    ]


def _at_least(name: str, value: float | None, target: float) -> Check:
    return Check(name=name, value=value, unit="", target=target, higher_is_better=True)


def _at_most(name: str, value: float, target: float) -> Check:
    return Check(name=name, value=value, unit="", target=target)
