"""NATS of an engine process: connect and stay connected, publish in order, answer requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import msgspec
import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from engine.protocol import EngineSubjects
from planner.protocol import Message, Plan, PlannerSubjects, unpacked

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
_CONNECT_RETRY_S: Final = 0.3
_PENDING_BYTES: Final = 16 << 20
_encoder = msgspec.msgpack.Encoder()
_plan_decoder = msgspec.msgpack.Decoder(Plan)

# What a publish or a request may fail with while the connection is away.
_AWAY: Final = (nats.errors.Error, OSError, asyncio.TimeoutError)


class Bus:
    """While NATS is away messages are kept, up to a limit, and sent late; beyond it, and in a breaking connection, they
    are lost. So whoever needs an answer asks again, and whoever tells a state tells it again.
    """

    def __init__(self, model: str) -> None:
        self.planner = PlannerSubjects(model)
        self.engine = EngineSubjects(model)
        self._client = Client()
        self._on_reconnect: list[Callable[[], Awaitable[None]]] = []
        self._handling: set[asyncio.Task[None]] = set()

    async def connect(self, url: str, name: str) -> None:
        """Connect, waiting for the server for as long as it takes."""

        async def reconnected() -> None:
            logger.info("event=nats_reconnected")
            for callback in self._on_reconnect:
                await callback()

        async def disconnected() -> None:
            logger.warning("event=nats_disconnected")

        async def failed(error: Exception) -> None:
            logger.debug("event=nats_error cause=%s", error)

        options: dict[str, Any] = {
            "max_reconnect_attempts": -1,
            "reconnect_time_wait": 0.2,
            "ping_interval": 5,
            "max_outstanding_pings": 2,
            "pending_size": _PENDING_BYTES,
            "reconnected_cb": reconnected,
            "disconnected_cb": disconnected,
            "error_cb": failed,
        }
        while True:
            try:
                await self._client.connect(url, name=name, **options)
            except _AWAY as error:
                logger.info("event=nats_unreachable url=%s cause=%s", url, error)
                await asyncio.sleep(_CONNECT_RETRY_S)
            else:
                return

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        self._on_reconnect.append(callback)

    async def close(self) -> None:
        with contextlib.suppress(*_AWAY):
            async with asyncio.timeout(2):
                await self._client.flush()
        with contextlib.suppress(*_AWAY):
            await self._client.close()

    async def publish(self, subject: str, message: Message) -> None:
        try:
            await self._client.publish(subject, _encoder.encode(message))
        except _AWAY as error:
            logger.debug("event=not_published subject=%s cause=%s", subject, error)

    async def request(self, subject: str, message: Message, reply_type: type[M], timeout_s: float) -> M | None:
        """Ask and wait; None if nobody answers in time or the answer cannot be read."""
        try:
            reply = await self._client.request(subject, _encoder.encode(message), timeout=timeout_s)
            return msgspec.msgpack.decode(reply.data, type=reply_type)
        except (*_AWAY, msgspec.MsgspecError) as error:
            logger.warning("event=no_reply subject=%s cause=%r", subject, error)
            return None

    async def subscribe(
        self,
        subject: str,
        message_type: type[M],
        handle: Callable[[M, dict[str, str]], Awaitable[Message | None]],
        *,
        concurrently: bool = False,
    ) -> Subscription:
        """Call `handle` with each message and its headers, in order; what it returns is the reply.

        `concurrently`: begin with the next message, still in order, before this one's reply is there.
        A message that cannot be decoded is logged with its subject and dropped.
        """
        decoder = msgspec.msgpack.Decoder(message_type)

        async def received(msg: Msg) -> None:
            try:
                message = decoder.decode(unpacked(msg.data))
            except msgspec.MsgspecError as error:
                logger.warning("event=malformed_message subject=%s cause=%s", msg.subject, error)
                return
            if not concurrently:
                await answer(msg, message)
                return
            task = asyncio.create_task(answer(msg, message))
            self._handling.add(task)
            task.add_done_callback(self._handling.discard)

        async def answer(msg: Msg, message: M) -> None:
            try:
                reply = await handle(message, msg.headers or {})
            except Exception:
                logger.exception("event=handler_failed subject=%s", msg.subject)
                return
            if reply is not None and msg.reply:
                await self.publish(msg.reply, reply)

        return await self._client.subscribe(subject, cb=received)

    async def unsubscribe(self, subscription: Subscription) -> None:
        with contextlib.suppress(*_AWAY):
            await subscription.unsubscribe()

    async def current_plan(self) -> Plan | None:
        """The plan in JetStream KV; None if there is none, or NATS is away."""
        stream: Any = self._client.jetstream(timeout=1)
        try:
            bucket = await stream.key_value(self.planner.plan_bucket)
            entry = await bucket.get("current")
            return _plan_decoder.decode(unpacked(entry.value))
        except (*_AWAY, nats.js.errors.Error):
            return None
        except msgspec.MsgspecError as error:
            logger.warning("event=malformed_message subject=%s/current cause=%s", self.planner.plan_bucket, error)
            return None

    async def put_inventory(self, instance: str, message: Message) -> None:
        """Into the JetStream KV from which a restarted planner learns its fleet."""
        stream: Any = self._client.jetstream(timeout=1)
        try:
            bucket = await stream.key_value(self.planner.inventory_bucket)
            await bucket.put(instance, _encoder.encode(message))
        except (*_AWAY, nats.js.errors.Error) as error:
            logger.debug("event=inventory_not_stored cause=%s", error)
