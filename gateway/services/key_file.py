"""The file of API keys, read again whenever it changes; what keys have used, shared between gateways and kept."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Final

import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import KeyValueConfig
from nats.js.kv import KeyValue

from gateway.core.keys import KeyRing
from gateway.core.rate_limits import RateLimits
from gateway.errors import SettingsError
from gateway.protocol import KeyFile, KeyUsage, key_usage_bucket
from gateway.services.bus import Bus

_log = logging.getLogger(__name__)

_POLL_S: Final = 0.5
_ERRORS: Final = (TimeoutError, nats.errors.Error, nats.js.errors.Error, OSError)


class WatchedKeys:
    """`ring` has the keys of the file as it was half a second ago; if it cannot be read, those that it had before."""

    def __init__(self, path: Path) -> None:
        """Raises SettingsError if it cannot be read."""
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self.ring = KeyRing()
        problem = self._read()
        if problem is not None:
            raise SettingsError("SPOTSERVE_GATEWAY_API_KEYS", problem)

    async def run(self) -> None:
        """Follow the file, for ever."""
        told: str | None = None
        while True:
            await asyncio.sleep(_POLL_S)
            problem = self._read()
            if problem is not None and problem != told:
                _log.error("API keys stay as they were: %s", problem)
            told = problem

    def _read(self) -> str | None:
        """Take in the file if it has changed; what is wrong with it."""
        try:
            status = self._path.stat()
            seen = status.st_mtime_ns, status.st_size, status.st_ino
            if seen == self._seen:
                return None
            self._seen = seen
            file = msgspec.json.decode(self._path.read_bytes(), type=KeyFile)
        except OSError as error:
            self._seen = None
            return f"cannot read {self._path}: {error.strerror}"
        except msgspec.DecodeError as error:
            return f"{self._path}: {error}"
        self.ring = KeyRing(file.keys)
        _log.info("%d API keys in %s", len(self.ring), self._path)
        return None


class SharedUsage:
    """Tells the other gateways what keys have used here, and keeps it for the next start."""

    def __init__(self, bus: Bus, model: str, limits: RateLimits) -> None:
        self._bus = bus
        self._bucket_name = key_usage_bucket(model)
        self._limits = limits

    async def run(self) -> None:
        """Share, for ever."""
        bucket = await self._load()
        told = self._limits.usage()
        while True:
            await asyncio.sleep(_POLL_S)
            usage = self._limits.usage()
            if usage == told or not self._bus.connected:
                continue
            try:
                await self._bus.share_key_usage(usage)
                await bucket.put(usage.gateway, msgspec.msgpack.encode(usage))
                told = usage
            except _ERRORS as error:
                _log.warning("cannot keep what API keys have used: %s", error)

    async def _load(self) -> KeyValue:
        """The bucket, once all that is in it has been taken in."""
        while True:
            try:
                if self._bus.connected:
                    config = KeyValueConfig(bucket=self._bucket_name)
                    bucket = await self._bus.jetstream().create_key_value(config)
                    await self._take_in(bucket)
                    return bucket
            except _ERRORS as error:
                _log.warning("cannot read what API keys have used: %s", error)
            await asyncio.sleep(_POLL_S)

    async def _take_in(self, bucket: KeyValue) -> None:
        try:
            gateways = await bucket.keys()
        except nats.js.errors.NoKeysError:
            return
        kept = [msgspec.msgpack.decode((await bucket.get(one)).value or b"", type=KeyUsage) for one in gateways]
        for usage in kept:
            self._limits.observe(usage, time.time(), past=True)
