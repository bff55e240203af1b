"""How long a client's stream pauses when an instance is preempted or killed, and where the time goes.

A local stack of three instances serves continuous streams. One instance at a time is preempted with notice or killed
without, and replaced. A pause is the longest gap between two chunks around the event, of each stream that the event
interrupted, as its HTTP client saw it; the parts come from what planner and engine say on NATS.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec
from nats.errors import Error as NatsError

from deploy.errors import DeployError
from deploy.protocol import AddCommand, KillCommand, PreemptCommand
from loadtest.errors import BenchError, StackError
from loadtest.pauses import (
    Event,
    Kind,
    Parts,
    Pause,
    Spread,
    gaps_within,
    longest_untouched_gaps,
    pauses_of,
    percentile,
    spread,
)
from loadtest.recorder import Recorder, until
from loadtest.report import Check, Report, Table, seconds
from loadtest.stack import LocalStack
from loadtest.streams import Traffic

NOTICE_TARGET_S: Final = 1.0
KILL_TARGET_S: Final = 2.5
DETECT_TARGET_S: Final = 0.5
NUM_INSTANCES: Final = 3
SETTLE_TIMEOUT_S: Final = 90.0
CALM_S: Final = 2.0
"""Undisturbed decoding before each event."""
CHUNKS_AGAIN: Final = 3
"""A stream goes on when it has brought so many more chunks."""
PARTS: Final = tuple(field.name for field in msgspec.structs.fields(Parts))


class PauseOptions(msgspec.Struct, frozen=True, kw_only=True):
    up_options: list[str] = []
    """For `spotserve up`."""
    num_stages: int = 1
    """Of each pipeline; a divisor of NUM_INSTANCES, so that all are used."""
    num_events: int = 6
    """Of each kind."""
    notice_s: float = 5.0
    num_streams: int = 6
    num_prompt_tokens: int = 64
    num_tokens: int = 256


class Occurrence(msgspec.Struct, frozen=True, kw_only=True):
    """One event, and what it did to the streams."""

    event: Event
    pauses: list[Pause]
    untouched_gaps_s: list[float]


class PauseFigures(msgspec.Struct, kw_only=True):
    options: PauseOptions
    undisturbed_gap: Spread
    by_kind: dict[str, Spread]
    untouched_by_kind: dict[str, Spread]
    """Longest gap around an event of the streams that it did not interrupt."""
    parts_p50: dict[str, dict[str, float | None]]
    parts_max: dict[str, dict[str, float | None]]
    occurrences: list[Occurrence]


class PauseBench:
    """Events on one running stack."""

    def __init__(self, stack: LocalStack, options: PauseOptions, recorder: Recorder, traffic: Traffic) -> None:
        self._stack = stack
        self._options = options
        self._recorder = recorder
        self._traffic = traffic
        self._calm_windows: list[tuple[float, float]] = []
        self._events: list[Event] = []

    async def run(self) -> None:
        """All events, one after the other; raises BenchError."""
        await self._until_all_serve(NUM_INSTANCES)
        async with self._traffic:
            await self._until_streams_go_on()
            await self._all_events()

    async def _all_events(self) -> None:
        for number in range(self._options.num_events):
            for kind in (Kind.NOTICE, Kind.KILL):
                await self._stay_calm()
                event = await self._take_away(kind, number)
                await self._add()
                _say(self._describe(number, event))

    def figures(self) -> PauseFigures:
        """Of the events so far."""
        logs, heard = self._traffic.logs, self._recorder.heard
        occurrences = []
        for event in self._events:
            pauses = pauses_of(event, logs, heard)
            gaps = longest_untouched_gaps(event, logs, pauses)
            occurrences.append(Occurrence(event=event, pauses=pauses, untouched_gaps_s=gaps))
        calm = [gap for log in logs for gap in gaps_within(log.chunk_times_s, self._calm_windows)]
        return summarize(self._options, calm, occurrences)

    async def _settle(self, num_instances: int) -> None:
        await self._until_all_serve(num_instances)
        await self._until_streams_go_on()

    async def _until_all_serve(self, num_instances: int) -> None:
        async def is_settled() -> bool:
            self._traffic.check()
            status = await self._recorder.status()
            return status is not None and self._recorder.is_settled(status, num_instances)

        await self._until(is_settled, f"{num_instances} instances all serve")

    async def _until_streams_go_on(self) -> None:
        before = self._traffic.progress()

        async def goes_on() -> bool:
            pairs = zip(before, self._traffic.progress(), strict=True)
            return all(after >= number + CHUNKS_AGAIN for number, after in pairs)

        await self._until(goes_on, "every stream goes on")

    async def _until(self, condition: Callable[[], Awaitable[bool]], what: str) -> None:
        if not await until(condition, SETTLE_TIMEOUT_S):
            raise StackError(f"not in {SETTLE_TIMEOUT_S:g} s: {what}", self._stack.directory)

    async def _stay_calm(self) -> None:
        started_s = time.time()
        await asyncio.sleep(CALM_S)
        self._calm_windows.append((started_s, time.time()))

    async def _take_away(self, kind: Kind, number: int) -> Event:
        victim = await self._choose_victim(number)
        context_tokens = self._traffic.mean_context_tokens()
        at_s = time.time()
        if kind is Kind.NOTICE:
            await self._recorder.command(PreemptCommand(instance=victim, notice_s=self._options.notice_s))
        else:
            await self._recorder.command(KillCommand(instance=victim))
        await self._settle(NUM_INSTANCES - 1)
        return self._note(kind, victim, at_s, context_tokens)

    async def _add(self) -> None:
        context_tokens = self._traffic.mean_context_tokens()
        at_s = time.time()
        answer = await self._recorder.command(AddCommand())
        await self._settle(NUM_INSTANCES)
        added = re.search(r"\bi\d+\b", answer)
        self._note(Kind.ADD, added.group() if added else "", at_s, context_tokens)

    def _note(self, kind: Kind, instance: str, at_s: float, context_tokens: float) -> Event:
        event = Event(kind=kind, instance=instance, at_s=at_s, until_s=time.time(), context_tokens=context_tokens)
        self._events.append(event)
        return event

    async def _choose_victim(self, number: int) -> str:
        """An instance of the pipeline with the most sequences; each stage in turn."""
        status = await self._recorder.status()
        if status is None or status.plan is None or not status.plan.pipelines:
            raise StackError("the planner has no plan", self._stack.directory)
        states = self._recorder.states
        busiest = max(status.plan.pipelines, key=lambda p: states[p.id].running if p.id in states else 0)
        shards = [shard for stage in busiest.stages for shard in stage.shards]
        return shards[number % len(shards)].instance

    def _describe(self, number: int, event: Event) -> str:
        pauses = pauses_of(event, self._traffic.logs, self._recorder.heard)
        lengths = ", ".join(f"{pause.pause_s:.2f}" for pause in pauses) or "no stream interrupted"
        return f"{number + 1}/{self._options.num_events} {event.kind} {event.instance}: {lengths}"


def summarize(options: PauseOptions, calm_gaps_s: Sequence[float], occurrences: list[Occurrence]) -> PauseFigures:
    """Percentiles over all streams of all events of a kind."""
    kinds = list(Kind)
    pauses = {k: [p for o in occurrences if o.event.kind is k for p in o.pauses] for k in kinds}
    untouched = {k: [g for o in occurrences if o.event.kind is k for g in o.untouched_gaps_s] for k in kinds}
    return PauseFigures(
        options=options,
        undisturbed_gap=spread(calm_gaps_s),
        by_kind={kind: spread([pause.pause_s for pause in pauses[kind]]) for kind in kinds},
        untouched_by_kind={kind: spread(untouched[kind]) for kind in kinds},
        parts_p50={kind: _parts_at(50, pauses[kind]) for kind in kinds},
        parts_max={kind: _parts_at(100, pauses[kind]) for kind in kinds},
        occurrences=occurrences,
    )


def _parts_at(percent: float, pauses: Sequence[Pause]) -> dict[str, float | None]:
    columns = {name: [getattr(pause.parts, name) for pause in pauses] for name in PARTS}
    return {
        name: percentile([value for value in values if value is not None], percent) for name, values in columns.items()
    }


async def _measure(stack: LocalStack, options: PauseOptions) -> tuple[PauseFigures, str | None]:
    running = stack.running
    traffic = Traffic(
        stack.endpoint,
        running.served_model_name,
        num_streams=options.num_streams,
        num_prompt_tokens=options.num_prompt_tokens,
        num_tokens=options.num_tokens,
    )
    async with Recorder(running.nats_url, running.model) as recorder:
        bench = PauseBench(stack, options, recorder, traffic)
        failure = None
        try:
            await bench.run()
        except (BenchError, DeployError, NatsError, TimeoutError) as error:
            failure = f"{type(error).__name__}: {error}"
        return bench.figures(), failure


def run(options: PauseOptions) -> Report:
    """Start a stack, disturb it, stop it."""
    num_pipelines, num_stages = NUM_INSTANCES // options.num_stages, options.num_stages
    shape = ["--pipelines", str(num_pipelines), "--stages", str(num_stages), "--tensor", "1"]
    _say(f"starting {NUM_INSTANCES} instances")
    with LocalStack(["--instances", str(NUM_INSTANCES), *shape, *options.up_options]) as stack:
        figures, failure = asyncio.run(_measure(stack, options))
    name = f"pause, {num_pipelines} pipeline(s) of {num_stages} stage(s)"
    return Report(name=name, tables=_tables(name, figures), checks=_checks(figures), figures=figures, failure=failure)


def _checks(figures: PauseFigures) -> list[Check]:
    notice, kill = figures.by_kind[Kind.NOTICE], figures.by_kind[Kind.KILL]
    detect_s = figures.parts_max[Kind.KILL]["detect_s"]
    return [
        Check(name="pause after a notice, p99", value=notice.p99_s, unit="s", target=NOTICE_TARGET_S),
        Check(name="pause after a kill, p99", value=kill.p99_s, unit="s", target=KILL_TARGET_S),
        Check(name="detection of a kill, max", value=detect_s, unit="s", target=DETECT_TARGET_S),
    ]


def _tables(name: str, figures: PauseFigures) -> list[Table]:
    return [_pause_table(name, figures), _parts_table(figures), _context_table(figures)]


def _pause_table(name: str, figures: PauseFigures) -> Table:
    def row(what: str, one: Spread) -> list[str]:
        return [what, str(one.num), *map(seconds, (one.p50_s, one.p90_s, one.p99_s, one.max_s))]

    options = figures.options
    title = (
        f"{name}: {options.num_streams} streams of {options.num_prompt_tokens} + {options.num_tokens} tokens, "
        f"{options.num_events} events of a kind, notice {options.notice_s:g} s; gaps between chunks in s"
    )
    rows = [row("undisturbed", figures.undisturbed_gap)]
    for kind in Kind:
        rows.append(row(f"{kind}: interrupted streams", figures.by_kind[kind]))
        rows.append(row(f"{kind}: other streams, longest", figures.untouched_by_kind[kind]))
    return Table(title, ["", "num", "p50", "p90", "p99", "max"], rows)


def _parts_table(figures: PauseFigures) -> Table:
    kinds = [kind for kind in Kind if figures.by_kind[kind].num]
    columns = ["", *(f"{kind} {at}" for kind in kinds for at in ("p50", "max"))]
    rows = [
        [
            name.removesuffix("_s").replace("_", " "),
            *(seconds(part[kind][name]) for kind in kinds for part in (figures.parts_p50, figures.parts_max)),
        ]
        for name in PARTS
    ]
    return Table("parts of the pause in s (`pauses.Parts` says what each is)", columns, rows)


def _context_table(figures: PauseFigures) -> Table:
    rows = []
    for kind in Kind:
        events = [o for o in figures.occurrences if o.event.kind is kind]
        pauses = [pause for o in events for pause in o.pauses]
        if events:
            context = sum(o.event.context_tokens for o in events) / len(events)
            pulled = sum(pause.pulled_tokens for pause in pauses)
            recomputed = sum(pause.recomputed_tokens for pause in pauses)
            rows.append([kind, str(len(events)), str(len(pauses)), f"{context:.0f}", str(pulled), str(recomputed)])
    columns = ["", "events", "interrupted", "mean context", "pulled", "recomputed"]
    return Table("tokens whose KV was pulled or computed again", columns, rows)


def _say(line: str) -> None:
    print(f"pause: {line}", file=sys.stderr, flush=True)
