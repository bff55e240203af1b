"""Arrivals and lengths that the gateways report, and when a change is worth a new decision."""

from __future__ import annotations

import math
from collections import deque
from typing import Final

from planner.core.cost_model import Workload
from planner.protocol import LoadReport

REPORT_LIFETIME_S: Final = 10.0
MIN_CHANGE: Final = 0.2
MIN_INTERVAL_S: Final = 30.0
"""Arrivals are means over 30 s, so two decisions sooner than that would hear the same change twice."""
USUAL_S: Final = 300.0
"""Over which bursts even out."""
WINDOW_S: Final = 30.0
"""Of the gateways' arrivals."""
PEAK_S: Final = 300.0
"""Instances are not given back for a lull that is shorter: to get one again takes minutes."""


class Load:
    def __init__(self) -> None:
        self._reports: dict[str, tuple[LoadReport, float]] = {}
        self._peaks: deque[tuple[float, float]] = deque()
        """(time, arrivals a second), arrivals descending: each was the most from then on."""
        self._lengths: dict[str, float] = {}
        """The newest ones of each kind that were reported."""
        self._decided_per_s = 0.0
        self._decided_at_s = 0.0
        self._usual_per_s: float | None = None
        """Mean of the arrivals of the last minutes, older ones counting less and less."""
        self._usual_at_s = 0.0

    def note(self, report: LoadReport, now_s: float) -> None:
        for field in ("mean_prompt_tokens", "mean_output_tokens"):
            if getattr(report, field) > 0:
                self._lengths[field] = getattr(report, field)
        self._reports[report.gateway] = (report, now_s)
        total_per_s = sum(report.arrivals_per_s for report in self._alive(now_s))
        self._note_usual(total_per_s, now_s)
        while self._peaks and self._peaks[-1][1] <= total_per_s:
            self._peaks.pop()
        self._peaks.append((now_s, total_per_s))

    def _note_usual(self, total_per_s: float, now_s: float) -> None:
        if self._usual_per_s is None:
            self._usual_per_s = total_per_s
        else:
            weight = -math.expm1(-max(0.0, now_s - self._usual_at_s) / USUAL_S)
            self._usual_per_s += weight * (total_per_s - self._usual_per_s)
        self._usual_at_s = now_s

    def workload(self, max_model_len: int, now_s: float) -> Workload:
        """Of all gateways heard of lately; while nothing arrives, the lengths that were seen last. Typical ones are
        assumed until requests have been seen.
        """
        reports = self._alive(now_s)
        total_per_s = sum(report.arrivals_per_s for report in reports)
        assumed = Workload()

        def mean(field: str, otherwise: float) -> float:
            known = [r for r in reports if getattr(r, field) > 0 and r.arrivals_per_s > 0]
            weight = sum(r.arrivals_per_s for r in known)
            if not known:
                return self._lengths.get(field, otherwise)
            return float(sum(getattr(r, field) * r.arrivals_per_s for r in known) / weight)

        half = max_model_len / 2
        prompt_tokens = min(mean("mean_prompt_tokens", min(assumed.prompt_tokens, half)), max_model_len - 1)
        output_tokens = mean("mean_output_tokens", min(assumed.output_tokens, half))
        arrivals_cv2 = max(0.0, 1.0 + sum(report.arrivals_cv2 - 1.0 for report in reports))
        return Workload(
            arrivals_per_s=self._expected_per_s(total_per_s, arrivals_cv2),
            arrivals_cv2=arrivals_cv2,
            num_waiting=sum(report.waiting for report in reports),
            prompt_tokens=prompt_tokens,
            output_tokens=min(output_tokens, max_model_len - prompt_tokens),
        )

    def _expected_per_s(self, measured_per_s: float, arrivals_cv2: float) -> float:
        """The fewer and the burstier the arrivals, the less 30 s say: a count of n varies by sqrt(cv2 * n). What was
        measured has the weight of its n arrivals, what is usual that of cv2 arrivals; evenly spaced ones count alone.
        """
        if self._usual_per_s is None:
            return measured_per_s
        num_measured = measured_per_s * WINDOW_S
        prior = max(0.0, arrivals_cv2 - 1)
        if num_measured + prior == 0:
            return measured_per_s
        return (num_measured * measured_per_s + prior * self._usual_per_s) / (num_measured + prior)

    def peak_per_s(self, now_s: float) -> float:
        """The most arrivals a second within PEAK_S."""
        while self._peaks and now_s - self._peaks[0][0] > PEAK_S:
            self._peaks.popleft()
        return self._peaks[0][1] if self._peaks else 0.0

    def _alive(self, now_s: float) -> list[LoadReport]:
        return [report for report, at_s in self._reports.values() if now_s - at_s < REPORT_LIFETIME_S]

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
