"""What comes from the bus, on its way to those who wait for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine.protocol import FinishReason, PipelineState, SamplingParams, SubmitReply, TokenEntry, TokenFrame
from gateway.core.request_state import ChoiceState, Effect, EntryArrived, Event
from gateway.errors import ApiError
from gateway.services.dispatcher import _MAX_BACKLOG, ChoiceSpec, Dispatcher
from gateway.services.generation import Generation
from gateway.settings import Settings
from gateway.telemetry import RequestTrace, no_tracer
from planner.protocol import Explanation, ModelShape, Pipeline, Plan, Shard, Stage


class Bus:
    """Takes everything."""

    connected = True

    async def submit(self, *_: Any) -> SubmitReply:
        return SubmitReply(accepted=True)

    async def cancel(self, *_: Any) -> None:
        return None


@pytest.fixture
def dispatcher() -> Dispatcher:
    """With one pipeline, `p0`."""
    made = Dispatcher(Settings(model_dir="m", model="m", gateway_id="gw"), Bus(), lambda: 100.0)  # type: ignore[arg-type]
    model = ModelShape(
        name="m",
        num_layers=1,
        num_head_groups=1,
        decoder_unit_bytes=1,
        embedding_unit_bytes=1,
        head_unit_bytes=1,
        kv_unit_bytes_per_token=1,
        kv_block_tokens=16,
        max_model_len=100,
        hidden_bytes_per_token=1,
        tied_embeddings=True,
    )
    shard = Shard(rank="p0-0", instance="p0", first_group=0, last_group=0)
    pipeline = Pipeline(
        id="p0", stages=[Stage(first_layer=0, last_layer=0, shards=[shard])], max_batch=100_000, num_kv_blocks=9
    )
    explanation = Explanation(
        cause="", cause_at_s=0, decided_at_s=0, arrivals_per_s=0, num_ranks=1, chosen=None, alternatives=[]
    )
    plan = Plan(
        epoch=1,
        model=model,
        pipelines=[pipeline],
        retiring=[],
        transfers={},
        addresses={},
        explanation=explanation,
        next_pipeline_number=1,
    )
    state = PipelineState(
        pipeline="p0",
        epoch=1,
        ready=True,
        draining=False,
        running=0,
        waiting=0,
        free_slots=100_000,
        total_kv_blocks=9,
        free_kv_blocks=9,
    )
    made.on_plan(plan)
    made.on_state(state)
    return made


def begin(dispatcher: Dispatcher, name: str, max_tokens: int = 100) -> Generation:
    spec = ChoiceSpec(0, [1, 2], SamplingParams(max_tokens=max_tokens, seed=1, eos_token_ids=[0]))
    return dispatcher.generate(name, [spec], RequestTrace(no_tracer(), "chat", "m", {}))


def entry(name: str, index: int, finish: FinishReason | None = None) -> TokenEntry:
    return TokenEntry(request_id=name, choice=0, attempt=0, index=index, ids=[index], finish=finish)


def frame(*entries: TokenEntry) -> TokenFrame:
    return TokenFrame(pipeline="p0", epoch=1, entries=list(entries))


async def test_a_first_token_does_not_wait_for_the_rest_of_an_earlier_frame(dispatcher: Dispatcher) -> None:
    old = [begin(dispatcher, f"old{number}") for number in range(100)]
    new = begin(dispatcher, "new")
    await dispatcher.on_frame(frame(*(entry(f"old{number}", 0) for number in range(100))))
    for generation in old:
        assert [delivery.ids for delivery in generation.take()] == [[0]]
    await dispatcher.on_frame(frame(*(entry(f"old{number}", 1) for number in range(100))))
    await asyncio.sleep(0)
    assert len(old[0].take()) == 1
    assert not old[-1].take()
    await dispatcher.on_frame(frame(entry("new", 0)))
    assert [delivery.ids for delivery in new.take()] == [[0]]
    assert not old[-1].take()
    async with asyncio.timeout(10):
        assert [delivery.ids for delivery in await old[-1].next()] == [[1]]


async def test_frames_beyond_what_may_wait_are_not_taken_and_nothing_is_lost(dispatcher: Dispatcher) -> None:
    num_of_frame = _MAX_BACKLOG // 4
    num_tokens = 8 * num_of_frame
    generation = begin(dispatcher, "one", num_tokens)
    num_taken = 0

    async def bring() -> None:
        nonlocal num_taken
        for start in range(0, num_tokens, num_of_frame):
            indices = range(start, start + num_of_frame)
            ends = num_tokens - 1
            entries = (entry("one", index, FinishReason.LENGTH if index == ends else None) for index in indices)
            await dispatcher.on_frame(frame(*entries))
            num_taken += 1

    bringing = asyncio.create_task(bring())
    await asyncio.sleep(0)
    assert 0 < num_taken < 8
    async with asyncio.timeout(30):
        ids = [delivery.ids for delivery in await generation.all()]
        await bringing
    assert ids == [[index] for index in range(num_tokens)]
    assert dispatcher.idle


async def test_a_fault_in_one_request_ends_that_request_alone(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = begin(dispatcher, "bad"), begin(dispatcher, "good")
    handle = ChoiceState.handle

    def faulty(state: ChoiceState, event: Event, now_s: float) -> list[Effect]:
        if state.request_id == "bad" and isinstance(event, EntryArrived):
            raise AssertionError("as if the core were wrong")
        return handle(state, event, now_s)

    monkeypatch.setattr(ChoiceState, "handle", faulty)
    await dispatcher.on_frame(frame(entry("bad", 0), entry("good", 0), entry("good", 1)))
    with pytest.raises(ApiError) as failure:
        await bad.next()
    assert failure.value.status == 500
    async with asyncio.timeout(10):
        ids = [delivery.ids for delivery in await good.next()]
        ids += [delivery.ids for delivery in await good.next()]
    assert ids == [[0], [1]]
