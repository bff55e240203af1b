"""Real agents and ranks on a real NATS server; the test plays planner and gateway.

Processes are shared: a test asks for an instance by name and gets the one that runs, or a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import nats
import nats.errors
import psutil
import pytest
from nats.aio.client import Client

from engine.protocol import EngineSubjects, GenerateRequest, PipelineState, SamplingParams, SubmitReply, TokenFrame
from planner.protocol import (
    Explanation,
    InstanceInventory,
    Message,
    ModelShape,
    Phase,
    Pipeline,
    Plan,
    PlannerSubjects,
    RankAddress,
    RankProgress,
    Retiring,
    Shard,
    Stage,
    Transfer,
)
from tests.tiny_model import make_tiny_model

MODEL = "tiny"
PLANNER, ENGINE = PlannerSubjects(MODEL), EngineSubjects(MODEL)
TIMEOUT_S = 60.0
M = TypeVar("M", bound=Message)
encode = msgspec.msgpack.encode


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Instance:
    """An agent and its ranks."""

    def __init__(self, name: str, log: Path, environ: dict[str, str]) -> None:
        self.name = name
        self._log = log
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "engine"], env=environ, stdout=sink, stderr=sink, start_new_session=True
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def pids(self) -> list[int]:
        agent = psutil.Process(self.process.pid)
        return [agent.pid, *(child.pid for child in agent.children(recursive=True))]

    def rank_pid(self) -> int:
        (rank,) = self.pids()[1:]
        return rank

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)


class Cluster:
    """What outlives a test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model_dir = make_tiny_model(directory / "model")
        self.epoch = 0
        self.pipeline_numbers = itertools.count(1)
        self.instances: dict[str, Instance] = {}
        port = _free_port()
        self.nats_url = f"nats://127.0.0.1:{port}"
        self._nats = subprocess.Popen(
            [Path(sys.executable).parent / "nats-server", "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", directory],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline_s = time.monotonic() + TIMEOUT_S
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            assert time.monotonic() < deadline_s, "nats-server does not start"
            time.sleep(0.02)

    def start(self, name: str, **settings: object) -> Instance:
        given = {
            "nats_url": self.nats_url,
            "model": MODEL,
            "model_dir": self.model_dir,
            "instance": name,
            "reduction": "fixed",
            "cache_dir": self.directory / "cache",
            "rank_memory_bytes": 1 << 28,
            **settings,
        }
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("SPOTSERVE_", "OTEL_"))}
        environ |= {f"SPOTSERVE_ENGINE_{k.upper()}": str(v) for k, v in given.items()}
        self.instances[name] = Instance(name, self.directory / f"{name}.log", environ)
        return self.instances[name]

    def get(self, name: str) -> Instance:
        """The instance, started if it does not run."""
        instance = self.instances.get(name)
        return instance if instance is not None and instance.process.poll() is None else self.start(name)

    def close(self) -> None:
        for instance in self.instances.values():
            instance.end()
        self._nats.terminate()
        self._nats.wait(10)


