"""What must survive, on the real stack with a tiny model: token ids equal those of an undisturbed run.

The stacks run with `--reduction fixed` in float32, where every shape and every batch gives the same bits; so all
comparisons here are exact, for greedy and for seeded sampling.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.stack import Prompt, Session, Stack, Traffic
from tests.tiny_model import make_tiny_model

NUM_STREAMS = 6
NUM_TOKENS = 100
FIXED = ("--reduction", "fixed", "--dtype", "float32")
# Six streams of different length, half of them sampled at temperature 1.
PROMPTS = [
    Prompt(
        ids=tuple((7 * i + 11 * j) % 250 + 3 for j in range(4 + 9 * i)),
        max_tokens=NUM_TOKENS,
        temperature=float(i % 2),
        seed=1000 + i,
    )
    for i in range(NUM_STREAMS)
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", max_len=4096)


class Shared:
    """A stack that the tests of a module use one after the other, and the answers of its undisturbed run."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._expected: list[list[int]] = []

    async def traffic(self, session: Session) -> Traffic:
        if not self._expected:
            self._expected = [a.ids for a in await asyncio.gather(*map(session.stream, PROMPTS))]
            assert len({tuple(ids) for ids in self._expected}) == NUM_STREAMS
        return Traffic(session, PROMPTS, self._expected)


def shared_stack(tmp_path_factory: pytest.TempPathFactory, tiny: Path, *options: str) -> Iterator[Shared]:
    # For a model this small the cost model would compute the KV again, and nothing would be pulled.
    environ = {"SPOTSERVE_UP_RESTART_DELAY_S": "5", "SPOTSERVE_ENGINE_KV_TRANSFER": "always"}
    stack = Stack(tmp_path_factory.mktemp("stack") / "state", tiny, *FIXED, *options, environ=environ)
    stack.start()
    yield Shared(stack)
    stack.stop()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Shared]:
    """Three pipelines of one rank each."""
    yield from shared_stack(tmp_path_factory, tiny)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Shared]:
    """One pipeline, with as many stages as there are instances, up to three."""
    yield from shared_stack(tmp_path_factory, tiny, "--pipelines", "1", "--stages", "3", "--tensor", "1")


@pytest.fixture(scope="module")
def tensor(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Shared]:
    """One pipeline of one stage, in three shards when there are three instances."""
    yield from shared_stack(tmp_path_factory, tiny, "--pipelines", "1", "--stages", "1", "--tensor", "3")


@asynccontextmanager
async def at_rest(shared: Shared) -> AsyncIterator[tuple[Shared, Session]]:
    """Three ready instances before the test; no open request and no held block after it."""
    async with Session(shared.stack) as session:
        await session.restore(3)
        yield shared, session
        await session.settled()


@pytest.fixture(params=["replicas", "stages", "tensor"])
async def each_shape(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Shared, Session]]:
    async with at_rest(request.getfixturevalue(request.param)) as shared_and_session:
        yield shared_and_session


@pytest.fixture
async def on_replicas(replicas: Shared) -> AsyncIterator[tuple[Shared, Session]]:
    async with at_rest(replicas) as shared_and_session:
        yield shared_and_session


@pytest.fixture
async def on_stages(stages: Shared) -> AsyncIterator[tuple[Shared, Session]]:
    async with at_rest(stages) as shared_and_session:
        yield shared_and_session


async def test_a_preemption_with_notice_moves_the_kv(each_shape: tuple[Shared, Session]) -> None:
    shared, session = each_shape
    async with await shared.traffic(session):
        await session.take_until_resumed(5.0)
    assert session.resumes, "nothing was interrupted"
    assert all(resume.pulled_tokens > 0 and resume.recomputed_tokens == 0 for resume in session.resumes)


async def test_untouched_pipelines_never_stop(on_replicas: tuple[Shared, Session]) -> None:
    shared, session = on_replicas
    async with await shared.traffic(session):
        plan = (await session.status()).plan
        assert plan is not None
        first, *others = plan.pipelines
        session.started.clear()
        await session.preempt(first.stages[0].shards[0].instance, 3.0)
        await session.until_gone(first.stages[0].shards[0].instance)
        after = (await session.status()).plan
        assert after is not None
        assert after.pipelines == others
    assert not session.started, "nothing was rebuilt"


