"""The planner process with a real NATS server and fake agents that have real liveness sockets."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import nats
import pytest
from nats.aio.client import Client

from planner.protocol import (
    Arrange,
    DesiredCapacity,
    Explanation,
    InstanceInventory,
    InstanceRequested,
    InstanceState,
    Market,
    ModelShape,
    NoticeCancelled,
    Plan,
    PlannerSubjects,
    PreemptionNotice,
    RankInventory,
    Status,
    StatusRequest,
    unpacked,
)

MODEL = "tiny"
SUBJECTS = PlannerSubjects(MODEL)
SHAPE = ModelShape(
    name=MODEL,
    num_layers=6,
    num_head_groups=3,
    decoder_unit_bytes=1000,
    embedding_unit_bytes=1000,
    head_unit_bytes=1000,
    kv_unit_bytes_per_token=16,
    kv_block_tokens=16,
    max_model_len=256,
    hidden_bytes_per_token=64,
    tied_embeddings=False,
)
encode = msgspec.msgpack.encode
T = TypeVar("T")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class NatsServer:
    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.max_payload = "1MB"
        self.directory = directory
        self.url = f"nats://127.0.0.1:{self.port}"
        self.process: asyncio.subprocess.Process

    async def start(self) -> None:
        binary = shutil.which("nats-server", path=sysconfig.get_path("scripts"))
        assert binary is not None
        config = self.directory.with_suffix(".conf")
        config.write_text(f"max_payload: {self.max_payload}\n")
        self.process = await asyncio.create_subprocess_exec(
            binary, "-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", str(self.directory), "-c", str(config),
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        await until(self.answers, 10)

    def answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.2):
            return True
        return False

    async def stop(self) -> None:
        self.process.terminate()
        await self.process.wait()


class Planner:
    def __init__(self, url: str, log: Path, **settings: str) -> None:
        self.log = log
        self.environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SPOTSERVE_", "OTEL_"))},
            "SPOTSERVE_PLANNER_NATS_URL": url,
            "SPOTSERVE_PLANNER_MODEL": MODEL,
            **{f"SPOTSERVE_PLANNER_{name.upper()}": value for name, value in settings.items()},
        }
        self.process: asyncio.subprocess.Process

    async def start(self) -> None:
        num_before = self.text().count("planner ready")
        with self.log.open("ab") as sink:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "planner", env=self.environ, stdout=sink, stderr=sink
            )
        await until(lambda: self.text().count("planner ready") > num_before, 15)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    async def stop(self, signum: int = signal.SIGTERM) -> int:
        if self.process.returncode is None:
            self.process.send_signal(signum)
        return await asyncio.wait_for(self.process.wait(), 10)


class Agent:
    """One instance of one rank, or of more: inventory every 2 s, and a beating socket."""

    def __init__(self, name: str, num_ranks: int = 1) -> None:
        self.name = name
        self.num_ranks = num_ranks
        self.epoch = 0
        self.runs: str | None = None
        self.model = SHAPE
        self.changed = asyncio.Event()
        self._server: asyncio.Server
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task] = []

    async def start(self, nc: Client) -> None:
        self._server = await asyncio.start_server(self._beat, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self._tasks = [asyncio.create_task(self._announce(nc))]

    async def _beat(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        with contextlib.suppress(OSError):
            while not writer.is_closing():
                writer.write(b".")
                await writer.drain()
                await asyncio.sleep(0.5)

    async def _announce(self, nc: Client) -> None:
        js = nc.jetstream(timeout=1)
        while True:
            payload = encode(self.inventory())
            with contextlib.suppress(nats.errors.Error, OSError):
                await nc.publish(SUBJECTS.inventory(self.name), payload)
                bucket = await js.key_value(SUBJECTS.inventory_bucket)
                await bucket.put(self.name, payload)
            self.changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), 2)

    def inventory(self) -> InstanceInventory:
        return InstanceInventory(
            instance=self.name,
            market=Market.SPOT,
            liveness_address=f"127.0.0.1:{self.port}",
            model=self.model,
            ranks=[
                RankInventory(
                    rank=f"{self.name}-{index}",
                    device="cpu",
                    memory_bytes=10_000_000,
                    context_address=f"127.0.0.1:{self.port}1",
                    store_address=f"127.0.0.1:{self.port}2",
                    pipeline=self.runs,
                )
                for index in range(self.num_ranks)
            ],
            epoch=self.epoch,
        )

    def kill(self) -> None:
        """As the kernel does it: listening socket and connections at once, and no more messages."""
        self._server.close()
        for task in self._tasks:
            task.cancel()
        for writer in self._writers:
            writer.transport.abort()


async def until(condition: Callable[[], T | None], timeout_s: float) -> T:
    """Poll; fails after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        await asyncio.sleep(0.01)
    return result


