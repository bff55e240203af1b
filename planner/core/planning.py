"""Make the next plan: choose the layout, and whether a change to it is worth its pause."""

from __future__ import annotations

import msgspec

from planner.core.config_optimizer import Objective, Supply, choose_layout
from planner.core.drafting import Draft, Fit, draft, finish_draft
from planner.core.explanation import Decision, explain
from planner.core.fleet import Rank
from planner.core.hysteresis import FREE, Move, is_worth
from planner.core.layout import Layout, Score
from planner.core.retirement import is_news, retirement_kv_s, retiring_pipelines
from planner.core.situation import Situation, layout_of, without_conflicts
from planner.protocol import Plan, RankAddress

__all__ = ["Situation", "make_plan", "retirement_kv_s"]


def make_plan(situation: Situation, now_s: float) -> Plan | None:
    """The next plan; None if nothing that the fleet must know of changes."""
    last = situation.last
    decision = _decide(situation, now_s)
    chosen = decision.draft
    deadlines = situation.deadlines(chosen.pipelines)
    if last is not None and not is_news(last, chosen.pipelines, chosen.retiring, deadlines):
        return None
    plan = Plan(
        epoch=last.epoch + 1 if last is not None else 1,
        model=situation.model,
        pipelines=chosen.pipelines,
        retiring=chosen.retiring,
        transfers=chosen.migration.transfers,
        addresses={},
        explanation=explain(situation, decision, now_s),
        next_pipeline_number=(last.next_pipeline_number if last is not None else 1) + len(chosen.new),
        deadlines=deadlines,
    )
    return msgspec.structs.replace(plan, addresses=_addresses(plan, situation))


# --- What shall run ---


def _decide(situation: Situation, now_s: float) -> Decision:
    candidates = [rank for rank in situation.ranks.values() if rank.id not in situation.excluded_ranks]
    lasting = situation.lasting(candidates, now_s)
    fit = _fit_at_all(situation, lasting)
    if fit.choice.best is not None:
        return _settle(situation, fit, now_s)
    intact = situation.intact_pipelines()
    kept = without_conflicts(p for p in intact if not situation.excluded_ranks & set(p.ranks()))
    if kept:
        retiring = retiring_pipelines(situation, {p.id for p in kept}, str(layout_of(kept)))
        note = "no other ranks are left: pipelines on instances under notice serve until the deadline"
        return Decision(fit=fit, draft=finish_draft(situation, kept, [], retiring, fit), score=None, notes=[note])
    if len(candidates) > len(lasting):
        fit = _fit_at_all(situation, candidates)
        if fit.choice.best is not None:
            decision = _settle(situation, fit, now_s)
            note = "no other ranks are left: ranks under notice are used"
            return msgspec.structs.replace(decision, notes=[note, *decision.notes])
    why = f"the model does not fit on {len(candidates)} ranks" if candidates else "there are no ranks"
    nothing = finish_draft(situation, [], [], retiring_pipelines(situation, (), ""), fit)
    return Decision(fit=fit, draft=nothing, score=None, notes=[f"no pipeline: {why}; requests wait"])


def _fit_at_all(situation: Situation, pool: list[Rank]) -> Fit:
    """Without the shapes that were refused if that is possible, else without the ranks that they failed on."""
    fit = _fit_largest(situation, pool)
    if fit.choice.best is not None or not situation.refused_shapes:
        return fit
    desperate = msgspec.structs.replace(situation, refused_shapes={})
    trusted = [rank for rank in pool if rank.id not in situation.suspects]
    note = "only shapes that failed before are left"
    for ranks in (trusted, pool):
        tried = _fit_largest(desperate, ranks)
        if tried.choice.best is not None:
            return msgspec.structs.replace(tried, notes=[note, *tried.notes])
    return fit


