"""Ranks of a pipeline know of each other's end by their connection to the leader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from engine.backends.tensorrt_llm.members import LeaderLink, MemberGate
from engine.backends.tensorrt_llm.wire import Over, Ready


@pytest.fixture
async def gate() -> AsyncIterator[MemberGate]:
    made = MemberGate("127.0.0.1")
    yield made
    made.close()
    await asyncio.sleep(0)


async def until(condition: object) -> None:
    async with asyncio.timeout(5.0):
        while not condition():  # type: ignore[operator] # a function
            await asyncio.sleep(0.005)


async def test_the_leader_waits_for_all_members_also_for_those_that_came_before_it(gate: MemberGate) -> None:
    first = await LeaderLink.join(gate.address, "p1", "n-1")
    await gate.open()
    waiting = asyncio.create_task(gate.wait_for("p1", {"n-1", "n-2"}, lambda _: None))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    second = await LeaderLink.join(gate.address, "p1", "n-2")
    await asyncio.wait_for(waiting, 5.0)
    gate.tell("p1", Ready())
    gate.tell("p1", Over(cause=""))
    for link in (first, second):
        assert isinstance(await link.hear(), Ready)
        assert await link.hear() == Over(cause="")
        link.close()


async def test_a_member_that_leaves_is_told_once_and_only_to_its_pipeline(gate: MemberGate) -> None:
    await gate.open()
    lost: list[str] = []
    link = await LeaderLink.join(gate.address, "p1", "n-1")
    other = await LeaderLink.join(gate.address, "p2", "n-2")
    await asyncio.wait_for(gate.wait_for("p1", {"n-1"}, lost.append), 5.0)
    other.close()
    link.close()
    await until(lambda: lost)
    assert lost == ["n-1 has left"]


async def test_a_leader_that_is_gone_is_an_end_with_a_cause(gate: MemberGate) -> None:
    await gate.open()
    link = await LeaderLink.join(gate.address, "p1", "n-1")
    await asyncio.wait_for(gate.wait_for("p1", {"n-1"}, lambda _: None), 5.0)
    gate.close()
    assert await asyncio.wait_for(link.hear(), 5.0) == Over(cause="the leader is gone")
    link.close()
