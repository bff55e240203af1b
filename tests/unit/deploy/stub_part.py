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
    InstanceLost,
    InstanceStarting,
    InstanceState,
    InstanceStatus,
    PlannerSubjects,
    PreemptionNotice,
    Status,
)

RANK = "import time; time.sleep(1000)"


async def planner() -> None:
    subjects = PlannerSubjects(os.environ["SPOTSERVE_PLANNER_MODEL"])
    client = await nats.connect(os.environ["SPOTSERVE_PLANNER_NATS_URL"], max_reconnect_attempts=-1)
    await client.jetstream().add_stream(name=subjects.capacity_stream, subjects=[subjects.all_capacity])
    instances: dict[str, InstanceStatus] = {}
    decoder = msgspec.msgpack.Decoder(InstanceStarting | PreemptionNotice | InstanceLost)

    def change(instance, **fields):
        instances[instance] = msgspec.structs.replace(instances[instance], **fields)

    async def on_capacity(message):
        event: InstanceStarting | PreemptionNotice | InstanceLost = decoder.decode(message.data)
        if isinstance(event, InstanceStarting):
            ranks = [f"{event.instance}-{number}" for number in range(event.num_ranks)]
            instances[event.instance] = InstanceStatus(
                id=event.instance, market=event.market, state=InstanceState.STARTING, deadline_s=None, ranks=ranks
            )
        elif isinstance(event, PreemptionNotice):
            change(event.instance, state=InstanceState.GRACE, deadline_s=event.deadline_s)
        else:
            change(event.instance, state=InstanceState.LOST)
        print(type(event).__name__, event, flush=True)

    async def on_status(message):
        await message.respond(msgspec.msgpack.encode(Status(epoch=1, instances=list(instances.values()), plan=None)))

    await client.jetstream().subscribe(subjects.all_capacity, cb=on_capacity)
    await client.subscribe(subjects.status, cb=on_status)
    print("planner ready", flush=True)
    await asyncio.Event().wait()


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

    server = await asyncio.start_server(answer, host, port)
    print("gateway ready", flush=True)
    await server.serve_forever()


async def engine() -> None:
    if "STUB_ENGINE_FAILS" in os.environ:
        sys.exit("cannot load the model: no such tensor")
    # A rank that survives its agent unless the whole group is killed.
    rank = await asyncio.create_subprocess_exec(sys.executable, "-c", RANK)
    print(f"agent ready, rank {rank.pid}", flush=True)
    stop = asyncio.Event()
    on_sigterm = (lambda: None) if "STUB_ENGINE_STAYS" in os.environ else stop.set
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, on_sigterm)
    await stop.wait()


asyncio.run({"planner": planner, "gateway": gateway, "engine": engine}[sys.argv[1]]())