class Stack:
    def __init__(self, directory: Path, **settings: str) -> None:
        self.server = NatsServer(directory / "nats")
        self.planner = Planner(self.server.url, directory / "planner.log", **settings)
        self.agents: dict[str, Agent] = {}
        self.plans: list[tuple[float, Plan]] = []
        self.arranges: list[Arrange] = []
        self.nc: Client

    async def start(self) -> None:
        await self.server.start()
        self.nc = await nats.connect(
            self.server.url, max_reconnect_attempts=-1, reconnect_time_wait=0.1, error_cb=ignore
        )
        await self.nc.subscribe(SUBJECTS.plan, cb=self.take_plan)
        await self.nc.subscribe(SUBJECTS.arrange, cb=self.take_arrange)
        await self.nc.flush()
        await self.planner.start()

    async def take_plan(self, message) -> None:
        plan = msgspec.msgpack.decode(unpacked(message.data), type=Plan)
        self.plans.append((time.monotonic(), plan))
        for pipeline in plan.pipelines:
            for agent in self.agents.values():
                if f"{agent.name}-0" in pipeline.ranks():
                    agent.runs = pipeline.id
        for agent in self.agents.values():
            agent.epoch = plan.epoch
            agent.changed.set()

    async def take_arrange(self, message) -> None:
        self.arranges.append(msgspec.msgpack.decode(message.data, type=Arrange))

    async def join(self, *names: str) -> None:
        for name in names:
            self.agents[name] = Agent(name)
            await self.agents[name].start(self.nc)
        await self.serving(*names)

    async def serving(self, *names: str, timeout_s: float = 10) -> Plan:
        """Until a plan uses all of `names`."""
        ranks = {f"{name}-0" for name in names}
        return await until(
            lambda: self.plan if self.plans and ranks <= {r for p in self.plan.pipelines for r in p.ranks()} else None,
            timeout_s,
        )

    async def not_serving(self, name: str, timeout_s: float = 10) -> Plan:
        rank = f"{name}-0"
        return await until(
            lambda: self.plan if rank not in {r for p in self.plan.pipelines for r in p.ranks()} else None, timeout_s
        )

    @property
    def plan(self) -> Plan:
        return self.plans[-1][1]

    async def status(self) -> Status:
        reply = await self.nc.request(SUBJECTS.status, encode(StatusRequest()), timeout=2)
        return msgspec.msgpack.decode(unpacked(reply.data), type=Status)

    async def close(self) -> None:
        for agent in self.agents.values():
            agent.kill()
        with contextlib.suppress(ProcessLookupError):
            await self.planner.stop()
        await self.nc.close()
        with contextlib.suppress(ProcessLookupError):
            await self.server.stop()


async def ignore(_error) -> None:
    pass


@pytest.fixture
async def make_stack(tmp_path):
    stacks = []

    async def make(max_payload: str = "1MB", **settings: str) -> Stack:
        """`settings` of the planner."""
        stacks.append(Stack(tmp_path, **settings))
        stacks[-1].server.max_payload = max_payload
        await stacks[-1].start()
        return stacks[-1]

    yield make
    for stack in stacks:
        await stack.close()


@pytest.fixture
async def stack(make_stack):
    return await make_stack()


async def test_join_notice_kill_and_status(stack):
    joined_s = time.monotonic()
    await stack.join("i1", "i2", "i3")
    assert time.monotonic() - joined_s < 2
    assert len(stack.plan.pipelines) == 3
    assert (await stack.status()).plan == stack.plan

    js = stack.nc.jetstream()
    await js.publish(SUBJECTS.capacity("i2"), encode(PreemptionNotice(instance="i2", deadline_s=time.time() + 30)))
    plan = await stack.not_serving("i2", 1)
    assert [r.pipeline.leader for r in plan.retiring] == ["i2-0"]
    await until(lambda: stack.arranges, 1)
    assert stack.arranges[0].pipelines == [plan.retiring[0].pipeline.id]

    killed_s = time.monotonic()
    stack.agents["i1"].kill()
    plan = await stack.not_serving("i1", 2)
    took_s = stack.plans[-1][0] - killed_s
    print(f"kill to plan: {took_s * 1000:.1f} ms")
    assert took_s < 0.3
    assert {r.pipeline.leader: r.broken for r in plan.retiring}["i1-0"]

    states = {i.id: i.state for i in (await stack.status()).instances}
    assert states == {"i1": InstanceState.LOST, "i2": InstanceState.GRACE, "i3": InstanceState.READY}
    bucket = await js.key_value(SUBJECTS.plan_bucket)
    kept = msgspec.msgpack.decode((await bucket.get("current")).value, type=Plan)
    assert kept == stack.plan


