"""The loop: what is heard goes into the state machine, its effects come out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from typing import Final

from nats.errors import Error as NatsError

from planner.core.effects import (
    Effect,
    Event,
    ForgetInstance,
    InstanceReached,
    ProbeInstances,
    PublishAdvice,
    PublishArrange,
    PublishDesired,
    PublishPlan,
    Report,
    Severity,
    Tick,
    WatchInstance,
)
from planner.core.state_machine import PlannerState
from planner.errors import MessageTooLargeError, PlannerError
from planner.protocol import Arrange, DesiredCapacity, Explanation, InstanceLost, Plan
from planner.services.bus import RETRY_S, Bus, Incoming
from planner.services.liveness import Liveness
from planner.settings import Settings
from planner.telemetry import Tracing, line

log = logging.getLogger("planner")

LEVELS: Final = {Severity.INFO: logging.INFO, Severity.WARNING: logging.WARNING, Severity.ERROR: logging.ERROR}


TOO_LARGE_RETRY_S: Final = 10.0
"""The operator may raise the server's limit while it runs."""


STOP_TIMEOUT_S: Final = 3.0
"""The process ends then, whatever still waits for an answer."""


class Controller:
    def __init__(self, settings: Settings, tracing: Tracing) -> None:
        self._state = PlannerState(
            settings.targets,
            limits=settings.limits,
            prepare_timeout_s=settings.prepare_timeout_s,
            is_advisory=settings.advisory,
        )
        self._tracing = tracing
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._liveness = Liveness(self._hear, settings.heartbeat_timeout_s)
        self._bus = Bus(settings.nats_url, settings.model, self._hear)
        self._outbox = Outbox(self._bus)

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set."""
        serving = asyncio.create_task(self._serve())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
        finally:
            for task in (serving, stopping):
                task.cancel()
            await asyncio.wait([serving, stopping], timeout=STOP_TIMEOUT_S)
            await self._liveness.close()
            await self._bus.close()

    async def _serve(self) -> None:
        await self._bus.connect()
        await self._restore()
        await self._bus.subscribe(lambda: self._state.status(time.time()))
        log.info(line("planner ready", epoch=self._state.plan.epoch if self._state.plan else 0))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._bus.run(self._outbox.resend))
            tasks.create_task(self._outbox.run())
            tasks.create_task(self._loop())

    async def _restore(self) -> None:
        plans = await self._bus.load_plans()
        capacity = await self._bus.load_capacity()
        inventories = await self._bus.load_inventories()
        if plans:
            gone = {m.instance for m in capacity if isinstance(m, InstanceLost)} - {i.instance for i in inventories}
            history = [plan.explanation for plan in plans]
            self._outbox.adopt(plans[0])
            log.info(line("plan restored", epoch=plans[0].epoch, pipelines=len(plans[0].pipelines)))
            for effect in self._state.restore(plans[0], history, gone, time.time()):
                self._carry_out(effect, 0.0)
        for message in [*(m for m in capacity if not isinstance(m, InstanceLost)), *inventories]:
            self._hear(message)

    def _hear(self, event: Incoming | InstanceReached | InstanceLost) -> None:
        self._inbox.put_nowait(event)

    async def _loop(self) -> None:
        while True:
            now_s = time.time()
            wait_s = self._state.next_wakeup_s(now_s) - now_s
            try:
                async with asyncio.timeout(max(wait_s, 0.0) if wait_s < math.inf else None):
                    event = await self._inbox.get()
            except TimeoutError:
                event = Tick()
            self._handle(event)

    def _handle(self, event: Event) -> None:
        now_s = time.time()
        started_s = time.perf_counter()
        try:
            effects = self._state.handle(event, now_s)
        except PlannerError as error:
            log.warning(line("dropped", message=type(event).__name__, reason=error))
            return
        decide_s = time.perf_counter() - started_s
        for effect in effects:
            self._carry_out(effect, decide_s)

    def _carry_out(self, effect: Effect, decide_s: float) -> None:
        match effect:
            case PublishPlan(plan=plan):
                log.info(_plan_line(plan, decide_s))
                self._outbox.put_plan(plan, self._tracing.record_plan(plan, decide_s, time.time()))
            case PublishArrange(arrange=arrange):
                left_s = "none" if arrange.deadline_s is None else f"{arrange.deadline_s - time.time():.3f}"
                names = ",".join(arrange.pipelines)
                log.info(line("arrange", epoch=arrange.epoch, pipelines=names, left_s=left_s))
                self._outbox.put_arrange(arrange)
            case PublishAdvice(explanation=explanation):
                log.info(line("advice", **_explanation_fields(explanation)))
                self._outbox.put_advice(explanation)
            case PublishDesired(desired=desired):
                fields = {"spot": desired.spot, "on_demand": desired.on_demand, "release": ",".join(desired.release)}
                log.info(line("desired capacity", **fields, reason=desired.reason))
                self._outbox.put_desired(desired)
            case WatchInstance(instance=instance, address=address):
                self._liveness.watch(instance, address)
            case ForgetInstance(instance=instance):
                self._liveness.forget(instance)
            case ProbeInstances(instances=instances):
                self._liveness.probe(instances)
            case Report(event=event, fields=fields, severity=severity):
                log.log(LEVELS[severity], line(event, **fields))


class Outbox:
    """Sends plans and arrangements in order. While the server is away it tries on; the newest plan wins."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._plan: Plan | None = None
        self._headers: dict[str, str] = {}
        self._is_sent = True
        self._arranges: list[Arrange] = []
        self._advice: Explanation | None = None
        self._desired: DesiredCapacity | None = None
        self._is_desired_sent = True
        self._wake = asyncio.Event()

    def adopt(self, plan: Plan) -> None:
        """A restored plan: it is out already."""
        self._plan = plan

    def put_plan(self, plan: Plan, headers: dict[str, str]) -> None:
        self._plan, self._headers, self._is_sent = plan, headers, False
        self._arranges.clear()  # of older plans; the state machine asks again for what still matters
        self._wake.set()

    def put_arrange(self, arrange: Arrange) -> None:
        self._arranges.append(arrange)
        self._wake.set()

    def put_advice(self, explanation: Explanation) -> None:
        self._advice = explanation
        self._wake.set()

    def put_desired(self, desired: DesiredCapacity) -> None:
        self._desired, self._is_desired_sent = desired, False
        self._wake.set()

    def resend(self) -> None:
        """The server was away: it may have lost the plan, and others its announcement."""
        self._is_sent = self._plan is None
        self._is_desired_sent = self._desired is None
        self._wake.set()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._send()
            except MessageTooLargeError as error:
                log.error(line("publish failed, the fleet stays with the last plan that it has", error=error))
                await self._wait(TOO_LARGE_RETRY_S)
            except (NatsError, OSError, TimeoutError) as error:
                log.warning(line("publish failed, trying again", error=repr(error)))
                await asyncio.sleep(RETRY_S)
                self._wake.set()

    async def _wait(self, delay_s: float) -> None:
        """For the next thing to send, and no longer than `delay_s`: it tries again then."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._wake.wait()
        self._wake.set()

    async def _send(self) -> None:
        while not self._is_sent and self._plan is not None:
            plan = self._plan
            await self._bus.publish_plan(plan, self._headers)
            self._is_sent = plan is self._plan
        while self._arranges and self._is_sent:
            await self._bus.publish_arrange(self._arranges.pop(0))
        while not self._is_desired_sent and self._desired is not None:
            desired = self._desired
            await self._bus.publish_desired(desired)
            self._is_desired_sent = desired is self._desired
        while self._advice is not None:
            advice = self._advice
            await self._bus.publish_advice(advice)
            self._advice = None if advice is self._advice else self._advice


def _plan_line(plan: Plan, decide_s: float) -> str:
    return line(
        "plan",
        epoch=plan.epoch,
        pipelines=",".join(p.id for p in plan.pipelines) or "none",
        retiring=",".join(r.pipeline.id for r in plan.retiring) or "none",
        decide_ms=round(decide_s * 1000, 1),
        **_explanation_fields(plan.explanation),
    )


def _explanation_fields(explanation: Explanation) -> dict[str, object]:
    config = explanation.chosen
    return {
        "cause": explanation.cause,
        "config": f"{config.data}x{config.pipeline}x{config.tensor}" if config else "none",
        "moved_mb": round(explanation.bytes_moved / 1e6, 1),
        "reused_mb": round(explanation.bytes_reused / 1e6, 1),
        "since_cause_s": f"{explanation.decided_at_s - explanation.cause_at_s:.3f}",
        "notes": "; ".join(explanation.notes) or "none",
    }
