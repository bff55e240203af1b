"""Which pipeline gets the next request. Pure: it knows the plan, the pipelines' states and its own dispatches.

Candidates are pipelines that are ready, take requests, have a free slot and do not go away at once. Of these, in order:

1. the heir of the pipeline that had the request before;
2. those that live long enough for the request's expected length (a pipeline under notice too), else the longest lived;
3. of those whose load is within `LOAD_SLACK` of the least, the one that has most of the prompt in its prefix cache;
4. the least loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from engine.protocol import PipelineState
from gateway.core.prefix_index import PrefixIndex, block_keys
from planner.protocol import Plan

STALE_STATE_S = 3.0
"""A pipeline reports at least once a second; after this it is not counted on."""
MIN_LIFETIME_S = 2.0
"""No new request for a pipeline that goes away sooner."""

LOAD_SLACK = 0.25
"""A cached prefix is worth so much more load, as a share of the pipeline's slots."""
LIFETIME_FACTOR = 1.5
"""A pipeline under notice must live so much longer than the request is expected to run."""


class Need(msgspec.Struct, frozen=True):
    """What is known of a request before it is sent."""

    prompt_ids: Sequence[int] = ()
    expected_s: float | None = None
    """How long it will run; None: unknown, so no pipeline under notice is known to live long enough."""


class Decision(msgspec.Struct, frozen=True):
    """A pipeline, and why: goes into the trace."""

    pipeline: str
    rule: str
    """heir, only (the only candidate), prefix, load or lifetime (none lives long enough)."""
    num_candidates: int
    load: float
    cached_tokens: int
    """Of the prompt, as far as this gateway knows."""
    remaining_s: float | None
    """Lifetime; None: not under notice."""
    expected_s: float | None

    def attributes(self) -> dict[str, str | int | float]:
        """For a span; what is unknown is left out."""
        named = {f"route.{name}": getattr(self, name) for name in self.__struct_fields__ if name != "pipeline"}
        return {name: value for name, value in named.items() if value is not None}


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
    in_plan: bool = False
    deadline_s: float | None = None
    """When it goes away, by its own word and the plan's; None: not under notice."""