class World:
    """The planner's and the gateway's side of one test."""

    def __init__(self, cluster: Cluster, client: Client) -> None:
        self.cluster = cluster
        self.client = client
        self.inventories: dict[str, InstanceInventory] = {}
        self.progress: list[RankProgress] = []
        self.states: dict[str, PipelineState] = {}
        self.tokens: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self._requests = itertools.count()

    async def start(self) -> None:
        await self._watch(PLANNER.all_inventory, InstanceInventory, self._keep_inventory)
        await self._watch(PLANNER.all_progress, RankProgress, self.progress.append)
        await self._watch(ENGINE.all_states, PipelineState, self._keep_state)
        await self._watch(ENGINE.all_tokens, TokenFrame, self._keep_tokens)
        stream: Any = self.client.jetstream()
        self.plans = await stream.create_key_value(bucket=PLANNER.plan_bucket, history=5)
        self.stored_inventories = await stream.create_key_value(bucket=PLANNER.inventory_bucket, ttl=10)

    async def _watch(self, subject: str, kind: type[M], keep: Callable[[M], None]) -> None:
        async def received(msg: Any) -> None:
            keep(msgspec.msgpack.decode(msg.data, type=kind))

        await self.client.subscribe(subject, cb=received)

    def _keep_inventory(self, inventory: InstanceInventory) -> None:
        self.inventories[inventory.instance] = inventory

    def _keep_state(self, state: PipelineState) -> None:
        self.states[state.pipeline] = state

    def _keep_tokens(self, frame: TokenFrame) -> None:
        for entry in frame.entries:
            log = self.tokens.setdefault(entry.request_id, [])
            assert entry.index == len(log)
            log += entry.ids
            if entry.finish is not None:
                self.finished.add(entry.request_id)

    async def until(self, condition: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            logs = "\n".join(f"--- {i.name}\n{i.log[-3000:]}" for i in self.cluster.instances.values())
            assert time.monotonic() < deadline_s, f"not in {timeout_s} s: {what}\n{logs}"
            await asyncio.sleep(0.02)

    async def instances(self, *names: str) -> list[Instance]:
        """Running instances with one rank each, that this test has heard of."""
        found = [self.cluster.get(name) for name in names]
        await self.until(lambda: all(self._has_joined(name) for name in names), f"{', '.join(names)} join")
        return found

    def _has_joined(self, name: str) -> bool:
        return name in self.inventories and len(self.inventories[name].ranks) == 1

    def address(self, instance: str) -> RankAddress:
        rank = self.inventories[instance].ranks[0]
        return RankAddress(instance=instance, context_address=rank.context_address, store_address=rank.store_address)

    def pipeline(self, *instances: str) -> Pipeline:
        """A pipeline of the only rank of each instance, a stage each."""
        num_layers, num_groups = self.model.num_layers, self.model.num_head_groups
        bounds = [i * num_layers // len(instances) for i in range(len(instances) + 1)]
        return Pipeline(
            id=f"p{next(self.cluster.pipeline_numbers)}",
            stages=[
                Stage(
                    first_layer=bounds[i],
                    last_layer=bounds[i + 1] - 1,
                    shards=[Shard(rank=f"{name}-0", instance=name, first_group=0, last_group=num_groups - 1)],
                )
                for i, name in enumerate(instances)
            ],
            max_batch=4,
            num_kv_blocks=256,
        )

    @property
    def model(self) -> ModelShape:
        return next(iter(self.inventories.values())).model

    async def plan(
        self,
        *pipelines: Pipeline,
        retiring: tuple[Pipeline, ...] = (),
        transfers: dict[str, list[Transfer]] | None = None,
        addresses: dict[str, RankAddress] | None = None,
    ) -> Plan:
        """Publish the next plan; addresses are those of the inventories unless given."""
        self.cluster.epoch += 1
        known = {f"{name}-0": self.address(name) for name in self.inventories if self._has_joined(name)}
        plan = Plan(
            epoch=self.cluster.epoch,
            model=self.model,
            pipelines=list(pipelines),
            retiring=[Retiring(pipeline=pipeline, reason="test") for pipeline in retiring],
            transfers=transfers or {},
            addresses={**known, **(addresses or {})},
            explanation=Explanation(
                cause="test", cause_at_s=0, decided_at_s=0, arrivals_per_s=0, num_ranks=0, chosen=None, alternatives=[]
            ),
            next_pipeline_number=1,
        )
        await self.plans.put("current", encode(plan))
        await self.client.publish(PLANNER.plan, encode(plan))
        return plan

    def has_said(self, rank: str, phase: Phase, pipeline: Pipeline) -> list[RankProgress]:
        return [p for p in self.progress if (p.rank, p.phase, p.pipeline) == (rank, phase, pipeline.id)]

    def is_serving(self, pipeline: Pipeline) -> bool:
        state = self.states.get(pipeline.id)
        return state is not None and state.ready and not state.draining

    async def serve(self, *instances: str, **options: Any) -> Pipeline:
        """Plan one pipeline over `instances` and wait until it serves."""
        pipeline = self.pipeline(*instances)
        await self.plan(pipeline, **options)
        await self.until(lambda: self.is_serving(pipeline), f"{pipeline.id} on {instances} serves")
        return pipeline

    async def submit(self, pipeline: Pipeline, max_tokens: int) -> str:
        name = f"{pipeline.id}-r{next(self._requests)}"
        request = GenerateRequest(
            request_id=name,
            gateway="g",
            prompt_ids=[5, 17, 40, 99],
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        )
        reply = await self.client.request(ENGINE.submit(pipeline.id), encode(request), timeout=TIMEOUT_S)
        assert msgspec.msgpack.decode(reply.data, type=SubmitReply).accepted
        return name

    async def generate(self, pipeline: Pipeline, max_tokens: int = 12) -> list[int]:
        name = await self.submit(pipeline, max_tokens)
        await self.until(lambda: name in self.finished, f"{name} ends")
        assert len(self.tokens[name]) == max_tokens
        return self.tokens[name]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("engine"))
    yield cluster
    cluster.close()


@pytest.fixture
async def world(cluster: Cluster) -> AsyncIterator[World]:
    client = await nats.connect(cluster.nats_url)
    world = World(cluster, client)
    await world.start()
    yield world
    await client.close()
