"""Responses that are kept for later: in a NATS bucket, so that any gateway of the model finds them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import DiscardPolicy, KeyValueConfig
from nats.js.kv import KeyValue

from gateway.errors import ApiError, unavailable
from gateway.openai import ChatMessage
from gateway.services.bus import Bus

_log = logging.getLogger(__name__)

KEPT_S: Final = 3600.0
MAX_BYTES: Final = 256 * 1024 * 1024
_ERRORS: Final = (TimeoutError, nats.errors.Error, nats.js.errors.Error, OSError)


class StoredResponse(msgspec.Struct, frozen=True, kw_only=True):
    response: dict[str, Any]
    conversation: list[ChatMessage]
    """All messages up to and with this answer, without instructions."""
    owner: str
    """The principal who may see it."""


class ResponseStore:
    """One bucket of the model; a response is kept for an hour, or less if the bucket is full: the oldest go first."""

    def __init__(self, bus: Bus, model: str) -> None:
        self._bus = bus
        self._bucket_name = f"spotserve-{model}-responses"
        self._bucket: KeyValue | None = None
        self._opening = asyncio.Lock()

    async def put(self, stored: StoredResponse) -> None:
        """Keep it; of one that is too large, that it is. Raises ApiError (503) if the store cannot be reached."""
        data = msgspec.json.encode(stored)
        try:
            bucket, key = await self._open(), str(stored.response["id"])
            try:
                await bucket.put(key, data)
            except nats.errors.MaxPayloadError:
                _log.warning("response %s is too large to be kept: %d bytes", key, len(data))
                await bucket.put(key, msgspec.json.encode(_too_large(stored)))
        except _ERRORS as error:
            raise _unreachable() from error

    async def get(self, response_id: str, owner: str) -> StoredResponse | None:
        """None if there is none of this owner. Raises ApiError (503)."""
        try:
            value = (await (await self._open()).get(response_id)).value
        except (nats.js.errors.NotFoundError, nats.js.errors.KeyNotFoundError, nats.js.errors.InvalidKeyError):
            return None
        except _ERRORS as error:
            raise _unreachable() from error
        stored = msgspec.json.decode(value or b"", type=StoredResponse)
        return stored if stored.owner == owner else None

    async def delete(self, response_id: str) -> None:
        """Forget it. Raises ApiError (503)."""
        try:
            await (await self._open()).purge(response_id)
        except _ERRORS as error:
            raise _unreachable() from error

    async def _open(self) -> KeyValue:
        async with self._opening:
            if self._bucket is None:
                self._bucket = await self._found_or_made()
        return self._bucket

    async def _found_or_made(self) -> KeyValue:
        stream = self._bus.jetstream()
        try:
            bucket = await stream.key_value(self._bucket_name)
        except nats.js.errors.NotFoundError:
            config = KeyValueConfig(bucket=self._bucket_name, ttl=KEPT_S, max_bytes=MAX_BYTES)
            bucket = await stream.create_key_value(config)
        # The client makes buckets that refuse what is new when they are full.
        info = await stream.stream_info(f"KV_{self._bucket_name}")
        if info.config.discard is not DiscardPolicy.OLD:
            await stream.update_stream(info.config.evolve(discard=DiscardPolicy.OLD))
        return bucket


def _too_large(stored: StoredResponse) -> StoredResponse:
    without: dict[str, Any] = {
        "status": "failed",
        "error": {"code": "server_error", "message": "The response is too large to be kept."},
        "output": [],
        "instructions": None,
        "metadata": {},
        "tools": [],
        "tool_choice": "auto",
        "text": {"format": {"type": "text"}},
        "user": None,
    }
    return StoredResponse(response=stored.response | without, conversation=[], owner=stored.owner)


def _unreachable() -> ApiError:
    return unavailable("The store of responses cannot be reached now.")