def _fit_largest(situation: Situation, pool: list[Rank]) -> Fit:
    """On all of `pool` if the model fits in the smallest memory of them, else without the smallest ones."""
    smallest = _fit(situation, pool, [])
    if smallest.choice.best is not None:
        return smallest
    for memory_bytes in sorted({rank.inventory.memory_bytes for rank in pool})[1:]:
        larger = [rank for rank in pool if rank.inventory.memory_bytes >= memory_bytes]
        note = f"{len(pool) - len(larger)} ranks are left out: they have less than {memory_bytes / 1e6:.0f} MB"
        fit = _fit(situation, larger, [note])
        if fit.choice.best is not None:
            return fit
    return smallest


def _fit(situation: Situation, pool: list[Rank], notes: list[str]) -> Fit:
    costs = situation.costs(min((rank.inventory.memory_bytes for rank in pool), default=0))
    usable = {rank.id for rank in pool}
    intact = [p for p in situation.intact_pipelines() if usable.issuperset(p.ranks())]
    present = without_conflicts(intact)
    supply = Supply(
        num_ranks=len(pool),
        num_ranks_per_instance=situation.num_ranks_per_instance,
        num_paid_instances=situation.num_paid_instances if situation.can_release else None,
    )
    refusals = situation.refusals(costs.memory_bytes)
    choice = choose_layout(costs, supply, situation.targets, layout_of(present), refusals=refusals)
    return Fit(costs=costs, supply=supply, choice=choice, pool=pool, present=present, intact=intact, notes=notes)


def _settle(situation: Situation, fit: Fit, now_s: float) -> Decision:
    """The best layout, or the best that stops nothing if a change to the former is not worth its pause."""
    choice = fit.choice
    assert choice.best is not None, "the caller has looked"
    stay, best = choice.stay, choice.best
    if stay is None or best.layout.holds(layout_of(fit.present)):
        chosen = draft(situation, fit, best.layout)
        return Decision(fit=fit, draft=chosen, score=best, why=choice.why, drafts={best.layout: chosen})
    drafts: dict[Layout, Draft] = {}
    is_worth_it, verdict = _weigh_change(situation, best, stay, FREE, situation.expected_calm_s)
    if is_worth_it:  # if it were free
        drafts[best.layout] = draft(situation, fit, best.layout)
        calm_s = _calm_s(situation, drafts[best.layout], now_s)
        is_worth_it, verdict = _weigh_change(situation, best, stay, drafts[best.layout].move, calm_s)
    score, why = (best, choice.why) if is_worth_it else (stay, f"no pipeline stops for it; {verdict}")
    if score.layout not in drafts:
        drafts[score.layout] = draft(situation, fit, score.layout)
    note = f"{best.layout} instead of {stay.layout}: {verdict}"
    return Decision(fit=fit, draft=drafts[score.layout], score=score, why=why, drafts=drafts, notes=[note])


def _weigh_change(situation: Situation, new: Score, stay: Score, move: Move, calm_s: float) -> tuple[bool, str]:
    throughput_only = situation.targets.objective is Objective.THROUGHPUT
    workload = situation.workload
    return is_worth(
        new,
        stay,
        move,
        workload.arrivals_per_s,
        calm_s,
        num_waiting=workload.num_waiting,
        throughput_only=throughput_only,
    )


def _calm_s(situation: Situation, drafted: Draft, now_s: float) -> float:
    """Until the next event: the expected time, or the end of an instance that `drafted` uses."""
    ends_s = situation.deadlines(drafted.new).values()
    return min([situation.expected_calm_s, *(end_s - now_s for end_s in ends_s)])


def _addresses(plan: Plan, situation: Situation) -> dict[str, RankAddress]:
    names = {name for p in plan.pipelines for name in p.ranks()}
    names |= {name for r in plan.retiring for name in r.pipeline.ranks()}
    names |= {name for planned in plan.transfers.values() for transfer in planned for name in transfer.sources}
    known = dict(situation.last.addresses) if situation.last is not None else {}
    known |= {
        rank.id: RankAddress(
            instance=rank.instance,
            context_address=rank.inventory.context_address,
            store_address=rank.inventory.store_address,
        )
        for rank in situation.ranks.values()
    }
    return {name: known[name] for name in sorted(names)}
