"""The preemption tests on `spotserve up --backend tensorrt_llm`, with the double of the package on the path.

Three instances of one GPU each, and two of two GPUs with an engine over both; token ids equal those of an undisturbed
run, for greedy streams and for those with a seed of the client.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest
from trtllm_double.control import control

from engine.backends.tensorrt_llm.processes import is_alive
from tests.e2e.stack import Prompt, Session, Stack, Traffic
from tests.tiny_model import make_tiny_model

DOUBLES = Path(__file__).parents[1] / "doubles"
NUM_STREAMS = 4
NUM_TOKENS = 400
PROMPTS = [
    Prompt(
        ids=tuple((7 * i + 11 * j) % 250 + 3 for j in range(4 + 9 * i)),
        max_tokens=NUM_TOKENS,
        temperature=float(i % 2),
        seed=1000 + i,
    )
    for i in range(NUM_STREAMS)
]


class Fleet:
    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._expected: list[list[int]] = []

    async def traffic(self, session: Session) -> Traffic:
        if not self._expected:
            self._expected = [a.ids for a in await asyncio.gather(*map(session.stream, PROMPTS))]
            assert len({tuple(ids) for ids in self._expected}) == NUM_STREAMS
        return Traffic(session, PROMPTS, self._expected)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Engines of one GPU."""
    yield from started(tmp_path_factory, "--stages", "1", "--tensor", "1")


@pytest.fixture(scope="module")
def wide_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Engines of two stages on the two GPUs of an instance."""
    yield from started(
        tmp_path_factory,
        "--instances",
        "2",
        "--ranks-per-instance",
        "2",
        "--pipelines",
        "2",
        "--stages",
        "2",
        "--tensor",
        "1",
    )


def started(tmp_path_factory: pytest.TempPathFactory, *shape: str) -> Iterator[Fleet]:
    tiny = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", max_len=4096)
    folder = tmp_path_factory.mktemp("stack")
    environ = {
        "TRTLLM_DOUBLE_DIR": str(folder / "double"),
        "PYTHONPATH": f"{DOUBLES}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "SPOTSERVE_UP_RESTART_DELAY_S": "5",
        "SPOTSERVE_ENGINE_STORE_DIR": str(folder),
        "SPOTSERVE_ENGINE_SHUTDOWN_TIMEOUT_S": "2",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRTLLM_DOUBLE_DIR", environ["TRTLLM_DOUBLE_DIR"])
        control.set(num_gpus=6, step_s=0.01)
        options = ("--backend", "tensorrt_llm", "--dtype", "float32", *shape)
        stack = Stack(folder / "state", tiny, *options, environ=environ)
        stack.start()
        yield Fleet(stack)
        stack.stop()
        pids = [pid for entry in control.journal("ready") for pid in entry["workers"]]
        assert pids
        assert not [pid for pid in pids if is_alive(pid)], "workers are left behind"


@pytest.fixture
async def at_rest(fleet: Fleet) -> AsyncIterator[tuple[Fleet, Session]]:
    """Three ready instances before the test; no open request after it."""
    async with Session(fleet.stack) as session:
        await session.restore(3)
        yield fleet, session
        await session.settled()


async def test_a_preemption_with_notice(at_rest: tuple[Fleet, Session]) -> None:
    fleet, session = at_rest
    async with await fleet.traffic(session):
        await session.take_until_resumed(3.0)
    assert session.resumes, "nothing was interrupted"
    assert all(resume.recomputed_tokens > 0 for resume in session.resumes)


async def test_a_kill_without_notice(at_rest: tuple[Fleet, Session]) -> None:
    fleet, session = at_rest
    async with await fleet.traffic(session):
        await session.take_until_resumed(None)
    assert any(resume.recomputed_tokens > 0 for resume in session.resumes)


async def test_an_added_instance_is_used(at_rest: tuple[Fleet, Session]) -> None:
    fleet, session = at_rest
    await session.kill((await session.ready_instances())[1])
    await session.quiet(2)
    before = await session.shape()
    async with await fleet.traffic(session):
        added = await session.add()
        await session.until(partial(session.is_used, added), f"{added} serves")
    assert await session.shape() != before


async def test_two_preemptions_a_second_apart(at_rest: tuple[Fleet, Session]) -> None:
    fleet, session = at_rest
    async with await fleet.traffic(session):
        first, second, _ = await session.ready_instances()
        await session.preempt(first, 4.0)
        await asyncio.sleep(1.0)
        await session.preempt(second, 4.0)
        await session.until_gone(first)
        await session.until_gone(second)


async def test_an_instance_of_two_gpus_is_preempted(wide_fleet: Fleet) -> None:
    async with Session(wide_fleet.stack) as session:
        await session.restore(2)
        assert await session.shape() == ((2, 1), (2, 1))
        async with await wide_fleet.traffic(session):
            await session.take_until_resumed(3.0, num_instances=2)
        assert session.resumes, "nothing was interrupted"
        assert await session.shape() == ((2, 1),)
        await session.settled()
