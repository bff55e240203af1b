"""What a simulation gives: every request's fate, the fleet over time, every pause; and the figures made of them."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Fate(StrEnum):
    COMPLETED = "completed"
    UNFINISHED = "unfinished"
    """Still queued or running when the simulation ended."""
    LOST = "lost"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One request. Times are seconds from the start of the trace."""

    id: int
    fate: Fate
    arrival_s: float
    ended_s: float
    """Completed, lost, or the end of the simulation."""
    first_token_s: float | None
    prompt_tokens: int
    tokens_done: int
    """Output tokens at the end."""
    longest_gap_s: float = 0.0
    """Between two of its tokens."""
    tokens_recomputed: int = 0
    """Prompt and output tokens that were prefilled again after an interruption."""

    @property
    def latency_s(self) -> float:
        """End to end; of an unfinished request its age: a lower bound."""
        return self.ended_s - self.arrival_s


class FleetSample(msgspec.Struct, frozen=True, kw_only=True):
    """From `at_s` until the next sample."""

    at_s: float
    num_spot: int
    num_on_demand: int
    shapes: tuple[tuple[int, int], ...]
    """(pipeline degree, tensor degree) of each pipeline that serves."""
    num_ranks_used: int = 0


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """What one change of the fleet cost."""

    at_s: float
    cause: str
    pause_s: float
    """The longest time that a pipeline stood still for it."""
    moved_bytes: int = 0
    tokens_recomputed: int = 0


class Result(msgspec.Struct, frozen=True, kw_only=True):
    policy: str
    scenario: str
    outcomes: tuple[Outcome, ...]
    """In the order of the requests: one each, whatever became of it."""
    fleet: tuple[FleetSample, ...]
    pauses: tuple[Pause, ...]
    cost_usd: float
    """Of all instances while they were rented, from request to release, over the time of the trace."""
    instance_hours_spot: float
    instance_hours_on_demand: float
    end_s: float
