"""Why a plan is as it is: its inputs, the alternatives with what each would cost, and notes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

import msgspec

from planner.core.alternatives import list_alternatives
from planner.core.drafting import Draft, Fit, draft, pauses
from planner.core.layout import Layout, Score, in_words
from planner.core.situation import Situation, layout_of, shape_of
from planner.protocol import Alternative, Explanation, ParallelConfig, Pipeline

NUM_DRAFTED: Final = 2
"""Rejected alternatives whose migration is worked out as well, on a fleet of up to MAX_DRAFTED_RANKS."""
MAX_DRAFTED_RANKS: Final = 32
MAX_NAMED: Final = 8
"""Pipelines that a note names; more are counted."""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What shall run, and how that was found."""

    fit: Fit
    draft: Draft
    score: Score | None
    """Of the chosen layout; None where there was nothing to choose."""
    why: str = ""
    drafts: dict[Layout, Draft] = {}
    """Of rejected layouts too."""
    notes: list[str] = []


def explain(situation: Situation, decision: Decision, now_s: float) -> Explanation:
    """What `decision` is based on, what else was weighed, and what is worth knowing of it."""
    chosen = decision.draft
    configs = _configs(chosen.pipelines)
    migration = chosen.migration
    return Explanation(
        cause=situation.cause,
        cause_at_s=situation.cause_at_s,
        decided_at_s=now_s,
        arrivals_per_s=situation.workload.arrivals_per_s,
        num_ranks=len(situation.ranks),
        chosen=configs[0] if configs else None,
        others=configs[1:],
        alternatives=_alternatives(situation, decision),
        bytes_reused=migration.reused_bytes,
        bytes_moved=migration.moved_bytes,
        migration_s=round(max([migration.seconds, *migration.kv_seconds.values()]), 3),
        notes=_notes(situation, decision),
        prompt_tokens=situation.workload.prompt_tokens,
        output_tokens=situation.workload.output_tokens,
        objective=str(situation.targets.objective),
        expected_calm_s=situation.expected_calm_s,
    )


def _notes(situation: Situation, decision: Decision) -> list[str]:
    notes = [*decision.fit.notes, *decision.notes]
    chosen = decision.draft
    if chosen.kept:
        notes.append(f"unchanged: {_names(p.id for p in chosen.kept)}")
    if chosen.spares:
        because = "; used, they would not serve better" if chosen.pipelines and decision.score is not None else ""
        notes.append(f"{len(chosen.spares)} ranks without a position, as spares and sources of context{because}")
    from_disk = {
        n for planned in chosen.migration.transfers.values() for t in planned if not t.sources for n in t.units.layers()
    }
    if from_disk:
        notes.append(f"no rank holds {len(from_disk)} layers, or parts of them: they are read from disk")
    if situation.excluded_ranks:
        notes.append(f"excluded after failing to prepare: {', '.join(sorted(situation.excluded_ranks))}")
    notes += [f"{in_words(shape)}: {why}" for shape, why in situation.refusals(decision.fit.costs.memory_bytes).items()]
    heirless = {r.pipeline.id for r in chosen.retiring if not r.broken} - {i for p in chosen.new for i in p.inherits}
    if heirless:
        notes.append(
            f"sequences of {_names(sorted(heirless))} go back to the queue with their log: no new pipeline has room"
        )
    noticed = situation.deadlines(chosen.pipelines)
    if noticed and decision.score is not None and situation.reviews_notices:
        notes.append(f"serve until shortly before their end: {_names(sorted(noticed))}")
    return notes


def _names(names: Iterable[str]) -> str:
    names = list(names)
    return (
        ", ".join(names)
        if len(names) <= MAX_NAMED
        else f"{', '.join(names[:MAX_NAMED])} and {len(names) - MAX_NAMED} more"
    )


def _alternatives(situation: Situation, decision: Decision) -> list[Alternative]:
    fit = decision.fit
    usd_per_instance_h = situation.usd_per_rank_h * fit.supply.num_ranks_per_instance
    listed = list_alternatives(fit.costs, fit.choice, decision.score, decision.why, fit.supply, usd_per_instance_h)
    weighed = [a for a in listed if a.config.max_batch > 0]
    moved_bytes = {layout: drafted.move.bytes_moved for layout, drafted in decision.drafts.items()}
    if len(fit.pool) <= MAX_DRAFTED_RANKS:
        for layout in [_layout_of(a) for a in weighed[: NUM_DRAFTED + 1]]:
            if layout not in moved_bytes:
                moved_bytes[layout] = draft(situation, fit, layout).move.bytes_moved
    pause_s = pauses(situation, fit, [_layout_of(a) for a in weighed])
    return [
        msgspec.structs.replace(
            alternative,
            bytes_moved=moved_bytes.get(_layout_of(alternative)),
            pause_s=round(pause_s[_layout_of(alternative)], 3) if _layout_of(alternative) in pause_s else None,
        )
        for alternative in listed
    ]


def _layout_of(alternative: Alternative) -> Layout:
    return Layout.of({(c.pipeline, c.tensor): c.data for c in [alternative.config, *alternative.others]})


def _configs(pipelines: list[Pipeline]) -> list[ParallelConfig]:
    """One for each shape, the one that most ranks serve in first."""
    numbers = Counter(shape_of(p) for p in pipelines)
    max_batch = {shape_of(p): p.max_batch for p in pipelines}
    return [
        ParallelConfig(data=numbers[shape], pipeline=shape[0], tensor=shape[1], max_batch=max_batch[shape])
        for shape in dict.fromkeys(layout_of(pipelines).shapes())
    ]