async def test_cancelled_notice_takes_the_plan_back(stack):
    await stack.join("i1", "i2")
    before = stack.plan
    js = stack.nc.jetstream()
    await js.publish(SUBJECTS.capacity("i3"), encode(InstanceRequested(instance="i3", market=Market.ON_DEMAND)))
    await js.publish(SUBJECTS.capacity("i2"), encode(PreemptionNotice(instance="i2", deadline_s=time.time() + 30)))
    await stack.not_serving("i2", 2)
    await js.publish(SUBJECTS.capacity("i2"), encode(NoticeCancelled(instance="i2")))
    plan = await stack.serving("i2", timeout_s=2)
    assert plan.epoch == before.epoch + 2
    assert len(plan.pipelines) == 2
    status = await stack.status()
    states = {i.id: (i.state, i.deadline_s) for i in status.instances}
    assert states["i2"] == (InstanceState.READY, None)
    assert states["i3"][0] is InstanceState.REQUESTED
    assert (status.advisory, status.num_failed_decisions, status.desired) == (False, 0, None)


async def test_desired_capacity_and_advice_are_kept_and_announced(make_stack):
    stack = await make_stack(advisory="1", data="2", max_spot="4", min_spot="1", candidate_pool="0")
    announced = []

    async def take_desired(message) -> None:
        announced.append(msgspec.msgpack.decode(message.data, type=DesiredCapacity))

    await stack.nc.subscribe(SUBJECTS.desired, cb=take_desired)
    await stack.join("i1")
    first = stack.plan
    stack.agents["i2"] = Agent("i2")
    await stack.agents["i2"].start(stack.nc)
    await until(lambda: "advice cause=" in stack.planner.text(), 5)
    await until(lambda: announced and announced[-1].spot == 2, 5)
    status = await stack.status()
    assert status.plan == first, "that i2 joined is no reason to act"
    assert status.advisory
    assert status.history[0].advisory
    assert "i2 joined" in status.history[0].cause
    js = stack.nc.jetstream()
    kept = await (await js.key_value(SUBJECTS.fleet_bucket)).get("desired")
    assert msgspec.msgpack.decode(kept.value, type=DesiredCapacity) == announced[-1] == status.desired
    advice = await (await js.key_value(SUBJECTS.plan_bucket)).get("advice")
    assert msgspec.msgpack.decode(advice.value, type=Explanation) == status.history[0]


async def test_an_impossible_model_is_refused_by_field_and_the_plan_stands(stack):
    await stack.join("i1")
    before = stack.plan
    agent = stack.agents["i1"]
    agent.model = msgspec.structs.replace(SHAPE, kv_block_tokens=0)
    agent.changed.set()
    broken = stack.agents["i2"] = Agent("i2")
    broken.model = agent.model
    await broken.start(stack.nc)
    refused = [f"inventory of {name}: model.kv_block_tokens: 0 is below 1" for name in ("i1", "i2")]
    await until(lambda: all(text in stack.planner.text() for text in refused), 10)
    status = await stack.status()
    assert status.plan == before
    assert status.num_failed_decisions == 0
    broken.kill()
    agent.model = SHAPE
    agent.changed.set()
    await stack.join("i3")


async def test_silent_instance_is_lost(stack):
    await stack.join("i1", "i2")
    for writer in stack.agents["i2"]._writers:
        writer.write = lambda _data: None
    await stack.not_serving("i2", 8)
    assert "silent" in stack.plan.explanation.cause
    # It still announces itself and its socket answers: it may come back.
    await stack.serving("i2")


async def test_malformed_messages_are_dropped_and_the_rest_goes_on(stack):
    await stack.join("i1")
    for subject in (SUBJECTS.capacity("x"), SUBJECTS.inventory("x"), SUBJECTS.load("x"), SUBJECTS.progress(1)):
        for payload in (b"", b"\xc1", encode({"type": "InstanceLost", "instance": 3}), b"\xff" * 100):
            await stack.nc.publish(subject, payload)
    await stack.nc.publish(SUBJECTS.status, b"junk")
    await stack.join("i2")
    assert len(stack.plan.pipelines) == 2
    text = stack.planner.text()
    for subject in (SUBJECTS.capacity("x"), SUBJECTS.inventory("x"), SUBJECTS.load("x"), SUBJECTS.progress(1)):
        assert f"dropped subject={subject} reason=" in text


