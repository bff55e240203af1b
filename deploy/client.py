"""What the commands ask of a running `up`: the planner's status, the supervisor's obedience, the gateway's counts."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TypeVar

import httpx
import msgspec
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError

from deploy.bus import Command, connect
from deploy.errors import CommandError
from deploy.protocol import CommandReply, supervisor_subject
from deploy.state import Running
from planner.protocol import Message, PlannerSubjects, Status, StatusRequest, unpacked

REPLY_TIMEOUT_S = 5.0
RETRY_DELAY_S = 0.2
CONNECT_TIMEOUT_S = 3.0

Reply = TypeVar("Reply", bound=Message)


class RequestCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Requests at the gateway; `pipelines` has the running ones of each."""

    running: int
    waiting: int
    pipelines: dict[str, int] = {}


async def send_command(running: Running, command: Command) -> str:
    """The supervisor's answer; raises CommandError where it refuses or does not answer."""
    reply = await _request(running, supervisor_subject(running.model), command, CommandReply, "the supervisor")
    if not reply.ok:
        raise CommandError(reply.message)
    return reply.message


async def fetch_status(running: Running) -> Status:
    """Raises CommandError while the planner is away."""
    subject = PlannerSubjects(running.model).status
    return await _request(running, subject, StatusRequest(), Status, "the planner")


async def fetch_requests(running: Running) -> RequestCounts:
    """Raises CommandError while the gateway is away."""
    counts = []
    for endpoint in running.admin_endpoints:
        try:
            async with httpx.AsyncClient(base_url=endpoint, timeout=REPLY_TIMEOUT_S, trust_env=False) as client:
                response = await client.get("/internal/requests")
                response.raise_for_status()
                counts.append(msgspec.json.decode(response.content, type=RequestCounts))
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            raise CommandError(f"the gateway at {endpoint} does not answer: {error}") from error
    pipelines = Counter[str]()
    for one in counts:
        pipelines.update(one.pipelines)
    return RequestCounts(
        running=sum(one.running for one in counts),
        waiting=sum(one.waiting for one in counts),
        pipelines=dict(pipelines),
    )


async def _ask(client: Client, subject: str, payload: bytes) -> bytes:
    """Ask again for a while where nobody listens: after a restart of NATS or of a part it is there in a moment."""
    give_up_s = time.monotonic() + REPLY_TIMEOUT_S
    while True:
        try:
            return (await client.request(subject, payload, timeout=REPLY_TIMEOUT_S)).data
        except NoRespondersError:
            if time.monotonic() > give_up_s:
                raise
            await asyncio.sleep(RETRY_DELAY_S)


async def _request(running: Running, subject: str, message: Message, reply: type[Reply], who: str) -> Reply:
    client = await connect(running.nats_url, CONNECT_TIMEOUT_S)
    try:
        answer = await _ask(client, subject, msgspec.msgpack.encode(message))
        return msgspec.msgpack.decode(unpacked(answer), type=reply)
    except (NoRespondersError, TimeoutError) as error:
        raise CommandError(f"{who} does not answer: it may be starting; try again, or look at its log") from error
    except (NatsError, msgspec.DecodeError) as error:
        raise CommandError(f"{who} gave no usable answer: {error}") from error
    finally:
        await client.close()
