"""How long the planner takes to decide, from 48 to 4,096 ranks: layout, device mapping and migration plan in one.

A fleet of GPT-20B's shape serves by a plan of the planner's own. Then some instances get a notice, or some join, or the
operator asks for another tensor degree, and the next plan is made. What is timed is `make_plan`; that a plan is checked
before it is sent comes on top.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Final

import msgspec
import numpy as np

from loadtest.report import Check, Report, Table, seconds
from planner.core.config_optimizer import Targets
from planner.core.cost_model import Workload
from planner.core.fleet import Rank
from planner.core.invariants import check_plan
from planner.core.links import Links
from planner.core.planning import Situation, make_plan
from planner.protocol import ModelShape, Plan, RankInventory, StepProfile, UnitRange, packed

TARGETS_S: Final = {48: 0.05, 256: 0.2, 1024: 1.0, 4096: 10.0}
"""By number of ranks."""
SMALL_FLEET: Final = 48
"""Up to so many ranks an instance has 4, else 8."""
NOW_S: Final = 1000.0
NOTICE_S: Final = 30.0
CHANGING_SHARE: Final = 16
"""One of so many instances leaves, or joins."""
KV_TOKENS: Final = 4000
ARRIVALS_PER_S_AND_RANK: Final = 0.03

GPT_20B: Final = ModelShape(
    name="gpt-20b",
    num_layers=44,
    num_head_groups=48,
    decoder_unit_bytes=37_748_736,
    embedding_unit_bytes=26_214_400,
    head_unit_bytes=26_214_400,
    kv_unit_bytes_per_token=1024,
    kv_block_tokens=16,
    max_model_len=1024,
    hidden_bytes_per_token=24_576,
    tied_embeddings=False,
)
# About those of a T4: 12 tera-multiply-adds and 300 GB a second.
STEPS: Final = StepProfile(
    batch_sizes=[1, 2, 4, 8],
    decode_layer_ms=[7.0, 7.1, 7.2, 7.5],
    decode_head_ms=[5.0, 5.1, 5.2, 5.4],
    prefill_layer_ms_per_token=0.11,
    stage_hop_ms=0.5,
    all_reduce_ms=0.1,
    transfer_bytes_per_s=5e9,
    device="t4",
)
LINKS: Final = Links(inter_bytes_per_s=5e9, intra_bytes_per_s=1e10, disk_bytes_per_s=1e9)


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Of one fleet and one event; the median of all rounds."""

    num_ranks: int
    event: str
    decide_s: float
    check_s: float
    """`check_plan`."""
    num_pipelines: int
    num_new: int
    num_receivers: int
    plan_bytes: int
    """Encoded, as it is sent."""


class Growth(msgspec.Struct, frozen=True, kw_only=True):
    timings: list[Timing]
    exponent: float | None
    """Of the number of ranks, in the time of the slowest event; None with one size."""


def run(sizes: Sequence[int], num_rounds: int) -> Report:
    """Time every event at each size."""
    timings = []
    for num_ranks in sizes:
        situation = serving(num_ranks)
        for event, happen in EVENTS.items():
            timings.append(_time(num_ranks, event, happen(situation), num_rounds))
            print(f"decisions: {num_ranks} ranks, {event}: {timings[-1].decide_s:.3f} s", file=sys.stderr, flush=True)
    slowest_s = {size: max(t.decide_s for t in timings if t.num_ranks == size) for size in sizes}
    checks = [
        Check(
            name=f"decision on {size:,} ranks, slowest event", value=slowest_s[size], unit="s", target=TARGETS_S[size]
        )
        for size in sizes
        if size in TARGETS_S
    ]
    growth = Growth(timings=timings, exponent=growth_exponent(slowest_s))
    return Report(name="decisions", tables=_tables(growth), checks=checks, figures=growth)


def growth_exponent(seconds_by_size: dict[int, float]) -> float | None:
    """The slope of the straight line through the points on logarithmic axes: k of time ~ size^k."""
    if len(seconds_by_size) < 2:
        return None
    xs, ys = ([math.log(value) for value in values] for values in (seconds_by_size, seconds_by_size.values()))
    return float(np.polyfit(xs, ys, 1)[0])


# --- The fleet ---


def serving(num_ranks: int) -> Situation:
    """`num_ranks` ranks that hold and run what the planner gave them."""
    per_instance = 4 if num_ranks <= SMALL_FLEET else 8
    ranks = [_rank(f"i{number // per_instance:04}", number % per_instance) for number in range(num_ranks)]
    situation = Situation(
        model=GPT_20B,
        profile=STEPS,
        ranks={rank.id: rank for rank in ranks},
        targets=Targets(max_batch=8),
        workload=Workload(arrivals_per_s=num_ranks * ARRIVALS_PER_S_AND_RANK),
        last=None,
        cause="start",
        cause_at_s=NOW_S,
        links=LINKS,
        num_ranks_per_instance=per_instance,
    )
    plan = make_plan(situation, NOW_S)
    assert plan is not None, "the first plan is always news"
    after = {**situation.ranks, **_running(plan, situation)}
    settled = frozenset(pipeline.id for pipeline in plan.pipelines)
    return msgspec.structs.replace(situation, ranks=after, last=plan, settled=settled)


