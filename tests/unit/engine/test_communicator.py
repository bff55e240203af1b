"""Process groups of a pipeline, each member in a thread of its own."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from engine.backends.torch import communicator
from engine.backends.torch.communicator import Communicator, rendezvous_store
from engine.core.roles import Position
from engine.errors import PipelineBroken
from planner.protocol import Pipeline, RankAddress, Shard, Stage

T = TypeVar("T")
HOST = "127.0.0.1"
DEADLINE_S = 15.0
CPU = torch.device("cpu")


@pytest.fixture
def store() -> TCPStore:
    return rendezvous_store(HOST)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def positions(store: TCPStore, *stages: list[str], name: str = "p1") -> list[Position]:
    pipeline = Pipeline(
        id=name,
        stages=[
            Stage(
                first_layer=i,
                last_layer=i,
                shards=[Shard(rank=r, instance=r, first_group=j, last_group=j) for j, r in enumerate(ranks)],
            )
            for i, ranks in enumerate(stages)
        ],
        max_batch=1,
        num_kv_blocks=1,
    )
    address = RankAddress(instance="a", context_address="", store_address=f"{HOST}:{store.port}")
    return [
        Position(pipeline, i, j, 1, {pipeline.leader: address})
        for i, ranks in enumerate(stages)
        for j in range(len(ranks))
    ]


def form(
    pool: ThreadPoolExecutor, members: list[Position], abandoned: threading.Event | None = None
) -> list[Future[Communicator]]:
    event = abandoned or threading.Event()
    return [pool.submit(Communicator, position, HOST, CPU, event) for position in members]


def formed(pool: ThreadPoolExecutor, members: list[Position]) -> list[Communicator]:
    return [future.result(DEADLINE_S) for future in form(pool, members)]


def in_parallel(pool: ThreadPoolExecutor, *work: Callable[[], T]) -> list[T]:
    return [future.result(DEADLINE_S) for future in [pool.submit(part) for part in work]]


def test_hops_carry_messages_and_tensors_apart(store: TCPStore, pool: ThreadPoolExecutor) -> None:
    a, b, c = formed(pool, positions(store, ["a"], ["b"], ["c"]))
    x = torch.arange(12, dtype=torch.float32).view(3, 4)
    a.send_control(b"first", 1)
    a.send(x, 1)
    a.send_control(b"to c", 2)
    assert b.receive_control(0) == b"first"
    assert torch.equal(b.receive((3, 4), torch.float32, 0), x)
    assert c.receive_control(0) == b"to c"
    a.flush()


def test_shards_of_a_stage_reduce_and_gather_among_themselves(store: TCPStore, pool: ThreadPoolExecutor) -> None:
    members = formed(pool, positions(store, ["a", "b", "c"], ["d", "e", "f"]))
    for stage in (members[:3], members[3:]):
        parts = [torch.full((2,), float(10**shard)) for shard in range(3)]
        in_parallel(pool, *(lambda m=m, x=x: m.all_reduce(x) for m, x in zip(stage, parts, strict=True)))
        assert all(part.tolist() == [111.0, 111.0] for part in parts)
        own = [torch.tensor([float(shard)]) for shard in range(3)]
        gathered = in_parallel(pool, *(lambda m=m, x=x: m.all_gather(x) for m, x in zip(stage, own, strict=True)))
        assert all([x.item() for x in parts] == [0.0, 1.0, 2.0] for parts in gathered)


def test_more_sends_than_may_be_pending_arrive_in_order(store: TCPStore, pool: ThreadPoolExecutor) -> None:
    a, b = formed(pool, positions(store, ["a"], ["b"]))

    def send() -> None:
        for i in range(100):
            a.send_control(bytes([i]) * 1000, 1)

    sending = pool.submit(send)
    assert [b.receive_control(0)[0] for _ in range(100)] == list(range(100))
    sending.result(DEADLINE_S)


def test_who_does_not_come_is_named(store: TCPStore, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communicator, "FORM_TIMEOUT_S", 3.0)
    futures = form(pool, [p for p in positions(store, ["a"], ["b"], ["c"]) if p.index != 1])
    for future in futures:
        with pytest.raises(PipelineBroken, match=r"p1 .*\bb\b.* did not come"):
            future.result(DEADLINE_S)


def test_an_absent_leader_is_named(store: TCPStore, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communicator, "FORM_TIMEOUT_S", 0.3)
    (future,) = form(pool, positions(store, ["a"], ["b"])[1:])
    with pytest.raises(PipelineBroken, match=r"\ba did not come"):
        future.result(DEADLINE_S)


def test_a_plan_without_the_leaders_address(store: TCPStore) -> None:
    leader, _ = positions(store, ["a"], ["b"])
    leader.addresses.clear()
    with pytest.raises(PipelineBroken, match="no address of its leader a"):
        Communicator(leader, HOST, CPU, threading.Event())


@pytest.mark.parametrize("waiting", [0, 1])
def test_forming_that_is_abandoned_ends_at_once_and_the_id_can_be_formed_again(
    store: TCPStore, pool: ThreadPoolExecutor, waiting: int
) -> None:
    members = positions(store, ["a"], ["b"])
    abandoned = threading.Event()
    (future,) = form(pool, [members[waiting]], abandoned)
    with pytest.raises(TimeoutError):
        future.result(0.2)
    abandoned.set()
    started_s = time.monotonic()
    with pytest.raises(PipelineBroken, match="discarded"):
        future.result(DEADLINE_S)
    assert time.monotonic() - started_s < 2
    a, b = formed(pool, members)
    a.send_control(b"again", 1)
    assert b.receive_control(0) == b"again"


def test_a_group_that_was_formed_can_be_formed_again_while_the_first_lives(
    store: TCPStore, pool: ThreadPoolExecutor
) -> None:
    members = positions(store, ["a"], ["b"])
    first, second = formed(pool, members), formed(pool, members)
    first[0].send_control(b"first", 1)
    second[0].send_control(b"second", 1)
    assert second[1].receive_control(0) == b"second"
    assert first[1].receive_control(0) == b"first"


@pytest.mark.parametrize("stages", [(["a"], ["b"], ["c"]), (["a", "b", "c"],)])
def test_abort_ends_what_others_wait_for_here_and_at_the_peers(
    store: TCPStore, pool: ThreadPoolExecutor, stages: tuple[list[str], ...]
) -> None:
    a, b, c = formed(pool, positions(store, *stages))
    waiting = [pool.submit(b.receive_control, 0), pool.submit(c.receive_control, 0), pool.submit(a.receive_control, 1)]
    with pytest.raises(TimeoutError):
        waiting[0].result(0.2)
    a.abort()
    for future in waiting:
        with pytest.raises(PipelineBroken, match="p1"):
            future.result(DEADLINE_S)
    with pytest.raises(PipelineBroken):
        a.receive_control(1)