class Router:
    """The choice of a pipeline; forgets pipelines that no plan names."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self._known: dict[str, _Known] = {}
        self._num_submitting: dict[str, int] = {}
        self._prefixes: dict[str, PrefixIndex] = {}

    def observe_plan(self, plan: Plan) -> bool:
        """Take in a plan; False if it is not newer than the one known."""
        if self.plan is not None and plan.epoch <= self.plan.epoch:
            return False
        self.plan = plan
        self._known = {p: known for p, known in self._known.items() if self.fate(p) is not Fate.GONE}
        for known in self._known.values():
            self._judge(known)
        self._prefixes = {p: index for p, index in self._prefixes.items() if self.fate(p) is not Fate.GONE}
        return True

    def observe_state(self, state: PipelineState, now_s: float) -> None:
        """Take in what a pipeline tells of itself."""
        known = self._known.get(state.pipeline)
        if known is not None and state.epoch < known.state.epoch:
            return
        blocked_until_s = known.blocked_until_s if known is not None else 0.0
        self._known[state.pipeline] = _Known(state, now_s, 0, blocked_until_s)
        self._judge(self._known[state.pipeline])

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

    def remember(self, pipeline: str, ids: Sequence[int]) -> None:
        """`pipeline` has the KV of `ids` now: a prompt that it took, or a prompt and its answer."""
        known = self._known.get(pipeline)
        if known is not None and known.state.kv_block_tokens:
            index = self._prefixes.setdefault(pipeline, PrefixIndex())
            index.add(block_keys(ids, known.state.kv_block_tokens), known.state.total_kv_blocks)

    def choose(self, now_s: float, *, heir_of: str | None = None) -> str | None:
        """The pipeline for a request of which nothing is known, if one has room; see `decide`."""
        decision = self.decide(Need(), now_s, heir_of=heir_of)
        return decision.pipeline if decision is not None else None

    def decide(self, need: Need, now_s: float, *, heir_of: str | None = None) -> Decision | None:
        """The pipeline for the next request, if one has room.

        `heir_of`: the pipeline that had the request before; the one that inherits from it is preferred.
        """
        room = [p for p in self.ready(now_s) if self._has_room(p, now_s)]
        if not room:
            return None
        heirs = self._heirs(heir_of, room)
        candidates = heirs or room
        lasting = [p for p in candidates if self._lives_long_enough(p, need, now_s)]
        if not lasting:
            longest = max(candidates, key=lambda p: (self._known[p].deadline_s or 0.0, -self._load(p), p))
            return self._decision("lifetime", longest, need, now_s, len(room), 0)
        cached = self._cached_tokens(lasting, need)
        load = {p: self._load(p) for p in lasting}
        least = min(load.values())
        near = [p for p in lasting if load[p] <= least + LOAD_SLACK]
        best = min(near, key=lambda p: (-cached[p], load[p], self._known[p].deadline_s is not None, p))
        rule = "heir" if heirs else "only" if len(room) == 1 else "prefix" if cached[best] else "load"
        return self._decision(rule, best, need, now_s, len(room), cached[best])

    def ready(self, now_s: float) -> list[str]:
        """Pipelines of the plan that serve now, with or without a free slot."""
        return [p for p, known in self._known.items() if self._takes_requests(known, now_s)]

    def states(self, now_s: float) -> list[PipelineState]:
        """What all pipelines have said of themselves lately."""
        return [known.state for known in self._known.values() if now_s <= known.seen_s + STALE_STATE_S]

    def under_notice(self) -> set[str]:
        """Pipelines whose end is known."""
        return {p for p, known in self._known.items() if known.deadline_s is not None}

    def waiting_reason(self, now_s: float) -> str:
        """Why no pipeline is ready, for a person."""
        if self.plan is None:
            return "no plan has been published yet"
        if not self.plan.pipelines:
            return "the plan has no pipeline: too few instances"
        silent = [p.id for p in self.plan.pipelines if p.id not in self._known]
        return f"no pipeline is ready yet (not heard of: {', '.join(silent) or 'none'})"

    def _judge(self, known: _Known) -> None:
        """Note what the plan says about it: the same for all requests until one of the two changes."""
        name = known.state.pipeline
        retiring = self.plan.retiring if self.plan is not None else []
        deadlines_s = [known.state.deadline_s, *(r.deadline_s for r in retiring if r.pipeline.id == name)]
        known.in_plan = self.plan is not None and self.fate(name) is not Fate.GONE
        known.deadline_s = min((d for d in deadlines_s if d is not None), default=None)

    @staticmethod
    def _takes_requests(known: _Known, now_s: float) -> bool:
        state, deadline_s = known.state, known.deadline_s
        if not (known.in_plan and state.ready) or state.draining or now_s > known.seen_s + STALE_STATE_S:
            return False
        return deadline_s is None or deadline_s > now_s + MIN_LIFETIME_S

    def _num_own(self, pipeline: str) -> int:
        return self._known[pipeline].num_since_state + self._num_submitting.get(pipeline, 0)

    def _has_room(self, pipeline: str, now_s: float) -> bool:
        known = self._known[pipeline]
        return now_s >= known.blocked_until_s and known.state.free_slots > self._num_own(pipeline)

    def _heirs(self, heir_of: str | None, room: Sequence[str]) -> list[str]:
        if heir_of is None or self.plan is None:
            return []
        return [p.id for p in self.plan.pipelines if heir_of in p.inherits and p.id in room]

    def _lives_long_enough(self, pipeline: str, need: Need, now_s: float) -> bool:
        deadline_s = self._known[pipeline].deadline_s
        if deadline_s is None:
            return True
        return need.expected_s is not None and now_s + MIN_LIFETIME_S + LIFETIME_FACTOR * need.expected_s < deadline_s

    def _cached_tokens(self, pipelines: Sequence[str], need: Need) -> dict[str, int]:
        keys: dict[int, list[int]] = {}
        cached = dict.fromkeys(pipelines, 0)
        for pipeline in pipelines:
            index, block_tokens = self._prefixes.get(pipeline), self._known[pipeline].state.kv_block_tokens
            if index is None or not block_tokens:
                continue
            if block_tokens not in keys:
                keys[block_tokens] = block_keys(need.prompt_ids, block_tokens)
            cached[pipeline] = block_tokens * index.num_blocks(keys[block_tokens])
        return cached

    def _load(self, pipeline: str) -> float:
        state = self._known[pipeline].state
        num_taken = state.running + state.waiting + self._num_own(pipeline)
        return num_taken / max(1, state.running + state.waiting + state.free_slots)

    def _decision(
        self, rule: str, pipeline: str, need: Need, now_s: float, num_candidates: int, cached_tokens: int
    ) -> Decision:
        deadline_s = self._known[pipeline].deadline_s
        return Decision(
            pipeline=pipeline,
            rule=rule,
            num_candidates=num_candidates,
            load=round(self._load(pipeline), 3),
            cached_tokens=cached_tokens,
            remaining_s=None if deadline_s is None else round(deadline_s - now_s, 1),
            expected_s=None if need.expected_s is None else round(need.expected_s, 3),
        )
