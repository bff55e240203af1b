"""What calls for a decision, and when it is due; a decision that failed is tried again with growing delay."""

from __future__ import annotations

import math
from typing import Final

RETRY_DELAYS_S: Final = (1.0, 5.0, 20.0, 60.0)
"""After a failed decision, unless something happens before."""


class Agenda:
    def __init__(self) -> None:
        self.due_at_s = math.inf
        self.num_failed = 0
        self.last_failure = ""
        """Empty once a decision has worked again."""
        self._causes: list[tuple[str, float]] = []
        self._num_failed_in_a_row = 0

    def want(self, cause: str, cause_at_s: float, decide_at_s: float) -> None:
        """A decision because of `cause`, which happened at `cause_at_s`, at `decide_at_s` or before."""
        self._causes.append((cause, cause_at_s))
        self.due_at_s = min(self.due_at_s, decide_at_s)

    def take(self, now_s: float) -> tuple[str, float]:
        """The causes in words and the time of the first one, for the decision that is made now."""
        causes, self._causes = self._causes, []
        if not causes:
            causes = [("time has passed since the last decision", now_s)]
        self.due_at_s = math.inf
        return "; ".join(dict.fromkeys(text for text, _ in causes)), min(at_s for _, at_s in causes)

    def note_success(self, review_at_s: float) -> None:
        """The situation must be looked at again then, even if nothing happens."""
        self._num_failed_in_a_row, self.last_failure = 0, ""
        self.due_at_s = min(self.due_at_s, review_at_s)

    def note_failure(self, cause: str, cause_at_s: float, failure: str, now_s: float) -> None:
        """The cause stays; whatever happens next is decided together with it."""
        delay_s = RETRY_DELAYS_S[min(self._num_failed_in_a_row, len(RETRY_DELAYS_S) - 1)]
        self.num_failed += 1
        self._num_failed_in_a_row += 1
        self.last_failure = failure
        self.want(cause, cause_at_s, now_s + delay_s)