async def test_planner_restart_goes_on_from_its_plan(stack):
    await stack.join("i1", "i2", "i3")
    before = stack.plan
    assert await stack.planner.stop(signal.SIGKILL) == -signal.SIGKILL
    notice = PreemptionNotice(instance="i2", deadline_s=time.time() + 30)
    await stack.nc.jetstream().publish(SUBJECTS.capacity("i2"), encode(notice))
    await stack.planner.start()
    plan = await stack.not_serving("i2", 5)
    assert plan.epoch == before.epoch + 1
    assert plan.pipelines == [p for p in before.pipelines if p.leader != "i2-0"]
    assert await stack.planner.stop() == 0
    await stack.planner.start()
    await until(lambda: stack.planner.text().count("plan unchanged") > 0, 5)
    status = await stack.status()
    assert status.plan == plan
    assert status.epoch == plan.epoch
    assert {i.id: i.state for i in status.instances}["i2"] is InstanceState.GRACE
    assert len(status.history) == plan.epoch


async def test_a_plan_for_thousands_of_ranks_fits_through_nats_as_it_is_installed(make_stack):
    stack = await make_stack(pipeline="1", tensor="1")
    stack.agents["i1"] = Agent("i1", num_ranks=4000)
    await stack.agents["i1"].start(stack.nc)
    plan = await until(lambda: stack.plan if stack.plans else None, 30)
    assert len(plan.pipelines) == 4000
    assert len(encode(plan)) > stack.nc.max_payload, "it would not fit as it is"
    assert (await stack.status()).plan == plan
    bucket = await stack.nc.jetstream().key_value(SUBJECTS.plan_bucket)
    assert msgspec.msgpack.decode(unpacked((await bucket.get("current")).value), type=Plan) == plan


async def test_a_server_that_takes_no_plan_is_told_of_and_the_plan_comes_later(make_stack):
    stack = await make_stack(max_payload="2KB")
    stack.agents["i1"] = Agent("i1")
    await stack.agents["i1"].start(stack.nc)
    await until(lambda: "raise max_payload" in stack.planner.text(), 10)
    assert "plan of epoch 1 takes" in stack.planner.text()
    await stack.server.stop()
    stack.server.max_payload = "1MB"
    await stack.server.start()
    assert (await stack.serving("i1")).epoch >= 1


async def test_nats_restart(stack):
    await stack.join("i1", "i2", "i3")
    epoch = stack.plan.epoch
    await stack.server.stop()
    await asyncio.sleep(3)  # the outage itself, not a wait for something
    stack.agents["i1"].kill()
    await until(lambda: 'cause="instance i1 lost' in stack.planner.text(), 2)
    await stack.server.start()
    plan = await stack.not_serving("i1", 10)
    assert plan.epoch == epoch + 1
    js = stack.nc.jetstream(timeout=2)
    await until_published(js, PreemptionNotice(instance="i2", deadline_s=time.time() + 30))
    await stack.not_serving("i2", 5)
    await js.stream_info(f"spotserve-{MODEL}-tokens")


async def until_published(js, notice: PreemptionNotice) -> None:
    deadline_s = time.monotonic() + 10
    while True:
        try:
            await js.publish(SUBJECTS.capacity(notice.instance), encode(notice))
        except (nats.errors.Error, OSError):
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.1)
        else:
            return


async def test_it_stops_cleanly_while_nats_is_away(stack):
    await stack.join("i1")
    await stack.server.stop()
    await until(lambda: "NATS connection lost" in stack.planner.text(), 5)
    assert await stack.planner.stop() == 0
    assert stack.planner.text().rstrip().endswith("planner stopped")
    assert "Traceback" not in stack.planner.text()


async def test_bad_setting_is_named(tmp_path):
    planner = Planner("nats://127.0.0.1:1", tmp_path / "log", max_batch="many")
    with planner.log.open("wb") as sink:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "planner", env=planner.environ, stdout=sink, stderr=sink
        )
    assert await asyncio.wait_for(process.wait(), 10) == 2
    assert "SPOTSERVE_PLANNER_MAX_BATCH" in planner.text()
