"""NATS and JetStream: bytes <-> planner.protocol. Survives restarts of the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    KeyValueConfig,
    StorageType,
    StreamConfig,
)
from nats.js.errors import BadRequestError, KeyNotFoundError, NoKeysError, NotFoundError
from nats.js.kv import KeyValue

from planner.errors import MessageTooLargeError
from planner.protocol import (
    Arrange,
    DesiredCapacity,
    Explanation,
    InstanceInventory,
    InstanceLost,
    InstanceRequested,
    InstanceStarting,
    LoadReport,
    NoticeCancelled,
    Plan,
    PlannerSubjects,
    PreemptionNotice,
    RankProgress,
    Status,
    packed,
    unpacked,
)
from planner.telemetry import line

log = logging.getLogger("planner.bus")

PLAN_KEY: Final = "current"
ADVICE_KEY: Final = "advice"
DESIRED_KEY: Final = "desired"
DURABLE: Final = "planner"
RETRY_S: Final = 0.2
REQUEST_TIMEOUT_S: Final = 2.0
CLOSE_TIMEOUT_S: Final = 3.0
INVENTORY_TTL_S: Final = 10.0
TOKEN_LOG_BYTES: Final = 64 * 1024 * 1024
HOUR_S: Final = 3600.0
HEADER_BYTES: Final = 1024
"""More than the trace context takes: headers count against the server's limit."""
STALE_LAUNCH_S: Final = 600.0
"""An older launch in the stream is of an instance that never came."""

CapacityMessage = InstanceRequested | InstanceStarting | PreemptionNotice | NoticeCancelled | InstanceLost
Incoming = CapacityMessage | InstanceInventory | LoadReport | RankProgress
T = TypeVar("T")

_encode = msgspec.msgpack.Encoder().encode
_plan_decoder = msgspec.msgpack.Decoder(Plan)
_inventory_decoder = msgspec.msgpack.Decoder(InstanceInventory)
_capacity_decoder = msgspec.msgpack.Decoder(CapacityMessage)


