"""The supervisor's side of NATS: capacity events to the planner, commands from the command line."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from deploy.errors import CommandError, NatsUnreachableError
from deploy.protocol import (
    AddCommand,
    CancelNoticeCommand,
    CommandReply,
    KillCommand,
    PreemptCommand,
    supervisor_subject,
)
from planner.protocol import (
    DesiredCapacity,
    InstanceLost,
    InstanceRequested,
    InstanceStarting,
    NoticeCancelled,
    PlannerSubjects,
    PreemptionNotice,
)

PUBLISH_TIMEOUT_S = 2.0
RETRY_DELAY_S = 0.1
CONNECT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 2.0

Command = PreemptCommand | CancelNoticeCommand | KillCommand | AddCommand
CapacityEvent = InstanceRequested | InstanceStarting | PreemptionNotice | NoticeCancelled | InstanceLost
_decoder = msgspec.msgpack.Decoder(Command)
_encode = msgspec.msgpack.encode


async def connect(url: str, timeout_s: float = CONNECT_TIMEOUT_S) -> Client:
    """A connection that comes back by itself; raises NatsUnreachableError if there is no first one in time."""

    async def ignore(error: Exception) -> None:
        """nats-py logs each lost connection otherwise; the one who waits for a reply sees the time-out."""

    try:
        async with asyncio.timeout(timeout_s):
            return await nats.connect(
                url,
                name="spotserve",
                connect_timeout=2,
                reconnect_time_wait=0.2,
                max_reconnect_attempts=-1,
                error_cb=ignore,
            )
    except (TimeoutError, OSError, NatsError, ValueError) as error:
        raise NatsUnreachableError(url, str(error) or "no answer") from error


class FleetBus:
    """Publishes what happens to instances, in order and at least once, however long NATS is away."""

    def __init__(self, client: Client, model: str) -> None:
        self._client = client
        self._jetstream = client.jetstream(timeout=PUBLISH_TIMEOUT_S)
        self._subjects = PlannerSubjects(model)
        self._command_subject = supervisor_subject(model)
        self._outbox: asyncio.Queue[CapacityEvent] = asyncio.Queue()

    def post(self, event: CapacityEvent) -> None:
        """Send it as soon as NATS takes it."""
        self._outbox.put_nowait(event)

    async def publish(self, event: CapacityEvent) -> None:
        """Send it now; raises CommandError if NATS does not take it in time."""
        try:
            await self._publish(event, uuid.uuid4().hex)
        except (NatsError, TimeoutError) as error:
            raise CommandError(f"NATS did not take the {type(event).__name__}: is it away?") from error

    async def send_outbox(self) -> None:
        """Runs until cancelled."""
        while True:
            await self._publish_at_last(await self._outbox.get())

    async def _publish_at_last(self, event: CapacityEvent) -> None:
        message_id = uuid.uuid4().hex
        while True:
            try:
                return await self._publish(event, message_id)
            except (NatsError, TimeoutError):
                await asyncio.sleep(RETRY_DELAY_S)

    async def _publish(self, event: CapacityEvent, message_id: str) -> None:
        # With the id, JetStream drops the repeat of a message whose acknowledgement was lost.
        await self._jetstream.publish(
            self._subjects.capacity(event.instance), _encode(event), headers={"Nats-Msg-Id": message_id}
        )

    async def serve_commands(self, handle: Callable[[Command], Awaitable[CommandReply]]) -> None:
        """Answer each command with what `handle` returns; a malformed one with a refusal."""

        async def on_message(message: Msg) -> None:
            try:
                reply = await handle(_decoder.decode(message.data))
            except msgspec.DecodeError as error:
                reply = CommandReply(ok=False, message=f"malformed command: {error}")
            if message.reply:
                await message.respond(_encode(reply))

        await self._client.subscribe(self._command_subject, cb=on_message)

    async def follow_desired(self, follow: Callable[[DesiredCapacity], Awaitable[None]]) -> None:
        """Call `follow` with each desired capacity of the planner that is announced from now on."""
        decoder = msgspec.msgpack.Decoder(DesiredCapacity)

        async def on_message(message: Msg) -> None:
            with contextlib.suppress(msgspec.DecodeError):
                await follow(decoder.decode(message.data))

        await self._client.subscribe(self._subjects.desired, cb=on_message)

    async def close(self) -> None:
        """Leave, whether NATS is there or not."""
        with contextlib.suppress(NatsError, TimeoutError, OSError):
            await asyncio.wait_for(self._client.close(), CLOSE_TIMEOUT_S)
