"""The gateway's side of NATS: what it hears, what it asks. Reconnects for ever."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, TypeVar

import msgspec
import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from engine.protocol import (
    CancelRequest,
    EngineSubjects,
    GenerateRequest,
    PipelineState,
    ReleaseKv,
    ResendReply,
    ResendRequest,
    SubmitReply,
    TokenFrame,
)
from gateway.protocol import KeyUsage
from planner.protocol import LoadReport, Plan, PlannerSubjects, unpacked

_log = logging.getLogger(__name__)

_SUBMIT_TIMEOUT_S = 5.0
"""A leader answers between two steps, and a long prefill on a busy CPU takes a second. A dead one the plan tells of."""
_RESEND_TIMEOUT_S = 0.5
_PLAN_POLL_S = 2.0
_MIN_PLAN_POLL_S = 0.2
_CLOSE_TIMEOUT_S = 2.0
_RECONNECT_WAIT_S = 0.2

_M = TypeVar("_M", SubmitReply, ResendReply)
_T = TypeVar("_T", TokenFrame, PipelineState, Plan, KeyUsage)


class Listener(Protocol):
    """Who is told; all calls come from the event loop."""

    async def on_frame(self, frame: TokenFrame) -> None: ...

    def on_state(self, state: PipelineState) -> None: ...

    def on_plan(self, plan: Plan) -> None: ...

    def on_connected(self) -> None: ...

    def on_key_usage(self, usage: KeyUsage) -> None: ...


class Bus:
    """One NATS connection. `start` returns at once; `connected` tells whether the server is there."""

    def __init__(self, url: str, model: str, gateway_id: str) -> None:
        self._url = url
        self._gateway_id = gateway_id
        self._engine = EngineSubjects(model)
        self._planner = PlannerSubjects(model)
        self.on_response_cancelled: Callable[[str], None] = lambda _: None
        """Told the id of a background response that somebody has cancelled."""
        self._cancelled_responses = f"{self._planner.prefix}.responses.cancel"
        self._key_usage = f"{self._planner.prefix}.key_usage"
        self._client = Client()
        self._encoder = msgspec.msgpack.Encoder()
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_error = ""
        self._closing = False
        self._plan_wanted = asyncio.Event()

    @property
    def connected(self) -> bool:
        return self._client.is_connected

    def start(self, listener: Listener) -> None:
        """Connect in the background, and keep trying."""
        self._spawn(self._run(listener))

    def want_plan(self) -> None:
        """Somebody acts on a newer plan than the one that was announced here: read it soon."""
        self._plan_wanted.set()

    async def close(self) -> None:
        """Send what is buffered, then disconnect."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.connected:
            with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError):
                await asyncio.wait_for(self._client.drain(), _CLOSE_TIMEOUT_S)
        elif not self._client.is_closed:
            await self._client.close()

    async def submit(self, pipeline: str, request: GenerateRequest, headers: Mapping[str, str]) -> SubmitReply | None:
        """The pipeline's answer; None if there is none in time."""
        payload = self._encoder.encode(request)
        subject = self._engine.submit(pipeline)
        return await self._request(subject, payload, _SUBMIT_TIMEOUT_S, SubmitReply, headers)

    async def resend(self, pipeline: str, request: ResendRequest) -> ResendReply | None:
        """The entry that was asked for; None if there is no answer in time."""
        payload = self._encoder.encode(request)
        return await self._request(self._engine.resend(pipeline), payload, _RESEND_TIMEOUT_S, ResendReply)

    async def cancel(self, pipeline: str, request_id: str, attempt: int) -> None:
        """End `attempt` of the request, and older ones, if they run there."""
        await self._publish(self._engine.cancel(pipeline), CancelRequest(request_id=request_id, attempt=attempt))

    async def cancel_response(self, response_id: str) -> None:
        """Tell all gateways of the model that this background response is not wanted any more."""
        if self.connected:
            await self._client.publish(self._cancelled_responses, response_id.encode())

    def jetstream(self) -> JetStreamContext:
        """For what is kept beside the log."""
        return self._client.jetstream(timeout=2.0)

    async def release(self, rank: str, message: ReleaseKv) -> None:
        await self._publish(self._engine.release(rank), message)

    async def report_load(self, report: LoadReport) -> None:
        await self._publish(self._planner.load(self._gateway_id), report)

    async def share_key_usage(self, usage: KeyUsage) -> None:
        """Tell all gateways of the model, this one too."""
        await self._publish(self._key_usage, usage)

    async def _publish(self, subject: str, message: msgspec.Struct) -> None:
        # While the server is away the client would keep it and send it late, when it means something else.
        if not self.connected:
            return
        try:
            await self._client.publish(subject, self._encoder.encode(message))
        except nats.errors.Error as error:
            _log.warning("cannot publish on %s: %s", subject, error)

    async def _request(
        self,
        subject: str,
        payload: bytes,
        timeout_s: float,
        type_: type[_M],
        headers: Mapping[str, str] | None = None,
    ) -> _M | None:
        if not self.connected:
            return None
        try:
            reply = await self._client.request(
                subject, payload, timeout=timeout_s, headers=dict(headers) if headers else None
            )
            return msgspec.msgpack.decode(reply.data, type=type_)
        except (TimeoutError, nats.errors.Error, OSError):
            return None
        except msgspec.MsgspecError as error:
            _log.warning("malformed reply from %s: %s", subject, error)
            return None

    async def _run(self, listener: Listener) -> None:
        async def reconnected() -> None:
            _log.warning("NATS is back at %s", self._url)
            listener.on_connected()
            await self._read_plan(listener)

        async def disconnected() -> None:
            if not self._closing:
                _log.warning("NATS connection to %s lost", self._url)

        async def on_error(error: Exception) -> None:
            text = str(error) or type(error).__name__
            if text != self._last_error:
                _log.warning("NATS at %s: %s", self._url, text)
            self._last_error = text

        while not self.connected:
            try:
                await self._client.connect(
                    self._url,
                    name=f"gateway-{self._gateway_id}",
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=_RECONNECT_WAIT_S,  # type: ignore[arg-type] # only used as a sleep
                    ping_interval=5,
                    connect_timeout=1,
                    reconnected_cb=reconnected,
                    disconnected_cb=disconnected,
                    error_cb=on_error,
                )
            except (TimeoutError, nats.errors.Error, OSError) as error:
                await on_error(error)
                await asyncio.sleep(_RECONNECT_WAIT_S)
        await self._subscribe(self._engine.all_tokens_of(self._gateway_id), TokenFrame, listener.on_frame)
        await self._subscribe(self._engine.all_states, PipelineState, listener.on_state)
        await self._subscribe(self._planner.plan, Plan, listener.on_plan)
        await self._subscribe(self._key_usage, KeyUsage, listener.on_key_usage)
        await self._client.subscribe(self._cancelled_responses, cb=self._receive_cancelled)
        listener.on_connected()
        while True:
            self._plan_wanted.clear()
            if self.connected:
                await self._read_plan(listener)
            await asyncio.sleep(_MIN_PLAN_POLL_S)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._plan_wanted.wait(), _PLAN_POLL_S)

    async def _receive_cancelled(self, message: Msg) -> None:
        self.on_response_cancelled(message.data.decode("utf-8", "replace"))

    async def _read_plan(self, listener: Listener) -> None:
        """The plan that is kept, for a gateway that came later or missed the announcement."""
        try:
            bucket = await self._client.jetstream(timeout=1.0).key_value(self._planner.plan_bucket)
            value = (await bucket.get("current")).value
        except (TimeoutError, nats.errors.Error, OSError):
            return
        plan = self._decode(self._planner.plan_bucket, value or b"", msgspec.msgpack.Decoder(Plan))
        if plan is not None:
            listener.on_plan(plan)

    async def _subscribe(
        self,
        subject: str,
        type_: type[_T],
        tell: Callable[[_T], Awaitable[None] | None],
    ) -> None:
        decoder = msgspec.msgpack.Decoder(type_)

        async def receive(message: Msg) -> None:
            decoded = self._decode(message.subject, message.data, decoder)
            telling = tell(decoded) if decoded is not None else None
            if telling is not None:
                await telling

        callback: Callable[[Msg], Awaitable[None]] = receive
        await self._client.subscribe(subject, cb=callback)

    @staticmethod
    def _decode(subject: str, data: bytes, decoder: msgspec.msgpack.Decoder[_T]) -> _T | None:
        try:
            return decoder.decode(unpacked(data))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            _log.warning("malformed %s on %s: %s", decoder.type.__name__, subject, error)
            return None

    def _spawn(self, run: Awaitable[None]) -> None:
        task = asyncio.ensure_future(run)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