def _running(plan: Plan, situation: Situation) -> dict[str, Rank]:
    ranks = {}
    for number, pipeline in enumerate(plan.pipelines):
        for stage in pipeline.stages:
            layers = plan.model.layers_of_stage(stage.first_layer, stage.last_layer)
            for shard in stage.shards:
                rank = situation.ranks[shard.rank]
                units = UnitRange(
                    first_layer=layers[0],
                    last_layer=layers[-1],
                    first_group=shard.first_group,
                    last_group=shard.last_group,
                )
                inventory = msgspec.structs.replace(
                    rank.inventory, units=[units], pipeline=pipeline.id, kv_tokens=KV_TOKENS + number
                )
                ranks[shard.rank] = msgspec.structs.replace(rank, inventory=inventory)
    return ranks


def _rank(instance: str, index: int) -> Rank:
    name = f"{instance}-{index}"
    inventory = RankInventory(
        rank=name,
        device="cuda",
        memory_bytes=16_000_000_000,
        context_address=f"{name}:1",
        store_address=f"{name}:2",
    )
    return Rank(instance=instance, inventory=inventory, deadline_s=None)


def _preempt(situation: Situation) -> Situation:
    """Notices for instances all over the fleet."""
    instances = sorted({rank.instance for rank in situation.ranks.values()})
    leaving = set(instances[CHANGING_SHARE // 2 :: CHANGING_SHARE])
    ranks = {
        name: msgspec.structs.replace(rank, deadline_s=NOW_S + NOTICE_S) if rank.instance in leaving else rank
        for name, rank in situation.ranks.items()
    }
    return msgspec.structs.replace(situation, ranks=ranks, cause="notice")


def _acquire(situation: Situation) -> Situation:
    """New instances without any context."""
    per_instance = situation.num_ranks_per_instance
    num_new = max(1, len(situation.ranks) // per_instance // CHANGING_SHARE)
    new = [_rank(f"n{number:04}", index) for number in range(num_new) for index in range(per_instance)]
    return msgspec.structs.replace(
        situation, ranks={**situation.ranks, **{rank.id: rank for rank in new}}, cause="joined"
    )


def _reshape(situation: Situation) -> Situation:
    """Another tensor degree for all: every pipeline is built anew, nearly all context moves or is matched anew."""
    assert situation.last is not None, "it serves"
    tensor = 4 if situation.last.pipelines[0].tensor != 4 else 8
    return msgspec.structs.replace(situation, targets=Targets(max_batch=8, tensor=tensor), cause="targets")


EVENTS: Final[dict[str, Callable[[Situation], Situation]]] = {
    "preemption": _preempt,
    "acquisition": _acquire,
    "new shape": _reshape,
}


def _time(num_ranks: int, event: str, situation: Situation, num_rounds: int) -> Timing:
    last = situation.last
    assert last is not None, "it serves"
    decide_s, check_s, plan = [], [], None
    for _ in range(num_rounds):
        started_s = time.perf_counter()
        plan = make_plan(situation, NOW_S)
        decided_s = time.perf_counter()
        if plan is not None:
            check_plan(plan, last)
        decide_s.append(decided_s - started_s)
        check_s.append(time.perf_counter() - decided_s)
    known = {pipeline.id for pipeline in last.pipelines}
    return Timing(
        num_ranks=num_ranks,
        event=event,
        decide_s=median(decide_s),
        check_s=median(check_s),
        num_pipelines=len(plan.pipelines) if plan else len(last.pipelines),
        num_new=len([p for p in plan.pipelines if p.id not in known]) if plan else 0,
        num_receivers=len(plan.transfers) if plan else 0,
        plan_bytes=len(packed(msgspec.msgpack.encode(plan))) if plan else 0,
    )


def _tables(growth: Growth) -> list[Table]:
    columns = ["ranks, event", "decide", "check", "pipelines", "new", "receivers", "plan MB"]
    rows = [
        [
            f"{t.num_ranks:,} {t.event}",
            seconds(t.decide_s),
            seconds(t.check_s),
            str(t.num_pipelines),
            str(t.num_new),
            str(t.num_receivers),
            f"{t.plan_bytes / 1e6:.2f}",
        ]
        for t in growth.timings
    ]
    slope = "" if growth.exponent is None else f"; time grows as ranks^{growth.exponent:.2f}"
    return [Table(f"decisions: s, median of rounds{slope}", columns, rows)]
