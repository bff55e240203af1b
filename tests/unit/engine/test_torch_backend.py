"""What the torch backend keeps, and what it lets go."""

import asyncio
import gc
import threading
import time
import weakref
from pathlib import Path

import pytest

from engine.backends.torch.backend import TorchBackend
from engine.core.roles import Position
from engine.errors import EngineError, ProtocolError
from engine.protocol import KvHolder, KvSource, PullRequest
from engine.settings import EngineSettings
from planner.protocol import RankAddress, Transfer, UnitRange
from tests.contract.fleet import Fleet, MakeBackend, request, until
from tests.tiny_model import make_tiny_model

PROMPT = [5, 17, 40, 99, 120]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def fleet(model_dir: Path) -> Fleet:
    def make(rank: str) -> TorchBackend:
        settings = EngineSettings(
            nats_url="nats://unused",
            model="tiny",
            model_dir=model_dir,
            instance=rank,
            cache_dir=model_dir.parent / "cache",
            kv_transfer="always",
        )
        return TorchBackend(settings, rank)

    return Fleet(MakeBackend("torch", make))


def units_of(layer: int) -> UnitRange:
    return UnitRange(first_layer=layer, last_layer=layer, first_group=0, last_group=2)


async def listen_only(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


async def test_what_is_being_prepared_is_not_freed_by_a_pipeline_that_just_started(fleet: Fleet) -> None:
    async with fleet:
        await fleet.serve("p1", [["b"], ["a"]])
        await fleet.serve("p2", [["c"]])
        backend = fleet.backends["a"]
        await backend.free_unneeded("p1")
        assert (0, 0) not in backend.units()
        # Layer 0 comes at once, layer 1 never.
        silent = await asyncio.start_server(listen_only, "127.0.0.1", 0)
        address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
        addresses = {**fleet._addresses, "s": RankAddress(instance="s", context_address=address, store_address="")}
        position = Position(await fleet.pipeline("p3", [["a"]]), 0, 0, 9, addresses)
        transfers = [Transfer(units=units_of(0), sources=["c"]), Transfer(units=units_of(1), sources=["s"])]
        preparing = asyncio.create_task(backend.prepare(position, transfers))
        await until(lambda: (0, 0) in backend.units())
        await backend.free_unneeded("p1")
        assert (0, 0) in backend.units()
        preparing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await preparing
        await backend.free_unneeded("p1")
        assert (0, 0) not in backend.units()
        assert (5, 0) in backend.units()
        silent.close()


async def test_a_pipeline_that_has_ended_frees_nothing(fleet: Fleet) -> None:
    async with fleet:
        recorder = await fleet.serve("p1", [["a"]])
        held = fleet.backends["a"].units()
        fleet.leaders["p1"].abort("test")
        await until(lambda: "p1" in recorder.broken)
        await asyncio.sleep(0)
        await fleet.backends["a"].free_unneeded("p1")
        assert fleet.backends["a"].units() == held


async def test_a_prepare_that_waits_for_a_member_is_given_up_at_once(fleet: Fleet) -> None:
    async with fleet:
        pipeline = await fleet.pipeline("p1", [["a"], ["b"]])
        num_threads = threading.active_count()
        waiting = []
        for index in range(20):  # More than the event loop has threads.
            backend = fleet.backends["ab"[index % 2]]
            position = Position(pipeline, index % 2, 0, 1, dict(fleet._addresses))
            waiting.append(asyncio.create_task(backend.prepare(position, [])))
            if index < 18:
                await asyncio.sleep(0.01)
                waiting[-1].cancel()
        started_s = time.monotonic()
        await asyncio.gather(*waiting[:-2], return_exceptions=True)
        await asyncio.gather(*waiting[-2:])  # Both members are there.
        assert time.monotonic() - started_s < 10
        await fleet.start(pipeline)
        await until(lambda: threading.active_count() < num_threads + 12)


async def park_two(fleet: Fleet) -> KvSource:
    """Two sequences parked on rank a; the KV source of the first."""
    old = await fleet.serve("p1", [["a"]])
    for name in ("r0", "r1"):
        await fleet.leaders["p1"].submit(request(name, PROMPT, max_tokens=500))
    await until(lambda: all(len(old.tokens(name)) >= 3 for name in ("r0", "r1")))
    fleet.leaders["p1"].arrange(None, 0.0)
    await until(lambda: bool(fleet.backends["a"].parked()))
    last = old.last("r0")
    assert last is not None
    assert last.interruption is not None
    assert last.interruption.kv_source is not None
    return last.interruption.kv_source


async def test_parked_kv_goes_when_each_sequence_was_released(fleet: Fleet) -> None:
    async with fleet:
        source = await park_two(fleet)
        backend = fleet.backends["a"]
        pool = weakref.ref(backend._pool("p1"))  # type: ignore[attr-defined] # of this backend
        backend.release_kv("p1", "r0", 0)
        backend.release_kv("p1", "r0", 0)
        assert backend.parked() == {"p1": 1}
        assert backend.export_kv("p1", 0, 0, source.blocks, source.num_tokens)
        backend.release_kv("p1", "r1", 0)
        backend.release_kv("unknown", "r1", 0)
        assert backend.parked() == {}
        with pytest.raises(ProtocolError, match="p1"):
            backend.export_kv("p1", 0, 0, source.blocks, source.num_tokens)
        # The leader is still asked for its log; that does not hold the KV.
        assert await fleet.leaders["p1"].resend("r0", 0, 0) is not None
        await until(lambda: gc.collect() >= 0 and pool() is None)


async def test_parked_kv_that_nobody_comes_for_expires(fleet: Fleet) -> None:
    async with fleet:
        await park_two(fleet)
        backend = fleet.backends["a"]
        assert backend.release_expired(time.time() + 50) == []
        assert backend.release_expired(time.time() + 70) == ["p1"]
        assert backend.parked() == {}


async def test_a_failed_pull_says_why_and_leaves_nobody_writing(fleet: Fleet) -> None:
    async with fleet:
        source = await park_two(fleet)
        await fleet.serve("p2", [["b"]])
        backend = fleet.backends["b"]
        (holder,) = source.holders
        nowhere = KvHolder(
            rank="ghost", context_address="127.0.0.1:1", first_layer=0, last_layer=2, first_group=0, last_group=2
        )
        blocks = list(range(len(source.blocks)))
        for holders, why in (([holder], ""), ([nowhere, holder], "ghost"), ([nowhere], "nobody holds")):
            kv = KvSource(pipeline="p1", num_tokens=source.num_tokens, holders=holders, blocks=source.blocks)
            reply = await backend.pull_kv(
                PullRequest(pipeline="p2", request_id="r0", choice=0, source=kv, blocks=blocks)
            )
            assert reply.ok is (why == "")
            assert why in reply.detail
        unknown = PullRequest(pipeline="p9", request_id="r0", choice=0, source=source, blocks=blocks)
        assert not (await backend.pull_kv(unknown)).ok


async def test_a_submission_that_fails_in_the_thread_is_answered_and_the_pipeline_breaks(fleet: Fleet) -> None:
    async with fleet:
        recorder = await fleet.serve("p1", [["a"], ["b"]])
        leader = fleet.leaders["p1"]

        def fail() -> None:
            raise RuntimeError("a bug")

        asked = leader._ask(fail)  # type: ignore[attr-defined] # of this backend
        assert await asyncio.wait_for(asked, 10) is None
        await until(lambda: "p1" in recorder.broken)
        reply = await asyncio.wait_for(leader.submit(request("r0", PROMPT)), 10)
        assert not reply.accepted
        # The member heard of it: both ranks can run the next pipeline.
        await fleet.serve("p2", [["a"], ["b"]])


async def test_a_plan_without_addresses_is_an_error_that_names_the_leader(fleet: Fleet) -> None:
    async with fleet:
        pipeline = await fleet.pipeline("p1", [["a"], ["b"]])
        with pytest.raises(EngineError, match="leader a"):
            await fleet.backends["b"].prepare(Position(pipeline, 1, 0, 1, {}), [])
