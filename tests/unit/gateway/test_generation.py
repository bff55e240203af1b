"""The reader of a request is woken once for all that has come."""

import asyncio

import pytest

from engine.protocol import TokenLogprobs
from gateway.errors import unavailable
from gateway.services.generation import Delivery, Generation, joined


async def test_everything_that_has_come_at_once():
    generation = Generation(["a"])
    reader = asyncio.create_task(generation.next())
    await asyncio.sleep(0)
    deliveries = [Delivery(0, [1], None, 0), Delivery(0, [2], "stop", 0)]
    for delivery in deliveries:
        generation.put(delivery)
        generation.tell()
    assert await reader == deliveries


async def test_silence_gives_nothing():
    generation = Generation(["a"])
    assert await generation.next(0.01) == []
    generation.put(Delivery(0, [1], None, 0))
    assert len(await generation.next(10.0)) == 1


async def test_all_waits_for_every_choice_and_wakes_once():
    generation = Generation(["a", "b"])
    reader = asyncio.create_task(generation.all())
    for index, finish in ((0, None), (1, None), (0, "stop")):
        generation.put(Delivery(index, [1], finish, 0))
        generation.tell()
        await asyncio.sleep(0)
        assert not reader.done()
    generation.put(Delivery(1, [2], "length", 0))
    generation.tell()
    assert len(await reader) == 4


async def test_what_is_taken_at_once_wakes_nobody():
    generation = Generation(["a"])
    taken, takes = [], True

    def at_once():
        taken.extend(generation.take() if takes else [])
        return takes

    generation.at_once = at_once
    generation.put(Delivery(0, [1], None, 0))
    generation.tell()  # nobody waits: it is kept for the reader
    assert len(await generation.next()) == 1
    reader = asyncio.create_task(generation.next())
    await asyncio.sleep(0)
    for token_id in (2, 3):
        generation.put(Delivery(0, [token_id], None, 0))
        generation.tell()
        await asyncio.sleep(0)
        assert not reader.done()
    takes = False
    for token_id in (4, 5):
        generation.put(Delivery(0, [token_id], None, 0))
        generation.tell()
        takes = True  # the reader has been woken: what comes after that is its own
    assert [delivery.ids for delivery in await reader] == [[4], [5]]
    assert [delivery.ids for delivery in taken] == [[2], [3]]


async def test_silence_begins_after_what_was_taken_at_once():
    generation = Generation(["a"])
    generation.at_once = lambda: bool(generation.take())
    loop = asyncio.get_running_loop()
    reader = asyncio.create_task(generation.next(0.2))
    await asyncio.sleep(0.1)
    told_s = loop.time()
    generation.put(Delivery(0, [1], None, 0))
    generation.tell()
    assert await reader == []
    assert loop.time() - told_s > 0.19


async def test_errors_come_after_the_tokens_before():
    generation = Generation(["a"])
    generation.put(Delivery(0, [1], None, 0))
    generation.fail(unavailable("gone", "x"))
    assert len(await generation.next()) == 1
    for wait in (generation.next, generation.all):
        with pytest.raises(Exception, match="gone"):
            await wait()


def test_deliveries_of_a_choice_are_joined():
    score = TokenLogprobs(-1.0, 1)
    deliveries = [
        Delivery(0, [1], None, 4, [score], [None]),
        Delivery(1, [7], None, 0),
        Delivery(0, [2, 3], "stop", 0, [score, score]),
    ]
    assert joined(deliveries) == [Delivery(0, [1, 2, 3], "stop", 4, [score] * 3, [None]), Delivery(1, [7], None, 0)]
