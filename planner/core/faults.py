"""Pipelines that fail although their ranks live: what each failure means, and when to decide again."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Final

from planner.core.agenda import Agenda
from planner.core.effects import Effect, ProbeInstances, Report, Severity
from planner.core.layout import Shape, in_words
from planner.core.rollout import Rollout
from planner.core.setbacks import Attempt, RefusedShape, Setbacks
from planner.core.situation import shape_of
from planner.protocol import Pipeline, RankProgress

BREAK_WAIT_S: Final = 0.3
"""How long a broken pipeline waits for the lost instance that explains it."""


class Faults:
    def __init__(self, agenda: Agenda, rollout: Rollout) -> None:
        self._agenda = agenda
        self._rollout = rollout
        self._setbacks = Setbacks()
        self._ruined: set[str] = set()
        self._break_until_s: dict[str, float] = {}
        """Broken pipelines whose lost instance is not known yet."""

    # --- What happens ---

    def note_prepare_failed(
        self, pipeline: Pipeline, progress: RankProgress, memory_bytes: int, now_s: float
    ) -> list[Effect]:
        """`memory_bytes` of the rank that says so."""
        shape = shape_of(pipeline)
        attempt = Attempt(
            shape=shape,
            ranks=frozenset(pipeline.ranks()),
            culprit=progress.rank,
            memory_bytes=memory_bytes,
            detail=progress.detail,
            names_shape=progress.names_shape,
            is_proven=any(shape_of(p) == shape and p.id != pipeline.id for p in self._rollout.serving()),
        )
        before = self._setbacks.refused(now_s)
        self._ruined.add(pipeline.id)
        retry_at_s = self._setbacks.note_failure(attempt, now_s)
        self._agenda.want(f"{progress.rank} could not prepare {pipeline.id}", now_s, retry_at_s)
        effects: list[Effect] = [_report("prepare failed", pipeline, progress, Severity.WARNING)]
        if shape in self._setbacks.refused(now_s) and shape not in before:
            fields = {"shape": in_words(shape), "rank": progress.rank, "detail": progress.detail}
            effects.append(Report(event="shape refused", fields=fields, severity=Severity.WARNING))
        return effects

    def note_stopped(self, pipeline: Pipeline, progress: RankProgress, now_s: float) -> list[Effect]:
        """It was told to stop before the plan took it back, and the plan came too late."""
        self._ruined.add(pipeline.id)
        self._agenda.want(f"{pipeline.id} has stopped although it is planned", now_s, now_s)
        return [_report("pipeline stopped", pipeline, progress, Severity.INFO)]

    def note_broken(self, pipeline: Pipeline, progress: RankProgress, now_s: float) -> list[Effect]:
        """A lost instance may explain it; if none is heard of within `BREAK_WAIT_S`, it is ruined."""
        if pipeline.id in self._break_until_s:
            return []
        self._break_until_s[pipeline.id] = now_s + BREAK_WAIT_S
        instances = sorted({shard.instance for stage in pipeline.stages for shard in stage.shards})
        return [ProbeInstances(instances=instances), _report("pipeline broken", pipeline, progress, Severity.WARNING)]

    def note_over(self, pipeline: str, now_s: float) -> None:
        """By its leader's inventory it does not run any more."""
        self._break_until_s.setdefault(pipeline, now_s + BREAK_WAIT_S)

    def note_hung(self, pipeline: Pipeline, waiting: list[str], now_s: float) -> list[Effect]:
        """Its preparation stands still; it waits for the ranks `waiting`."""
        if pipeline.id in self._ruined:
            return []
        names = ", ".join(waiting)
        culprit = waiting[0] if len(waiting) == 1 else None
        self._ruined.add(pipeline.id)
        retry_at_s = self._setbacks.note_hang(frozenset(pipeline.ranks()), culprit, now_s)
        self._agenda.want(f"{names} did not prepare {pipeline.id} in time", now_s, retry_at_s)
        fields = {"pipeline": pipeline.id, "waits_for": names}
        return [Report(event="prepare hangs", fields=fields, severity=Severity.WARNING)]

    def advance(self, now_s: float) -> None:
        """Time has passed, or pipelines have started or gone."""
        for name in [n for n, until_s in self._break_until_s.items() if until_s <= now_s or not self._rollout.find(n)]:
            del self._break_until_s[name]
            pipeline = self._rollout.find(name)
            if pipeline is not None:
                self._ruined.add(name)
                retry_at_s = self._setbacks.note_break(frozenset(pipeline.ranks()), now_s)
                self._agenda.want(f"{name} broke, and all its instances live", now_s, retry_at_s)
        if self._setbacks.refused(now_s):
            serving = (pipeline for pipeline in self._rollout.serving() if pipeline.id not in self._ruined)
            for shape in {shape_of(pipeline) for pipeline in serving}:
                if self._setbacks.note_serving(shape):
                    self._agenda.want(f"{in_words(shape)} serves after all", now_s, now_s)
        for name in self._setbacks.pop_expired(now_s):
            self._agenda.want(f"{name} may be tried again", now_s, now_s)

    def forget_all_but(self, pipelines: Collection[str]) -> None:
        self._ruined.intersection_update(pipelines)

    # --- What it means ---

    @property
    def ruined(self) -> frozenset[str]:
        """Pipelines of the plan that failed although their ranks live."""
        return frozenset(self._ruined)

    def excluded(self, now_s: float) -> frozenset[str]:
        """Ranks that get no position for now."""
        return self._setbacks.excluded(now_s)

    def refused(self, now_s: float) -> dict[Shape, RefusedShape]:
        """Shapes that are not planned for now, if there is another."""
        return self._setbacks.refused(now_s)

    def suspects(self, now_s: float) -> frozenset[str]:
        """Ranks that refused shapes failed on."""
        return self._setbacks.suspects(now_s)

    def next_wakeup_s(self) -> float:
        return min([self._setbacks.next_wakeup_s(), *self._break_until_s.values()], default=math.inf)


def _report(event: str, pipeline: Pipeline, progress: RankProgress, severity: Severity) -> Report:
    fields = {"pipeline": pipeline.id, "rank": progress.rank, "detail": progress.detail}
    return Report(event=event, fields=fields, severity=severity)