class Bus:
    """Hands every well-formed message to `on_message`; logs and drops the others."""

    def __init__(self, url: str, model: str, on_message: Callable[[Incoming], None]) -> None:
        self._url = url
        self._model = model
        self._subjects = PlannerSubjects(model)
        self._on_message = on_message
        self._nc = Client()
        self._js: JetStreamContext
        self._plans: KeyValue
        self._inventories: KeyValue
        self._fleet: KeyValue
        self._capacity: JetStreamContext.PullSubscription
        self._reconnected = asyncio.Event()
        self._last_error = ""

    # --- Set up ---

    async def connect(self) -> None:
        """Waits until there is a server; makes the streams and buckets that are not there yet."""
        while not self._nc.is_connected:
            try:
                self._nc = await nats.connect(
                    self._url,
                    name="spotserve-planner",
                    allow_reconnect=True,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=RETRY_S,
                    connect_timeout=2,
                    ping_interval=5,
                    max_outstanding_pings=2,
                    error_cb=self._log_error,
                    disconnected_cb=_log_disconnect,
                    reconnected_cb=self._on_reconnect,
                )
            except (OSError, TimeoutError, NatsError) as error:
                log.warning(line("no NATS server, trying again", url=self._url, error=repr(error)))
                await asyncio.sleep(RETRY_S)
        self._js = self._nc.jetstream(timeout=REQUEST_TIMEOUT_S)
        await _persist("set up streams", self._set_up_streams)
        await _persist("set up capacity consumer", self._renew_consumer)

    async def _set_up_streams(self) -> None:
        subjects = self._subjects
        await self._add_stream(
            StreamConfig(
                name=subjects.capacity_stream,
                subjects=[subjects.all_capacity],
                storage=StorageType.FILE,
                max_age=24 * HOUR_S,
            )
        )
        await self._add_stream(
            StreamConfig(
                name=f"spotserve-{self._model}-tokens",
                subjects=[f"{subjects.prefix}.tokens.>"],
                storage=StorageType.MEMORY,
                max_bytes=TOKEN_LOG_BYTES,
                max_age=HOUR_S,
                discard=DiscardPolicy.OLD,
            )
        )
        self._plans = await self._bucket(
            KeyValueConfig(bucket=subjects.plan_bucket, history=16, storage=StorageType.FILE)
        )
        self._inventories = await self._bucket(
            KeyValueConfig(bucket=subjects.inventory_bucket, ttl=INVENTORY_TTL_S, storage=StorageType.FILE)
        )
        self._fleet = await self._bucket(KeyValueConfig(bucket=subjects.fleet_bucket, storage=StorageType.FILE))

    async def _add_stream(self, config: StreamConfig) -> None:
        try:
            await self._js.add_stream(config)
        except BadRequestError as error:  # it exists with other limits: those of the operator stand
            log.info(line("stream exists with another configuration", stream=config.name, error=error.description))

    async def _bucket(self, config: KeyValueConfig) -> KeyValue:
        try:
            return await self._js.create_key_value(config)
        except BadRequestError as error:
            log.info(line("bucket exists with another configuration", bucket=config.bucket, error=error.description))
            return await self._js.key_value(config.bucket)

    async def _renew_consumer(self) -> None:
        """A new consumer begins with the last message of every instance: notices of before and of meanwhile."""
        with contextlib.suppress(NotFoundError):
            await self._js.delete_consumer(self._subjects.capacity_stream, DURABLE)
        self._capacity = await self._js.pull_subscribe(
            self._subjects.all_capacity,
            durable=DURABLE,
            stream=self._subjects.capacity_stream,
            config=ConsumerConfig(
                deliver_policy=DeliverPolicy.LAST_PER_SUBJECT,
                ack_policy=AckPolicy.EXPLICIT,
                ack_wait=5,
            ),
        )

    # --- State of before ---

    async def load_plans(self) -> list[Plan]:
        """Newest first; empty if there has been no planner before."""
        try:
            entries = await _persist("load plans", lambda: self._plans.history(PLAN_KEY), missing=(NoKeysError,))
        except NoKeysError:
            return []
        plans = [_decode(self._subjects.plan_bucket, entry.value or b"", _plan_decoder) for entry in entries]
        # A plan that was put again after an outage is there twice.
        by_epoch = {plan.epoch: plan for plan in plans if plan is not None}
        return [by_epoch[epoch] for epoch in sorted(by_epoch, reverse=True)]

    async def load_capacity(self) -> list[CapacityMessage]:
        """The last capacity message of every instance."""
        info = await _persist("read capacity", self._capacity.consumer_info)
        num_waiting = info.num_pending or 0
        loaded: list[CapacityMessage] = []
        while num_waiting > 0:
            messages = await self._fetch_capacity(min(num_waiting, 256))
            num_waiting -= len(messages) or num_waiting
            loaded += await self._decode_capacity(messages)
        return loaded

    async def load_inventories(self) -> list[InstanceInventory]:
        """Those that have not expired."""
        try:
            keys = await _persist("list inventories", self._inventories.keys, missing=(NoKeysError,))
        except NoKeysError:
            return []
        loaded = []
        for key in keys:
            # It may have expired since; if it has not, it comes again within 2 s.
            with contextlib.suppress(KeyNotFoundError, TimeoutError):
                entry = await self._inventories.get(key)
                name = f"{self._subjects.inventory_bucket}/{key}"
                inventory = _decode(name, entry.value or b"", _inventory_decoder)
                loaded += [inventory] if inventory is not None else []
        return loaded

    # --- Receive ---

    async def subscribe(self, status: Callable[[], Status]) -> None:
        """Deliver inventories, load and progress from now on, and answer requests for the status."""
        for subject, decoder in (
            (self._subjects.all_inventory, _inventory_decoder),
            (self._subjects.all_load, msgspec.msgpack.Decoder(LoadReport)),
            (self._subjects.all_progress, msgspec.msgpack.Decoder(RankProgress)),
        ):
            await self._nc.subscribe(subject, cb=self._receiver(decoder))

        async def answer(message: Msg) -> None:
            if message.reply:
                await self._nc.publish(message.reply, packed(_encode(status())))

        await self._nc.subscribe(self._subjects.status, cb=answer)

    async def run(self, on_reconnect: Callable[[], None]) -> None:
        """Follow the capacity stream; after a reconnection, put back what the server may have lost."""
        while True:
            if self._reconnected.is_set():
                self._reconnected.clear()
                await _persist("set up streams", self._set_up_streams)
                await _persist("set up capacity consumer", self._ensure_consumer)
                on_reconnect()
            try:
                for message in await self._decode_capacity(await self._fetch_capacity(64)):
                    self._on_message(message)
            except (NatsError, OSError) as error:
                log.warning(line("capacity stream unavailable, trying again", error=repr(error)))
                if self._nc.is_connected:
                    self._reconnected.set()
                await asyncio.sleep(RETRY_S)

    async def _ensure_consumer(self) -> None:
        try:
            await self._js.consumer_info(self._subjects.capacity_stream, DURABLE)
        except NotFoundError:
            await self._renew_consumer()

    async def _fetch_capacity(self, batch: int) -> list[Msg]:
        try:
            return await self._capacity.fetch(batch, timeout=1.0)
        except TimeoutError:
            return []

    async def _decode_capacity(self, messages: list[Msg]) -> list[CapacityMessage]:
        decoded = []
        for message in messages:
            capacity = _decode(message.subject, message.data, _capacity_decoder)
            age_s = time.time() - message.metadata.timestamp.timestamp()
            is_stale = isinstance(capacity, InstanceRequested | InstanceStarting) and age_s > STALE_LAUNCH_S
            decoded += [capacity] if capacity is not None and not is_stale else []
            await message.ack()
        return decoded

    def _receiver(self, decoder: msgspec.msgpack.Decoder[Any]) -> Callable[[Msg], Awaitable[None]]:
        async def receive(message: Msg) -> None:
            decoded = _decode(message.subject, message.data, decoder)
            if decoded is not None:
                self._on_message(decoded)

        return receive

    # --- Send ---

    async def publish_plan(self, plan: Plan, headers: dict[str, str]) -> None:
        """Keep it, then announce it.

        Raises MessageTooLargeError if the server takes no message of this size, and NatsError, TimeoutError or OSError
        while it is away.
        """
        payload = packed(_encode(plan))
        if self._nc.is_connected and len(payload) + HEADER_BYTES > self._nc.max_payload:
            raise MessageTooLargeError(f"plan of epoch {plan.epoch}", len(payload) + HEADER_BYTES, self._nc.max_payload)
        await self._plans.put(PLAN_KEY, payload)
        await self._nc.publish(self._subjects.plan, payload, headers=headers or None)

    async def publish_arrange(self, arrange: Arrange) -> None:
        await self._nc.publish(self._subjects.arrange, _encode(arrange))

    async def publish_advice(self, explanation: Explanation) -> None:
        """Keep it; nobody acts on it."""
        await self._plans.put(ADVICE_KEY, _encode(explanation))

    async def publish_desired(self, desired: DesiredCapacity) -> None:
        """Keep it, then announce it."""
        payload = _encode(desired)
        await self._fleet.put(DESIRED_KEY, payload)
        await self._nc.publish(self._subjects.desired, payload)

    async def close(self) -> None:
        """Also while the server is away."""
        with contextlib.suppress(NatsError, OSError, TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                if self._nc.is_connected:
                    await self._nc.flush(timeout=1)
                if self._nc.is_connected or self._nc.is_reconnecting:
                    await self._nc.close()

    async def _log_error(self, error: Exception) -> None:
        if repr(error) != self._last_error:  # the same one comes at every attempt to connect
            self._last_error = repr(error)
            log.warning(line("NATS error", url=self._url, error=self._last_error))

    async def _on_reconnect(self) -> None:
        self._last_error = ""
        log.info(line("NATS reconnected", url=self._url))
        self._reconnected.set()


def _decode(source: str, payload: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    """None, and a line in the log, if the message is malformed."""
    try:
        return decoder.decode(unpacked(payload))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        log.warning(line("dropped", subject=source, reason=error, num_bytes=len(payload)))
        return None


async def _persist(
    what: str, work: Callable[[], Coroutine[Any, Any, T]], missing: tuple[type[Exception], ...] = ()
) -> T:
    """Try until it works: JetStream may answer later than the server. `missing` are answers, not failures."""
    while True:
        try:
            return await work()
        except missing:
            raise
        except (NatsError, OSError, TimeoutError) as error:
            log.warning(line("trying again", what=what, error=repr(error)))
            await asyncio.sleep(RETRY_S)


async def _log_disconnect() -> None:
    log.warning(line("NATS connection lost"))
