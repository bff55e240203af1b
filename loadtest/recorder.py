"""Listens to a running stack on NATS, asks the planner, and plays the cloud through the supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Final, TypeVar

import msgspec
from nats.errors import Error as NatsError

from deploy.bus import Command, connect
from deploy.errors import CommandError
from deploy.protocol import CommandReply, supervisor_subject
from engine.protocol import EngineSubjects, PipelineState, TokenFrame
from loadtest.pauses import Heard
from planner.protocol import (
    InstanceInventory,
    InstanceState,
    Message,
    Pipeline,
    Plan,
    PlannerSubjects,
    RankProgress,
    Status,
    StatusRequest,
    unpacked,
)

REPLY_TIMEOUT_S: Final = 5.0

M = TypeVar("M", bound=Message)


class Recorder:
    """`async with await Recorder.connect(...)`: `heard` and `states` fill while it is open."""

    def __init__(self, nats_url: str, model: str) -> None:
        self._url = nats_url
        self._model = model
        self._planner = PlannerSubjects(model)
        self.heard = Heard()
        self.states: dict[str, PipelineState] = {}
        """The newest of each pipeline."""
        self.inventories: dict[str, InstanceInventory] = {}

    async def __aenter__(self) -> Recorder:
        self._client = await connect(self._url)
        engine = EngineSubjects(self._model)
        await self._watch(engine.all_states, PipelineState, self._on_state)
        await self._watch(engine.all_tokens, TokenFrame, self._on_frame)
        await self._watch(self._planner.plan, Plan, lambda at_s, plan: self.heard.plans.append((at_s, plan)))
        await self._watch(self._planner.all_progress, RankProgress, self._on_progress)
        await self._watch(self._planner.all_inventory, InstanceInventory, self._on_inventory)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        await self._client.close()

    async def _watch(self, subject: str, kind: type[M], handle: Callable[[float, M], None]) -> None:
        decoder = msgspec.msgpack.Decoder(kind)

        async def received(message: Any) -> None:
            handle(time.time(), decoder.decode(unpacked(message.data)))

        await self._client.subscribe(subject, cb=received)

    def _on_state(self, _at_s: float, state: PipelineState) -> None:
        self.states[state.pipeline] = state

    def _on_inventory(self, _at_s: float, inventory: InstanceInventory) -> None:
        self.inventories[inventory.instance] = inventory

    def _on_progress(self, at_s: float, progress: RankProgress) -> None:
        self.heard.progress.append((at_s, progress))

    def _on_frame(self, at_s: float, frame: TokenFrame) -> None:
        for entry in frame.entries:
            if entry.interruption is not None:
                self.heard.interruptions.append((at_s, entry.request_id))
            if entry.resume is not None:
                self.heard.resumes.append((at_s, entry.request_id, entry.resume))

    # --- The fleet ---------------------------------------------------------------------------------------------

    async def command(self, command: Command) -> str:
        """The supervisor's answer; raises CommandError where it refuses."""
        subject = supervisor_subject(self._model)
        reply = await self._client.request(subject, msgspec.msgpack.encode(command), timeout=REPLY_TIMEOUT_S)
        answer = msgspec.msgpack.decode(reply.data, type=CommandReply)
        if not answer.ok:
            raise CommandError(answer.message)
        return answer.message

    async def status(self) -> Status | None:
        """The planner's; None where it does not answer just now."""
        with contextlib.suppress(NatsError, TimeoutError):
            question = msgspec.msgpack.encode(StatusRequest())
            reply = await self._client.request(self._planner.status, question, timeout=REPLY_TIMEOUT_S)
            return msgspec.msgpack.decode(unpacked(reply.data), type=Status)
        return None

    def serves(self, pipeline: Pipeline) -> bool:
        state = self.states.get(pipeline.id)
        return state is not None and state.ready and not state.draining

    def is_settled(self, status: Status, num_instances: int) -> bool:
        """So many instances, all ready and all used, and every planned pipeline serves."""
        living = {i.id: i.state for i in status.instances if i.state is not InstanceState.LOST}
        pipelines = status.plan.pipelines if status.plan else []
        used = {shard.instance for p in pipelines for stage in p.stages for shard in stage.shards}
        return (
            len(living) == num_instances
            and set(living.values()) == {InstanceState.READY}
            and used == living.keys()
            and all(map(self.serves, pipelines))
        )


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float, poll_s: float = 0.1) -> bool:
    """Poll until it holds; False after `timeout_s`."""
    give_up_s = time.monotonic() + timeout_s
    while not await condition():
        if time.monotonic() > give_up_s:
            return False
        await asyncio.sleep(poll_s)
    return True
