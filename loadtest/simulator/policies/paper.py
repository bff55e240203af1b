"""SpotServe as in the paper, and the two systems that it was compared with, on static batches and equal pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from loadtest.simulator.policies.base import OnProgress
from loadtest.simulator.policies.paper_migration import (
    Kept,
    Layout,
    Move,
    extended,
    first_layout,
    move,
    ranks_of,
)
from loadtest.simulator.policies.paper_run import PaperOptions, PaperRun, Script, merge
from loadtest.simulator.policies.static_batches import Job, StaticPipeline
from loadtest.simulator.result import Result
from loadtest.simulator.scenario import CapacityEvent, Scenario
from planner.core.paper_mode import PaperConfig


class PaperPolicy:
    """`name`: spotserve-paper, reparallelization or rerouting."""

    def __init__(self, name: str, options: PaperOptions | None = None) -> None:
        if name not in RUNS:
            raise ValueError(f"{name!r} is none of {', '.join(RUNS)}")
        self.name = name
        self.options = options or PaperOptions()

    def run(self, scenario: Scenario, on_progress: OnProgress) -> Result:
        return RUNS[self.name](scenario, self.options).result(self.name, on_progress)


class SpotServePaper(PaperRun):
    """All pipelines stop, context moves to where the matching wants it, interrupted batches go on (sections 2 to 6)."""

    def __init__(self, scenario: Scenario, options: PaperOptions) -> None:
        super().__init__(scenario, options)
        self.config: PaperConfig | None = None
        self.layout: Layout | None = None

    def events(self) -> list[CapacityEvent]:
        """An addition and a removal within the notice after it are one event, at the time of the addition."""
        merged: list[CapacityEvent] = []
        for event in super().events():
            before = merged[-1] if len(merged) > 1 else None
            is_addition = before is not None and bool(before.added) and not before.removed
            if before and is_addition and event.removed and event.at_s <= before.at_s + self.scenario.notice_s:
                merged[-1] = merge(before, event)
            else:
                merged.append(event)
        return merged

    def begin(self) -> Script:
        self.config = self.choose()
        if self.config is None:
            return
        self.layout = first_layout(_sizes(self.config), ranks_of(self.instances, self.scenario.ranks_per_instance))
        yield self.clock.now_s + self.options.overheads.engine_start_s
        self.start(self.config, self.layout)

    def change(self, event: CapacityEvent) -> Script:
        config, old = self.choose(), self.layout
        if not self.is_touched(config, event):
            return
        if old is not None and config is not None and self.only_grows(config, old, event):
            yield from self.grow(config, old, event)
            return
        stopping = list(self.server.pipelines)
        num_used = len({rank.instance for rank in old.places}) if old is not None else 0
        is_growth = bool(event.added) and len(self.instances) > num_used
        self.tell_to_stop(stopping, self.expected_s(config, old), event, is_growth=is_growth)
        yield stopping
        yield self.joined_s(event)
        batches, tokens_recomputed = self.take_out(stopping)
        self.config, self.layout, moved_bytes = config, None, 0
        num_kept = config.data if config is not None else 0
        kept, resumed = self.inherit(batches[:num_kept])
        tokens_recomputed += self.drop([job for _, batch in batches[num_kept:] for job in batch])
        if config is not None:
            moved = self.move(config, old, kept)
            self.layout, moved_bytes = moved.layout, moved.moved_bytes
            yield self.clock.now_s + self.restart_s(moved)
            self.start(config, moved.layout, resumed)
        self.note_pause(event, stopping, moved_bytes, tokens_recomputed)

    # --- Decisions ---

    def choose(self) -> PaperConfig | None:
        """None: no service. Without a controller the first shape stays, and with it the pipelines that fit."""
        num_ranks = len(self.instances) * self.scenario.ranks_per_instance
        if self.options.controller:
            return self.solve(len(self.instances))
        first = self.config or self.solve(len(self.instances), self.options.controller_min_ranks)
        data = num_ranks // (first.pipeline * first.tensor) if first is not None else 0
        return msgspec.structs.replace(first, data=data) if first is not None and data else None

    def is_touched(self, config: PaperConfig | None, event: CapacityEvent) -> bool:
        """Neither an addition without a better configuration nor the loss of idle instances changes anything."""
        used = {rank.instance for rank in self.layout.places} if self.layout is not None else set()
        if config is None or self.config is None or self.layout is None:
            return config is not None or self.layout is not None
        return _sizes(config) != _sizes(self.config) or bool(used & set(event.removed))

    def only_grows(self, config: PaperConfig, old: Layout, event: CapacityEvent) -> bool:
        """The artifact's shortcut: more pipelines of the same shape, and nobody goes."""
        same_shape = (config.pipeline, config.tensor) == (old.pipeline, old.tensor)
        return self.options.migration_planner and same_shape and config.data > old.data and not event.removed

    def expected_s(self, config: PaperConfig | None, old: Layout | None) -> float:
        """T_mig before anything has stopped: every pipeline hands a full batch of whole requests on."""
        if config is None:
            return self.options.overheads.planned_stop_s
        longest = max((r.prompt_tokens + r.output_tokens for r in self.scenario.requests), default=0)
        both = range(min(config.data, old.data if old is not None else 0)) if self.options.arranger else ()
        num_tokens = self.options.max_batch * longest
        return self.move(config, old, [Kept(old_replica=r, new_replica=r, num_tokens=num_tokens) for r in both]).seconds

    def move(self, config: PaperConfig, old: Layout | None, kept: Sequence[Kept]) -> Move:
        return move(self.scenario, old, _sizes(config), self.instances, kept, matched=self.options.device_mapper)

    def restart_s(self, moved: Move) -> float:
        """The engines start while the context moves; without the migration planner they wait for it."""
        start_s = self.options.overheads.engine_start_s
        return max(start_s, moved.seconds) if self.options.migration_planner else start_s + moved.seconds

    # --- Actions ---

    def start(self, config: PaperConfig, layout: Layout, resumed: Sequence[Sequence[Job]] = ()) -> None:
        for replica, instances in enumerate(layout.replicas()):
            pipeline = self.pipeline(config, instances, self.options.max_batch)
            self.server.start(pipeline, resumed[replica] if replica < len(resumed) else ())

    def grow(self, config: PaperConfig, old: Layout, event: CapacityEvent) -> Script:
        """Once the instances are there."""
        yield self.joined_s(event)
        moved = extended(self.scenario, old, config.data, self.instances)
        yield self.clock.now_s + self.restart_s(moved)
        self.config, self.layout = config, moved.layout
        for instances in moved.layout.replicas()[old.data :]:
            self.server.start(self.pipeline(config, instances, self.options.max_batch))
        self.note_pause(event, (), moved.moved_bytes, 0)

    def take_out(self, stopped: Sequence[StaticPipeline]) -> tuple[list[tuple[int, list[Job]]], int]:
        """(replica and batch of each that was cut, most progress first; tokens to compute again).

        The rest goes back to the queue, and without an arranger all does.
        """
        batches, tokens_recomputed = [], 0
        for replica, pipeline in enumerate(stopped):
            self.server.requeue(self.server.remove(pipeline))
            if not self.options.arranger:
                tokens_recomputed += self.requeue_from_start(pipeline.interrupted)
            elif pipeline.interrupted:
                batches.append((replica, pipeline.interrupted))
        return sorted(batches, key=lambda b: (-b[1][0].step, b[0])), tokens_recomputed

    def inherit(self, batches: Sequence[tuple[int, list[Job]]]) -> tuple[list[Kept], list[list[Job]]]:
        """A new pipeline for each batch, in the order of those that ran them."""
        kept, resumed = [], []
        for new_replica, (old_replica, jobs) in enumerate(sorted(batches, key=lambda b: b[0])):
            num_tokens = sum(job.request.prompt_tokens + job.step for job in jobs)
            kept.append(Kept(old_replica=old_replica, new_replica=new_replica, num_tokens=num_tokens))
            resumed.append(jobs)
        return kept, resumed

    def drop(self, jobs: Sequence[Job]) -> int:
        """What fewer pipelines have no place for is computed again; in the artifact it is lost (section 4)."""
        if not self.options.artifact_faults:
            return self.requeue_from_start(jobs)
        for job in jobs:
            job.is_lost, job.ended_s = True, self.clock.now_s
        return 0

    def requeue_from_start(self, jobs: Sequence[Job]) -> int:
        tokens_recomputed = sum(job.restart() for job in jobs)
        self.server.requeue(jobs)
        return tokens_recomputed


