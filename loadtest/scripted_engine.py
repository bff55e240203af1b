"""An engine without a model, on the real NATS protocol: every sequence gets the next token of a script, step by step.

    python -m loadtest.scripted_engine '{"nats_url": "nats://127.0.0.1:4222", "model": "bench", "script": [504, 905]}'

It puts a plan into its bucket and announces it, tells the states of its pipelines, answers submit, cancel and resend,
and commits one frame a step for all sequences of a gateway, as the leader of a pipeline does. It costs little beside
a gateway, so that the gateway alone is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

import msgspec
import nats
import nats.js.errors
import uvloop
from nats.aio.client import Client
from nats.aio.msg import Msg

from engine.protocol import (
    CancelRequest,
    EngineSubjects,
    FinishReason,
    GenerateRequest,
    PipelineState,
    RejectReason,
    ResendReply,
    ResendRequest,
    SubmitReply,
    TokenEntry,
    TokenFrame,
)
from planner.protocol import Explanation, ModelShape, Pipeline, Plan, PlannerSubjects, Shard, Stage

EPOCH: Final = 1
STATE_S: Final = 0.5
MIN_STATE_S: Final = 0.05
"""As the leader: twenty states a second at most."""
BLOCK_TOKENS: Final = 16
MAX_MODEL_LEN: Final = 8192

encode = msgspec.msgpack.encode


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    nats_url: str
    model: str
    """The slug in the NATS subjects."""
    script: list[int]
    """Token ids that every sequence says, again from the start when they are used up."""
    num_pipelines: int = 1
    num_slots: int = 4096
    """Of a pipeline; what comes beyond is refused as FULL."""
    step_s: float = 0.0
    """0: as fast as possible."""


class SetStep(msgspec.Struct, frozen=True):
    """Request on `script_subject`: go on with this step time; the reply is `Delays`."""

    step_s: float


class Delays(msgspec.Struct, frozen=True):
    """Of each request since the last `SetStep`: seconds from its arrival here until its first token has gone out."""

    by_request_s: dict[str, float]


class Sequence(msgspec.Struct):
    """One running choice."""

    request: GenerateRequest
    arrived_s: float
    num_tokens: int = 0


class ScriptedEngine:
    """All pipelines of one model."""

    def __init__(self, client: Client, options: EngineOptions) -> None:
        self.client = client
        self.options = options
        self.step_s = options.step_s
        self.subjects = EngineSubjects(options.model)
        self.delays_s: dict[str, float] = {}
        self._pipelines = [ScriptedPipeline(self, f"p{number}") for number in range(options.num_pipelines)]

    async def run(self) -> None:
        """Serve until cancelled."""
        for pipeline in self._pipelines:
            await pipeline.subscribe()
        await self.client.subscribe(script_subject(self.options.model), cb=self._on_set_step)
        await self._publish_plan()
        print("ready", flush=True)
        async with asyncio.TaskGroup() as tasks:
            for pipeline in self._pipelines:
                tasks.create_task(pipeline.step_forever())
                tasks.create_task(pipeline.tell_state_forever())

    async def _publish_plan(self) -> None:
        subjects, plan = PlannerSubjects(self.options.model), encode(self._plan())
        jetstream = self.client.jetstream()
        try:
            bucket = await jetstream.key_value(subjects.plan_bucket)
        except nats.js.errors.NotFoundError:
            bucket = await jetstream.create_key_value(bucket=subjects.plan_bucket)
        await bucket.put("current", plan)
        await self.client.publish(subjects.plan, plan)

    def _plan(self) -> Plan:
        shape = ModelShape(
            name=self.options.model,
            num_layers=2,
            num_head_groups=1,
            decoder_unit_bytes=1,
            embedding_unit_bytes=1,
            head_unit_bytes=1,
            kv_unit_bytes_per_token=1,
            kv_block_tokens=BLOCK_TOKENS,
            max_model_len=MAX_MODEL_LEN,
            hidden_bytes_per_token=1,
            tied_embeddings=True,
        )
        explanation = Explanation(
            cause="script",
            cause_at_s=0.0,
            decided_at_s=0.0,
            arrivals_per_s=0.0,
            num_ranks=len(self._pipelines),
            chosen=None,
            alternatives=[],
        )
        return Plan(
            epoch=EPOCH,
            model=shape,
            pipelines=[pipeline.position() for pipeline in self._pipelines],
            retiring=[],
            transfers={},
            addresses={},
            explanation=explanation,
            next_pipeline_number=len(self._pipelines),
        )

    async def _on_set_step(self, message: Msg) -> None:
        self.step_s = msgspec.msgpack.decode(message.data, type=SetStep).step_s
        delays_s, self.delays_s = self.delays_s, {}
        for pipeline in self._pipelines:
            pipeline.restart_step()
        await message.respond(encode(Delays(delays_s)))


class ScriptedPipeline:
    """One leader: its sequences advance together."""

    def __init__(self, engine: ScriptedEngine, name: str) -> None:
        self._engine = engine
        self._name = name
        self._sequences: dict[str, Sequence] = {}
        self._frames = msgspec.msgpack.Encoder()
        self._changed = asyncio.Event()
        self._stepping = asyncio.Event()
        self._requests = msgspec.msgpack.Decoder(GenerateRequest)

    async def subscribe(self) -> None:
        client, subjects = self._engine.client, self._engine.subjects
        await client.subscribe(subjects.submit(self._name), cb=self._on_submit)
        await client.subscribe(subjects.cancel(self._name), cb=self._on_cancel)
        await client.subscribe(subjects.resend(self._name), cb=self._on_resend)

    def position(self) -> Pipeline:
        shard = Shard(rank=f"{self._name}-rank", instance=self._name, first_group=0, last_group=0)
        return Pipeline(
            id=self._name,
            stages=[Stage(first_layer=0, last_layer=1, shards=[shard])],
            max_batch=self._engine.options.num_slots,
            num_kv_blocks=self._num_blocks,
        )

    def restart_step(self) -> None:
        """The step time has changed: the step that is waited for begins again."""
        self._stepping.set()

    async def step_forever(self) -> None:
        """A step takes `step_s` from the end of the last one, or less where that one came late."""
        next_s = 0.0
        while True:
            while not self._sequences:
                self._stepping.clear()
                await self._stepping.wait()
            step_s = self._engine.step_s
            next_s = max(next_s, time.monotonic() - step_s) + step_s
            if await self._waits_until(next_s):
                next_s = 0.0
                continue
            await self._step()

    async def tell_state_forever(self) -> None:
        while True:
            self._changed.clear()
            num_running, num_slots = len(self._sequences), self._engine.options.num_slots
            state = PipelineState(
                pipeline=self._name,
                epoch=EPOCH,
                ready=True,
                draining=False,
                running=num_running,
                waiting=0,
                free_slots=num_slots - num_running,
                total_kv_blocks=self._num_blocks,
                free_kv_blocks=self._num_blocks,
                kv_block_tokens=BLOCK_TOKENS,
            )
            await self._engine.client.publish(self._engine.subjects.state(self._name), encode(state))
            await asyncio.sleep(MIN_STATE_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), STATE_S)

    @property
    def _num_blocks(self) -> int:
        return self._engine.options.num_slots * MAX_MODEL_LEN // BLOCK_TOKENS

    async def _waits_until(self, at_s: float) -> bool:
        """Sleep until then; True if `restart_step` came in between."""
        self._stepping.clear()
        left_s = at_s - time.monotonic()
        if left_s <= 0:
            return False
        try:
            await asyncio.wait_for(self._stepping.wait(), left_s)
        except TimeoutError:
            return False
        return True

    async def _step(self) -> None:
        """Commit one token of every sequence, a frame for each gateway."""
        firsts = [sequence for sequence in self._sequences.values() if sequence.num_tokens == 0]
        entries: dict[str, list[TokenEntry]] = {}
        for name, sequence in list(self._sequences.items()):
            entry = self._entry(sequence, sequence.num_tokens, 1)
            sequence.num_tokens += 1
            entries.setdefault(sequence.request.gateway, []).append(entry)
            if entry.finish is not None:
                del self._sequences[name]
                self._changed.set()
        client, subjects = self._engine.client, self._engine.subjects
        for gateway, of_gateway in entries.items():
            frame = TokenFrame(pipeline=self._name, epoch=EPOCH, entries=of_gateway)
            await client.publish(subjects.tokens(gateway, self._name), self._frames.encode(frame))
        if firsts:
            await asyncio.sleep(0)  # the client writes to its socket in its own task
        now_s = time.time()
        self._engine.delays_s.update({s.request.request_id: now_s - s.arrived_s for s in firsts})
        if self._engine.step_s == 0:
            await client.flush()  # the server has it: no faster than frames really travel

    def _entry(self, sequence: Sequence, index: int, num_tokens: int) -> TokenEntry:
        request, script = sequence.request, self._engine.options.script
        ends = index + num_tokens >= request.sampling.max_tokens
        return TokenEntry(
            request_id=request.request_id,
            choice=request.choice,
            attempt=request.attempt,
            index=index,
            ids=[script[position % len(script)] for position in range(index, index + num_tokens)],
            finish=FinishReason.LENGTH if ends else None,
        )

    async def _on_submit(self, message: Msg) -> None:
        arrived_s = time.time()
        request = self._requests.decode(message.data)
        accepted = len(self._sequences) < self._engine.options.num_slots
        if accepted:
            sequence = Sequence(request, arrived_s, len(request.committed_ids))
            self._sequences[request.request_id] = sequence
            if len(self._sequences) == 1:
                self._stepping.set()
            self._changed.set()
        await message.respond(encode(SubmitReply(accepted=accepted, reason=None if accepted else RejectReason.FULL)))

    async def _on_cancel(self, message: Msg) -> None:
        cancelled = msgspec.msgpack.decode(message.data, type=CancelRequest).request_id
        if self._sequences.pop(cancelled, None) is not None:
            self._changed.set()

    async def _on_resend(self, message: Msg) -> None:
        question = msgspec.msgpack.decode(message.data, type=ResendRequest)
        sequence = self._sequences.get(question.request_id)
        entry = None
        if sequence is not None:
            entry = self._entry(sequence, question.from_index, sequence.num_tokens - question.from_index)
        await message.respond(encode(ResendReply(entry=entry)))


def script_subject(model: str) -> str:
    """Where a running engine takes `SetStep`."""
    return f"{PlannerSubjects(model).prefix}.script"


async def set_step(client: Client, model: str, step_s: float) -> Delays:
    """Change the step time of a running engine; the delays until then."""
    reply = await client.request(script_subject(model), encode(SetStep(step_s)), timeout=5.0)
    return msgspec.msgpack.decode(reply.data, type=Delays)


async def serve(options: EngineOptions) -> None:
    """Connect and run until cancelled."""
    client = await nats.connect(options.nats_url)
    try:
        await ScriptedEngine(client, options).run()
    finally:
        await client.close()


def run_until_stopped(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """The loop of a benchmark's process: it ends without noise when it is told to."""
    gc.freeze()  # a look through all modules takes milliseconds, which would count as the gateway's
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(main())


if __name__ == "__main__":
    engine_options = msgspec.json.decode(sys.argv[1], type=EngineOptions)
    run_until_stopped(lambda: serve(engine_options))
