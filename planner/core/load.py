"""Arrivals and lengths that the gateways report, and when a change is worth a new decision."""

from __future__ import annotations

from typing import Final

from planner.core.cost_model import Workload
from planner.protocol import LoadReport

REPORT_LIFETIME_S: Final = 10.0
MIN_CHANGE: Final = 0.2
MIN_INTERVAL_S: Final = 30.0
"""Arrivals are means over 30 s, so two decisions sooner than that would hear the same change twice."""


class Load:
    def __init__(self) -> None:
        self._reports: dict[str, tuple[LoadReport, float]] = {}
        self._decided_per_s = 0.0
        self._decided_at_s = 0.0

    def note(self, report: LoadReport, now_s: float) -> None:
        self._reports[report.gateway] = (report, now_s)

    def workload(self, max_model_len: int, now_s: float) -> Workload:
        """Of all gateways heard of lately; typical lengths are assumed until requests have been seen."""
        reports = [report for report, at_s in self._reports.values() if now_s - at_s < REPORT_LIFETIME_S]
        total_per_s = sum(report.arrivals_per_s for report in reports)
        assumed = Workload()

        def mean(field: str, otherwise: float) -> float:
            known = [r for r in reports if getattr(r, field) > 0 and r.arrivals_per_s > 0]
            weight = sum(r.arrivals_per_s for r in known)
            return sum(getattr(r, field) * r.arrivals_per_s for r in known) / weight if known else otherwise

        return Workload(
            arrivals_per_s=total_per_s,
            prompt_tokens=min(mean("mean_prompt_tokens", assumed.prompt_tokens), max_model_len / 2),
            output_tokens=min(mean("mean_output_tokens", assumed.output_tokens), max_model_len / 2),
        )

    def note_decision(self, arrivals_per_s: float, now_s: float) -> None:
        self._decided_per_s, self._decided_at_s = arrivals_per_s, now_s

    def change(self, arrivals_per_s: float, now_s: float) -> str | None:
        """In words, if the arrivals have changed enough since the last decision, and that is long enough ago."""
        before = self._decided_per_s
        if now_s - self._decided_at_s < MIN_INTERVAL_S:
            return None
        if abs(arrivals_per_s - before) <= MIN_CHANGE * max(arrivals_per_s, before, 0.1):
            return None
        return f"arrivals changed from {before:.2f} to {arrivals_per_s:.2f} per second"