class Reparallelization(SpotServePaper):
    """The same configurations, but at every change engines and daemons restart, weights come from disk, and
    interrupted requests begin again (section 7).
    """

    def __init__(self, scenario: Scenario, options: PaperOptions) -> None:
        super().__init__(scenario, msgspec.structs.replace(options, arranger=False))

    def events(self) -> list[CapacityEvent]:
        return PaperRun.events(self)

    def only_grows(self, config: PaperConfig, old: Layout, event: CapacityEvent) -> bool:
        return False

    def expected_s(self, config: PaperConfig | None, old: Layout | None) -> float:
        return self.options.overheads.planned_stop_s

    def move(self, config: PaperConfig, old: Layout | None, kept: Sequence[Kept]) -> Move:
        layout = first_layout(_sizes(config), ranks_of(self.instances, self.scenario.ranks_per_instance))
        return Move(layout=layout, seconds=self.load_s(config.pipeline, config.tensor), moved_bytes=0)

    def restart_s(self, moved: Move) -> float:
        overheads = self.options.overheads
        return overheads.daemon_restart_s + moved.seconds + overheads.engine_start_s


class Rerouting(PaperRun):
    """One shape, solved for the largest fleet; a pipeline ends with any of its instances, and a new one is built, with
    weights from disk, as soon as there are enough idle instances (section 7).
    """

    def __init__(self, scenario: Scenario, options: PaperOptions) -> None:
        super().__init__(scenario, options)
        self.config: PaperConfig | None = None

    def begin(self) -> Script:
        self.config = self.solve(self.most_instances())
        if self.config is not None:
            yield from self.build(self.config, self.options.overheads.engine_start_s)

    def change(self, event: CapacityEvent) -> Script:
        if self.config is None:
            return
        hit = [p for p in self.server.pipelines if p.instances & set(event.removed)]
        if hit:
            self.tell_to_stop(hit, self.options.overheads.planned_stop_s, event, is_growth=False)
            yield hit
        tokens_recomputed = 0
        for pipeline in hit:
            unserved = self.server.remove(pipeline)
            tokens_recomputed += sum(job.restart() for job in pipeline.interrupted)
            self.server.requeue(unserved + pipeline.interrupted)
        yield self.joined_s(event)
        start_s = self.options.overheads.engine_start_s
        load_s = self.load_s(self.config.pipeline, self.config.tensor)
        # The artifact's new engines wait for the weights and then take their start-up time again.
        yield from self.build(self.config, max(start_s, load_s) + start_s)
        if hit:
            self.note_pause(event, hit, 0, tokens_recomputed)

    def build(self, config: PaperConfig, takes_s: float) -> Script:
        groups = self.idle_groups(config)
        if groups:
            yield self.clock.now_s + takes_s
        for group in groups:
            # The solver's batch size, not the scripts': the artifact replaces it for the other two systems only.
            self.server.start(self.pipeline(config, frozenset(group), config.batch))

    def idle_groups(self, config: PaperConfig) -> list[list[str]]:
        """Idle instances, as many as a pipeline needs in each."""
        per_instance = self.scenario.ranks_per_instance
        used = {instance for pipeline in self.server.pipelines for instance in pipeline.instances}
        idle = [instance for instance in self.instances if instance not in used]
        size = -(-config.pipeline * config.tensor // per_instance)
        return [idle[first : first + size] for first in range(0, len(idle) - size + 1, size)]

    def most_instances(self) -> int:
        num, most = 0, 0
        for event in self.events():
            num += len(event.added) - len(event.removed)
            most = max(most, num)
        return most


def _sizes(config: PaperConfig) -> tuple[int, int, int]:
    return config.data, config.pipeline, config.tensor


RUNS: dict[str, Callable[[Scenario, PaperOptions], PaperRun]] = {
    "spotserve-paper": SpotServePaper,
    "reparallelization": Reparallelization,
    "rerouting": Rerouting,
}
