"""What comes from the bus, on its way to those who wait for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine.protocol import FinishReason, SamplingParams, SubmitReply, TokenEntry, TokenFrame
from gateway.core.request_state import ChoiceState, Effect, EntryArrived, Event
from gateway.errors import ApiError
from gateway.services.dispatcher import _MAX_BACKLOG, ChoiceSpec, Dispatcher
from gateway.services.generation import Generation
from gateway.settings import Settings
from gateway.telemetry import RequestTrace, no_tracer
from tests.unit.gateway.plans import pipeline, plan, state


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
    made.on_plan(plan(1, [pipeline("p0")]))
    made.on_state(state("p0", free=100_000))
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
