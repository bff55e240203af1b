"""Responses that are kept for later: in a NATS bucket, so that any gateway of the model finds them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import KeyValueConfig
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
    """One bucket of the model; a response is kept for an hour."""

    def __init__(self, bus: Bus, model: str) -> None:
        self._bus = bus
        self._bucket_name = f"spotserve-{model}-responses"
        self._bucket: KeyValue | None = None
        self._opening = asyncio.Lock()

    async def put(self, stored: StoredResponse) -> None:
        """Keep it. Raises ApiError (503) if the store cannot be reached."""
        data = msgspec.json.encode(stored)
        try:
            await (await self._open()).put(str(stored.response["id"]), data)
        except nats.errors.MaxPayloadError:
            _log.warning("response %s is too large to be kept: %d bytes", stored.response["id"], len(data))
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
                config = KeyValueConfig(bucket=self._bucket_name, ttl=KEPT_S, max_bytes=MAX_BYTES)
                self._bucket = await self._bus.jetstream().create_key_value(config)
        return self._bucket


def _unreachable() -> ApiError:
    return unavailable("The store of responses cannot be reached now.")
