"""Stands in for planner, gateway and engine: the same environment, readiness lines, subjects and routes, no model.

python stub_part.py planner | gateway | engine
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

import msgspec
import nats

from planner.protocol import (
    DesiredCapacity,
    InstanceLost,
    InstanceRequested,
    InstanceStarting,
    InstanceState,
    InstanceStatus,
    NoticeCancelled,
    PlannerSubjects,
    PreemptionNotice,
    Status,
)

Capacity = InstanceRequested | InstanceStarting | PreemptionNotice | NoticeCancelled | InstanceLost
RANK = "import time; time.sleep(1000)"


async def planner() -> None:
    subjects = PlannerSubjects(os.environ["SPOTSERVE_PLANNER_MODEL"])
    client = await nats.connect(os.environ["SPOTSERVE_PLANNER_NATS_URL"], max_reconnect_attempts=-1)
    await client.jetstream().add_stream(name=subjects.capacity_stream, subjects=[subjects.all_capacity])
    instances: dict[str, InstanceStatus] = {}
    decoder = msgspec.msgpack.Decoder(Capacity)

    def change(instance, **fields):
        instances[instance] = msgspec.structs.replace(instances[instance], **fields)

    async def on_capacity(message):
        event: Capacity = decoder.decode(message.data)
        if isinstance(event, InstanceRequested | InstanceStarting):
            ranks = [f"{event.instance}-{number}" for number in range(event.num_ranks)]
            is_asked = isinstance(event, InstanceRequested)
            state = InstanceState.REQUESTED if is_asked else InstanceState.STARTING
            instances[event.instance] = InstanceStatus(
                id=event.instance, market=event.market, state=state, deadline_s=None, ranks=ranks
            )
        elif isinstance(event, NoticeCancelled):
            change(event.instance, state=InstanceState.READY, deadline_s=None)
        elif isinstance(event, PreemptionNotice):
            change(event.instance, state=InstanceState.GRACE, deadline_s=event.deadline_s)
        else:
            change(event.instance, state=InstanceState.LOST)
        print(type(event).__name__, event, flush=True)

    async def on_status(message):
        await message.respond(msgspec.msgpack.encode(Status(epoch=1, instances=list(instances.values()), plan=None)))

    await client.jetstream().subscribe(subjects.all_capacity, cb=on_capacity)
    await client.subscribe(subjects.status, cb=on_status)
    if "SPOTSERVE_PLANNER_MAX_SPOT" in os.environ:
        wanted = [DesiredCapacity(**fields) for fields in json.loads(os.environ.get("STUB_DESIRED", "[]"))]
        limits = sorted(f"{k}={v}" for k, v in os.environ.items() if "_MIN_" in k or "_MAX_S" in k or "_MAX_O" in k)
        print("limits", *limits, flush=True)
        asyncio.get_running_loop().create_task(want(client, subjects, wanted, instances))
    print("planner ready", flush=True)
    await asyncio.Event().wait()


async def want(client, subjects, wanted, instances):
    """Each wish as soon as the one before it has been met."""
    for desired in wanted:
        alive = [InstanceState.REQUESTED]
        while not alive or InstanceState.REQUESTED in alive:
            await asyncio.sleep(0.05)
            alive = [i.state for i in instances.values() if i.state is not InstanceState.LOST]
        await client.publish(subjects.desired, msgspec.msgpack.encode(desired))
        while sum(i.state is InstanceState.STARTING for i in instances.values()) != desired.spot + desired.on_demand:
            await asyncio.sleep(0.05)
        print("met", desired.spot, desired.on_demand, flush=True)


async def gateway() -> None:
    fails = "STUB_ENGINE_FAILS" in os.environ
    host, port = os.environ["SPOTSERVE_GATEWAY_HOST"], int(os.environ["SPOTSERVE_GATEWAY_PORT"])
    bodies = {
        "/ready": ("application/json", b"{}"),
        "/internal/requests": ("application/json", b'{"running": 2, "waiting": 1, "pipelines": {"p0": 2}}'),
        "/v1/chat/completions": (
            "text/event-stream",
            b"".join(
                b"data: " + json.dumps({"choices": [{"delta": {"content": piece}}]}).encode() + b"\n\n"
                for piece in ("Once ", "upon")
            )
            + b"data: [DONE]\n\n",
        ),
    }

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        kind, body = bodies[head.split()[1].decode()]
        status = "503 No pipeline" if fails and b"/ready" in head else "200 OK"
        fields = f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close"
        writer.write(f"HTTP/1.1 {status}\r\n{fields}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    shared = "SPOTSERVE_GATEWAY_REUSE_PORT" in os.environ
    server = await asyncio.start_server(answer, host, port, reuse_port=shared)
    admin = await asyncio.start_server(answer, "127.0.0.1", int(os.environ["SPOTSERVE_GATEWAY_ADMIN_PORT"]))
    print("gateway ready", flush=True)
    await asyncio.gather(server.serve_forever(), admin.serve_forever())


async def engine() -> None:
    if "STUB_ENGINE_FAILS" in os.environ:
        sys.exit("cannot load the model: no such tensor")
    stop = asyncio.Event()
    on_sigterm = (lambda: None) if "STUB_ENGINE_STAYS" in os.environ else stop.set
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, on_sigterm)
    # A rank that survives its agent unless the whole group is killed.
    rank = await asyncio.create_subprocess_exec(sys.executable, "-c", RANK)
    print(f"agent ready, rank {rank.pid}", flush=True)
    await stop.wait()


asyncio.run({"planner": planner, "gateway": gateway, "engine": engine}[sys.argv[1]]())
