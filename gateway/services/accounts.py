"""What the dispatcher's requests add up to: rates of keys, metrics, expected lengths, the load for the planner."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from engine.protocol import ResumeStats
from gateway.core.arrival_statistics import ArrivalStatistics
from gateway.core.keys import Principal
from gateway.core.rate_limits import RateLimits
from gateway.core.service_times import ServiceTimes
from gateway.services.metrics import Metrics
from planner.protocol import LoadReport

_LOAD_WINDOW_S = 30.0


class Times(msgspec.Struct):
    """Of one choice, Unix seconds; 0: not yet."""

    arrived_s: float
    sent_s: float = 0.0
    """To its current pipeline."""
    first_s: float = 0.0


class Accounts:
    """Counts for one gateway process. All times are arguments."""

    def __init__(self, gateway: str, model_name: str) -> None:
        self.limits = RateLimits(gateway)
        self.metrics = Metrics(model_name)
        self.service_times = ServiceTimes()
        self._gateway = gateway
        self._arrivals: deque[tuple[float, int]] = deque()
        self._statistics = ArrivalStatistics()
        self._outputs: deque[tuple[float, int]] = deque()
        self._num_prompt = self._num_output = self._num_cached = 0

    def admitted(self, prompt_tokens: int, now_s: float) -> Times:
        """A choice has come in."""
        self._arrivals.append((now_s, prompt_tokens))
        self._statistics.note(now_s)
        return Times(now_s)

    def sent(self, times: Times, now_s: float) -> None:
        """It goes to a pipeline."""
        if not times.sent_s:
            self.metrics.queue_wait_s.observe(now_s - times.arrived_s)
        times.sent_s = now_s

    def tokens(self, times: Times, prompt_tokens: int, num_new: int, cached_tokens: int, now_s: float) -> None:
        """Its pipeline has given new tokens."""
        if not times.first_s and num_new:
            times.first_s = now_s
            self.service_times.first_token(now_s - times.sent_s)
            self.metrics.first_token_s.observe(now_s - times.arrived_s)
            self._num_prompt += prompt_tokens
            self._num_cached += cached_tokens
        self._num_output += num_new

    def resumed(self, stats: ResumeStats) -> None:
        """It goes on in another pipeline."""
        self.metrics.resumed(stats)

    def ended(self, times: Times, principal: Principal, num_tokens: int, finish: str | None, now_s: float) -> None:
        """It has ended, with `finish` by itself."""
        self._outputs.append((now_s, num_tokens))
        if principal.key is not None:
            self.limits.count_tokens(principal.key, num_tokens, now_s)
        if finish is None:
            return
        self.metrics.ended(finish)
        self.metrics.request_s.observe(now_s - times.arrived_s)
        if times.first_s:
            self.service_times.ended(num_tokens, now_s - times.first_s)
        if num_tokens > 1:
            self.metrics.token_s.observe((now_s - times.first_s) / (num_tokens - 1))

    def flush(self) -> None:
        """Add what was counted since the last call to the metrics."""
        self.metrics.add_tokens(prompt=self._num_prompt, output=self._num_output, cached=self._num_cached)
        self._num_prompt = self._num_output = self._num_cached = 0

    def load(self, num_running: int, num_waiting: int, now_s: float) -> LoadReport:
        """What came and ended in the last 30 s."""
        for samples in (self._arrivals, self._outputs):
            while samples and samples[0][0] < now_s - _LOAD_WINDOW_S:
                samples.popleft()
        return LoadReport(
            gateway=self._gateway,
            arrivals_per_s=len(self._arrivals) / _LOAD_WINDOW_S,
            running=num_running,
            waiting=num_waiting,
            mean_prompt_tokens=_mean(self._arrivals),
            mean_output_tokens=_mean(self._outputs),
            arrivals_cv2=self._statistics.squared_cv(now_s),
        )


def _mean(samples: Sequence[tuple[float, int]] | deque[tuple[float, int]]) -> float:
    return sum(value for _, value in samples) / len(samples) if samples else 0.0
