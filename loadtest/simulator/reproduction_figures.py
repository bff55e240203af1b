"""The outcomes of `reproduce` by what was run, for tables and checks."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from loadtest.simulator.metrics import Percentiles
from loadtest.simulator.paper_setup import MAX_MODEL_LEN, WORKLOAD_MODEL, Arrivals
from loadtest.simulator.reproduce import BURSTY_SEEDS, Outcome


class Figures:
    """Outcomes by what was run. Of several seeds the figure is the median."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self._by_task = {
            (o.task.figure, o.task.model, o.task.trace, o.task.policy, o.task.arrivals, o.task.level, o.task.seed): o
            for o in outcomes
        }

    def outcome(
        self,
        figure: int,
        trace: str,
        policy: str,
        arrivals: Arrivals = Arrivals.ARTIFACT,
        *,
        model: str = WORKLOAD_MODEL,
        level: int = 0,
        seed: int = 0,
    ) -> Outcome:
        return self._by_task[figure, model, trace, policy, arrivals, level, seed]

    def logged(self, figure: int, trace: str, policy: str, name: str, *, model: str = WORKLOAD_MODEL) -> float:
        """The artifact's metric on the artifact's arrivals."""
        return value_of(self.outcome(figure, trace, policy, model=model).logged, name)

    def latency(
        self,
        figure: int,
        trace: str,
        policy: str,
        name: str,
        arrivals: Arrivals = Arrivals.ARTIFACT,
        *,
        model: str = WORKLOAD_MODEL,
        level: int = 0,
    ) -> float:
        """All requests."""
        return median(
            value_of(
                self.outcome(figure, trace, policy, arrivals, model=model, level=level, seed=seed).summary.latency, name
            )
            for seed in seeds_of(arrivals)
        )

    def p99_ratio(
        self,
        figure: int,
        trace: str,
        policies: tuple[str, str],
        arrivals: Arrivals = Arrivals.ARTIFACT,
        *,
        model: str = WORKLOAD_MODEL,
    ) -> float:
        """P99 of all requests, of the first policy over that of the second."""
        pairs = [
            [self.outcome(figure, trace, policy, arrivals, model=model, seed=seed) for policy in policies]
            for seed in seeds_of(arrivals)
        ]
        return median(value_of(a.summary.latency, "p99") / value_of(b.summary.latency, "p99") for a, b in pairs)

    def bound_ratio(self, trace: str, policy: str, arrivals: Arrivals, *, model: str) -> float:
        """P99 in a cell of Fig. 6 over the latency of a lone request on the best shape."""
        outcomes = [self.outcome(6, trace, policy, arrivals, model=model, seed=seed) for seed in seeds_of(arrivals)]
        return median(value_of(o.summary.latency, "p99") / o.lone_s for o in outcomes)

    def usd(self, trace: str, policy: str, arrivals: Arrivals, *, model: str) -> float:
        """Of a cell of Fig. 6."""
        seeds = seeds_of(arrivals)
        return median(self.outcome(6, trace, policy, arrivals, model=model, seed=seed).summary.usd for seed in seeds)

    def cost_ratio(self, trace: str, policies: tuple[str, str], arrivals: Arrivals, *, model: str) -> float:
        """USD in a cell of Fig. 6, of the first policy over that of the second."""
        pairs = [
            [self.outcome(6, trace, policy, arrivals, model=model, seed=seed) for policy in policies]
            for seed in seeds_of(arrivals)
        ]
        return median(a.summary.usd / b.summary.usd for a, b in pairs)


def seeds_of(arrivals: Arrivals) -> tuple[int, ...]:
    """What is drawn more than once."""
    return BURSTY_SEEDS if arrivals is Arrivals.BURSTY else (0,)


def usd_per_100k_tokens(outcome: Outcome, usd: float) -> float:
    """Input and output tokens of the logged requests; infinite of none."""
    num_tokens = outcome.num_logged * MAX_MODEL_LEN
    return usd / num_tokens * 1e5 if num_tokens else float("inf")


def value_of(latencies: Percentiles | None, name: str) -> float:
    """One of the percentiles; infinite of none: nothing was completed."""
    value = float("inf") if latencies is None else getattr(latencies, name)
    assert isinstance(value, float)
    return value
