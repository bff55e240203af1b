"""How context travels: a plain byte service of each rank, from which other ranks pull.

Apart from the collective plane, so that a peer's death breaks one transfer and not a communicator.

On the wire: a request is a 4-byte little-endian length and a msgpack `FetchUnits` or `FetchKv`. The answer is one item
for each unit asked for, in the order asked: 1 byte status (0 data, 1 error text), 8 bytes length, 8 bytes xxh3-64
checksum (little-endian), then the bytes. An error item ends the answer. A connection serves any number of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Final, Protocol

import msgspec
import xxhash

from engine.core.roles import Unit
from engine.errors import CorruptTransfer, EngineError, TransferError
from planner.protocol import UnitRange, Wire

logger = logging.getLogger(__name__)

_LENGTH: Final = struct.Struct("<I")
_ITEM: Final = struct.Struct("<BQQ")
BATCH_BYTES: Final = 1 << 20
"""What is exported or imported by one call into a worker thread."""
_MAX_REQUEST_BYTES: Final = 1 << 20
_STREAM_LIMIT_BYTES: Final = 1 << 22
_CONNECT_TIMEOUT_S: Final = 2.0
_STALL_TIMEOUT_S: Final = 10.0


class FetchUnits(Wire, frozen=True, kw_only=True, tag=True):
    """Weight units, by (layer, head group)."""

    units: list[Unit]


class FetchKv(Wire, frozen=True, kw_only=True, tag=True):
    """K and V of the first `num_tokens` tokens in `blocks`, for each (decoder layer, head group)."""

    pipeline: str
    units: list[Unit]
    blocks: list[int]
    num_tokens: int


_decoder = msgspec.msgpack.Decoder(FetchUnits | FetchKv)


class ContextSource(Protocol):
    """Who answers: the backend of the rank. Called in a worker thread."""

    def export_unit(self, layer: int, group: int) -> bytes: ...

    def export_kv(self, pipeline: str, layer: int, group: int, blocks: list[int], num_tokens: int) -> bytes: ...


class ContextServer:
    """Serves a rank's weights and KV to whoever asks."""

    def __init__(self, source: ContextSource) -> None:
        self._source = source
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, host: str) -> str:
        """Listen on a free port of `host`; returns `host:port`."""
        self._server = await asyncio.start_server(self._serve, host, 0, limit=_STREAM_LIMIT_BYTES)
        return f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in self._writers:
                writer.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                if length > _MAX_REQUEST_BYTES:
                    logger.warning("context request refused: %d bytes", length)
                    return
                await self._answer(await reader.readexactly(length), writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # The peer is done, or gone.
        finally:
            self._writers.discard(writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, body: bytes, writer: asyncio.StreamWriter) -> None:
        batch: list[bytes] = []
        try:
            items = self._items(_decoder.decode(body))
            while await asyncio.to_thread(_fill, batch, items):
                writer.writelines(batch)
                batch.clear()
                await writer.drain()
        except OSError:
            raise  # The connection, not the context.
        except Exception as error:
            if not isinstance(error, EngineError):
                logger.exception("event=context_request_failed")
            text = f"{type(error).__name__}: {error}".encode()
            writer.writelines(batch)
            writer.write(_ITEM.pack(1, len(text), xxhash.xxh3_64_intdigest(text)) + text)
            await writer.drain()

    def _items(self, request: FetchUnits | FetchKv) -> Iterator[bytes]:
        for layer, group in request.units:
            if isinstance(request, FetchUnits):
                yield self._source.export_unit(layer, group)
            else:
                yield self._source.export_kv(request.pipeline, layer, group, request.blocks, request.num_tokens)


def _fill(batch: list[bytes], items: Iterator[bytes]) -> bool:
    """Put the next items on `batch`, about `BATCH_BYTES` of them; False if there was none.

    A worker thread is entered once a batch: beside one that computes, each change of threads may take a millisecond.
    """
    num_bytes = 0
    for data in items:
        batch += [_ITEM.pack(0, len(data), xxhash.xxh3_64_intdigest(data)), data]
        num_bytes += len(data)
        if num_bytes >= BATCH_BYTES:
            break
    return bool(batch)


async def fetch(holder: str, address: str, request: FetchUnits | FetchKv) -> AsyncGenerator[tuple[Unit, bytes]]:
    """Pull `request.units` from `address` (`host:port`), in order. Close it (`aclosing`) if it is left early.

    Raises:
        TransferError: the holder cannot be reached, has not got the unit, or stalls.
        CorruptTransfer: a checksum is wrong.

    """
    writer: asyncio.StreamWriter | None = None
    what = "context"
    try:
        host, _, port = address.rpartition(":")
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, int(port), limit=_STREAM_LIMIT_BYTES)
        body = msgspec.msgpack.encode(request)
        writer.write(_LENGTH.pack(len(body)) + body)
        for unit in request.units:
            what = _name(request, unit)
            async with asyncio.timeout(_STALL_TIMEOUT_S):
                data = await _read_item(reader, holder, what)
            yield unit, data
    except (OSError, ValueError, asyncio.IncompleteReadError) as error:
        raise TransferError(holder, what, str(error) or type(error).__name__) from error
    finally:
        if writer is not None:
            writer.close()


async def in_batches(items: AsyncGenerator[tuple[Unit, bytes]]) -> AsyncGenerator[list[tuple[Unit, bytes]]]:
    """`items` in lists of about `BATCH_BYTES`; closes `items`. What was read before an error comes before it."""
    batch: list[tuple[Unit, bytes]] = []
    num_bytes = 0
    async with contextlib.aclosing(items):
        try:
            async for item in items:
                batch.append(item)
                num_bytes += len(item[1])
                if num_bytes >= BATCH_BYTES:
                    yield batch
                    batch, num_bytes = [], 0
        except TransferError:
            if batch:
                yield batch
            raise
    if batch:
        yield batch


async def _read_item(reader: asyncio.StreamReader, holder: str, what: str) -> bytes:
    status, length, checksum = _ITEM.unpack(await reader.readexactly(_ITEM.size))
    data = await reader.readexactly(length)
    if xxhash.xxh3_64_intdigest(data) != checksum:
        raise CorruptTransfer(holder, what, "wrong checksum")
    if status:
        raise TransferError(holder, what, data.decode(errors="replace"))
    return data


def _name(request: FetchUnits | FetchKv, unit: Unit) -> str:
    kind = "weights" if isinstance(request, FetchUnits) else f"KV of {request.pipeline}"
    return f"{kind} (layer {unit[0]}, head group {unit[1]})"


def as_ranges(units: set[Unit]) -> list[UnitRange]:
    """`units` as few rectangles: runs of layers that have the same runs of head groups."""
    runs: list[UnitRange] = []
    open_runs: dict[tuple[int, int], int] = {}
    by_layer: dict[int, list[int]] = {}
    for layer, group in units:
        by_layer.setdefault(layer, []).append(group)
    for layer in sorted(by_layer):
        spans = _spans(sorted(by_layer[layer]))
        still_open: dict[tuple[int, int], int] = {}
        for span in spans:
            at = open_runs.get(span)
            if at is not None and runs[at].last_layer == layer - 1:
                runs[at] = msgspec.structs.replace(runs[at], last_layer=layer)
            else:
                at = len(runs)
                runs.append(UnitRange(first_layer=layer, last_layer=layer, first_group=span[0], last_group=span[1]))
            still_open[span] = at
        open_runs = still_open
    return runs


def _spans(numbers: Sequence[int]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return spans
