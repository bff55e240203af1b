"""Mean time of the last decode steps of a pipeline, for the planner's cost model."""

from __future__ import annotations

from collections import deque
from typing import Final

from planner.protocol import MeasuredStep

WINDOW_STEPS: Final = 64


class StepMeter:
    """Counts steps that only decode, and during which no other micro-batch had prompt tokens."""

    def __init__(self, num_stages: int) -> None:
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=WINDOW_STEPS)
        self._recent = deque([False] * (2 * num_stages), maxlen=2 * num_stages)
        """Of the steps launched last, whether each was pure decode: those that a finished one can have met."""
        self._num_steps = 0

    def launched(self, num_tokens: list[int]) -> None:
        """A micro-batch with that many tokens of each of its sequences was started."""
        self._recent.append(all(num == 1 for num in num_tokens))

    def finished(self, num_sequences: int, mean_context_tokens: float, took_s: float) -> None:
        """Of `num_sequences` in all micro-batches under way, the oldest one's have their token, `took_s` after it was
        started."""
        if all(self._recent):
            self._steps.append((num_sequences, mean_context_tokens, took_s * 1000))
            self._num_steps += 1

    def measured(self) -> MeasuredStep | None:
        """None until a step has been counted."""
        if not self._steps:
            return None
        sequences, context_tokens, times_ms = (sum(column) / len(self._steps) for column in zip(*self._steps, strict=True))
        return MeasuredStep(
            num_sequences=round(sequences, 3),
            mean_context_tokens=round(context_tokens, 1),
            mean_step_ms=round(times_ms, 4),
            num_steps=self._num_steps,
        )
