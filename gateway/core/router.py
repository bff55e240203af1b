"""Which pipeline gets the next request. Pure: it knows the plan, the pipelines' states and its own dispatches.

Candidates are pipelines that are ready, take requests, have a free slot and live long enough. Pipelines that are not
under notice come first, then the least loaded, then those that live longest.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from engine.protocol import PipelineState
from planner.protocol import Plan

STALE_STATE_S = 3.0
"""A pipeline reports at least once a second; after this it is not counted on."""
MIN_LIFETIME_S = 2.0
"""No new request for a pipeline that goes away sooner."""


class Fate(StrEnum):
    """What the plan says about a pipeline."""

    SERVING = "serving"
    RETIRING = "retiring"
    GONE = "gone"


class _Known(msgspec.Struct):
    state: PipelineState
    seen_s: float
    num_since_state: int = 0
    """Taken in by the pipeline since it last told its free slots."""
    blocked_until_s: float = 0.0


class Router:
    """The choice of a pipeline; forgets pipelines that no plan names."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self._known: dict[str, _Known] = {}
        self._num_submitting: dict[str, int] = {}

    def observe_plan(self, plan: Plan) -> bool:
        """Take in a plan; False if it is not newer than the one known."""
        if self.plan is not None and plan.epoch <= self.plan.epoch:
            return False
        self.plan = plan
        self._known = {p: known for p, known in self._known.items() if self.fate(p) is not Fate.GONE}
        return True

    def observe_state(self, state: PipelineState, now_s: float) -> None:
        """Take in what a pipeline tells of itself."""
        known = self._known.get(state.pipeline)
        if known is not None and state.epoch < known.state.epoch:
            return
        blocked_until_s = known.blocked_until_s if known is not None else 0.0
        self._known[state.pipeline] = _Known(state, now_s, 0, blocked_until_s)

    def submitting(self, pipeline: str) -> None:
        """A request is on its way to `pipeline`."""
        self._num_submitting[pipeline] = self._num_submitting.get(pipeline, 0) + 1

    def submitted(self, pipeline: str, *, accepted: bool, blocked_until_s: float = 0.0) -> None:
        """It has arrived there, or not; a pipeline that refused gets nothing before `blocked_until_s`."""
        num = self._num_submitting.get(pipeline, 0) - 1
        if num > 0:
            self._num_submitting[pipeline] = num
        else:
            self._num_submitting.pop(pipeline, None)
        known = self._known.get(pipeline)
        if known is None:
            return
        if accepted:
            known.num_since_state += 1
        else:
            known.blocked_until_s = blocked_until_s

    def fate(self, pipeline: str) -> Fate:
        """What the newest plan says about `pipeline`; without a plan all are serving."""
        if self.plan is None or any(p.id == pipeline for p in self.plan.pipelines):
            return Fate.SERVING
        retiring = any(r.pipeline.id == pipeline and not r.broken for r in self.plan.retiring)
        return Fate.RETIRING if retiring else Fate.GONE

    def choose(self, now_s: float, *, heir_of: str | None = None) -> str | None:
        """The pipeline for the next request, if one has room.

        `heir_of`: the pipeline that had the request before; the one that inherits from it is preferred.
        """
        candidates = [p for p in self.ready(now_s) if self._has_room(p, now_s)]
        if heir_of is not None and self.plan is not None:
            heirs = [p.id for p in self.plan.pipelines if heir_of in p.inherits and p.id in candidates]
            candidates = heirs or candidates
        return min(candidates, key=self._preference, default=None)

    def ready(self, now_s: float) -> list[str]:
        """Pipelines of the plan that serve now, with or without a free slot."""
        return [p for p in self._known if self._takes_requests(p, now_s)]

    def waiting_reason(self, now_s: float) -> str:
        """Why no pipeline is ready, for a person."""
        if self.plan is None:
            return "no plan has been published yet"
        if not self.plan.pipelines:
            return "the plan has no pipeline: too few instances"
        silent = [p.id for p in self.plan.pipelines if p.id not in self._known]
        return f"no pipeline is ready yet (not heard of: {', '.join(silent) or 'none'})"

    def _takes_requests(self, pipeline: str, now_s: float) -> bool:
        known = self._known[pipeline]
        state = known.state
        if not state.ready or state.draining:
            return False
        if now_s > known.seen_s + STALE_STATE_S or self.plan is None or self.fate(pipeline) is Fate.GONE:
            return False
        deadline_s = self._deadline_s(pipeline)
        return deadline_s is None or deadline_s > now_s + MIN_LIFETIME_S

    def _deadline_s(self, pipeline: str) -> float | None:
        known = self._known[pipeline].state.deadline_s
        retiring = self.plan.retiring if self.plan is not None else []
        planned = [r.deadline_s for r in retiring if r.pipeline.id == pipeline]
        return min((d for d in [known, *planned] if d is not None), default=None)

    def _num_own(self, pipeline: str) -> int:
        return self._known[pipeline].num_since_state + self._num_submitting.get(pipeline, 0)

    def _has_room(self, pipeline: str, now_s: float) -> bool:
        known = self._known[pipeline]
        return now_s >= known.blocked_until_s and known.state.free_slots > self._num_own(pipeline)

    def _preference(self, pipeline: str) -> tuple[bool, float, float, str]:
        """Smaller is better."""
        state = self._known[pipeline].state
        num_taken = state.running + state.waiting + self._num_own(pipeline)
        load = num_taken / max(1, state.running + state.waiting + state.free_slots)
        deadline_s = self._deadline_s(pipeline)
        return deadline_s is not None, load, -(deadline_s or 0.0), pipeline
