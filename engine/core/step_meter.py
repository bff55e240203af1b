"""Mean time of a pipeline's decode steps, a window at a time, for the planner's cost model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

from planner.protocol import MeasuredStep

WINDOW_STEPS: Final = 32


class StepMeter:
    """Counts steps that only decode, and that met no prompt tokens in another micro-batch."""

    def __init__(self, num_stages: int) -> None:
        self.measured: MeasuredStep | None = None
        """Of the last full window; None until there was one."""
        # Of the steps launched last, whether each only decodes: a finished one can have met all of these.
        self._only_decode = deque([False] * (2 * num_stages), maxlen=2 * num_stages)
        self._num_in_window = 0
        self._num_sequences = 0
        self._context_tokens = 0.0
        self._took_s = 0.0

    def launched(self, num_tokens: Iterable[int]) -> None:
        """A micro-batch was started, with that many tokens of each of its sequences."""
        self._only_decode.append(all(num == 1 for num in num_tokens))

    def finished(self, num_sequences: int, mean_context_tokens: float, took_s: float) -> None:
        """The oldest micro-batch has its tokens, `took_s` after it was started; `num_sequences` are in all of them."""
        if not all(self._only_decode):
            return
        self._num_in_window += 1
        self._num_sequences += num_sequences
        self._context_tokens += mean_context_tokens
        self._took_s += took_s
        if self._num_in_window == WINDOW_STEPS:
            self._close_window()

    def _close_window(self) -> None:
        before = self.measured.num_steps if self.measured is not None else 0
        self.measured = MeasuredStep(
            num_sequences=self._num_sequences / WINDOW_STEPS,
            mean_context_tokens=self._context_tokens / WINDOW_STEPS,
            mean_step_ms=self._took_s / WINDOW_STEPS * 1000,
            num_steps=before + WINDOW_STEPS,
        )
        self._num_in_window, self._num_sequences, self._context_tokens, self._took_s = 0, 0, 0.0, 0.0