async def test_one_two_three_stages_and_back(on_stages: tuple[Shared, Session]) -> None:
    shared, session = on_stages
    async with await shared.traffic(session):
        shapes = [await session.shape()]
        for _ in range(2):
            victim = (await session.ready_instances())[-1]
            await session.preempt(victim, 3.0)
            await session.until_gone(victim)
            shapes.append(await session.shape())
        for _ in range(2):
            added = await session.add()
            await session.until(partial(session.is_used, added), f"{added} serves")
            shapes.append(await session.shape())
    assert shapes == [((3, 1),), ((2, 1),), ((1, 1),), ((2, 1),), ((3, 1),)]


async def test_a_kill_without_notice_recomputes(each_shape: tuple[Shared, Session]) -> None:
    shared, session = each_shape
    async with await shared.traffic(session):
        await session.take_until_resumed(None)
    assert any(resume.recomputed_tokens > 0 for resume in session.resumes)


async def test_an_added_instance_is_used(each_shape: tuple[Shared, Session]) -> None:
    shared, session = each_shape
    await session.kill((await session.ready_instances())[1])
    await session.quiet(2)
    before = await session.shape()
    async with await shared.traffic(session):
        added = await session.add()
        await session.until(lambda: session.is_used(added), f"{added} serves")
    assert await session.shape() != before


async def test_two_preemptions_a_second_apart(each_shape: tuple[Shared, Session]) -> None:
    shared, session = each_shape
    async with await shared.traffic(session):
        first, second, _ = await session.ready_instances()
        await session.preempt(first, 4.0)
        await asyncio.sleep(1.0)
        await session.preempt(second, 4.0)
        await session.until_gone(first)
        await session.until_gone(second)


async def test_a_kill_during_a_migration(on_stages: tuple[Shared, Session]) -> None:
    shared, session = on_stages
    async with await shared.traffic(session):
        first, second, _ = await session.ready_instances()
        num_plans = len(session.plans)
        await session.preempt(first, 4.0)
        await session.until(lambda: len(session.plans) > num_plans, "a plan for the notice")
        await session.kill(second)
        await session.until_gone(first)
        await session.until_gone(second)


async def test_a_cancelled_notice_takes_the_plan_back(on_stages: tuple[Shared, Session]) -> None:
    shared, session = on_stages
    async with await shared.traffic(session) as traffic:
        victim = (await session.ready_instances())[-1]
        epoch = (await session.status()).epoch
        await session.preempt(victim, 8.0)
        await session.until(lambda: session.plans and session.plans[-1].epoch > epoch, "a plan without it")
        await session.cancel_notice(victim)
        await session.until(partial(session.is_used, victim), f"{victim} serves")
        await traffic.goes_on()
        assert victim in await session.ready_instances()
        assert await session.shape() == ((3, 1),)


async def test_down_to_nothing_and_back(on_replicas: tuple[Shared, Session]) -> None:
    shared, session = on_replicas
    async with await shared.traffic(session):
        for instance in await session.ready_instances():
            await session.preempt(instance, 3.0)
        await session.until(lambda: session.has_instances(0), "no instance")
        assert (await session.http.get("/ready")).status_code == 503
        assert (await session.http.get("/health")).status_code == 200
        counts = (await session.http.get("/internal/requests")).json()
        assert counts["waiting"] + counts["running"] == NUM_STREAMS
        await session.add()


async def test_the_planner_is_killed_and_comes_back(on_replicas: tuple[Shared, Session]) -> None:
    shared, session = on_replicas
    async with await shared.traffic(session) as traffic:
        epoch = (await session.status()).epoch
        planner = session.stack.running.pids["planner"]
        os.kill(planner, signal.SIGKILL)
        await traffic.goes_on()
        await session.until(lambda: session.stack.running.pids.get("planner", planner) != planner, "another planner")
        status = await session.status()
        assert status.epoch == epoch
        assert len(await session.ready_instances()) == 3
        victim = (await session.ready_instances())[0]
        await session.kill(victim)
        await session.until_gone(victim)
        assert (await session.status()).epoch > epoch


async def test_nats_is_killed_and_comes_back_after_five_seconds(on_replicas: tuple[Shared, Session]) -> None:
    shared, session = on_replicas
    async with await shared.traffic(session):
        server = session.stack.running.pids["nats"]
        os.kill(server, signal.SIGKILL)
        await session.until(lambda: session.stack.running.pids.get("nats", server) != server, "another NATS server")
        await session.until(lambda: session.has_instances(3), "the fleet is known again")
