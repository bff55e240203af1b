"""Context transport over real sockets."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from engine.context.transport import ContextServer, FetchKv, FetchUnits, as_ranges, fetch
from engine.errors import CorruptTransfer, MissingUnit, TransferError

ITEM = struct.Struct("<BQQ")
Unit = tuple[int, int]


class Units:
    """Units in memory, of different sizes; layer 9 fails as a bug would."""

    def export_unit(self, layer: int, group: int) -> bytes:
        if layer == 9:
            raise RuntimeError("out of luck")
        if layer > 5:
            raise MissingUnit([(layer, group)])
        return bytes([layer, group]) * (1 + 100_000 * layer)

    def export_kv(self, pipeline: str, layer: int, group: int, blocks: list[int], num_tokens: int) -> bytes:
        return f"{pipeline} {layer} {group} {blocks} {num_tokens}".encode()


@asynccontextmanager
async def serving() -> AsyncIterator[str]:
    server = ContextServer(Units())
    try:
        yield await server.start("127.0.0.1")
    finally:
        await asyncio.wait_for(server.close(), 5)


@asynccontextmanager
async def answering(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """A holder that reads the request and then does what `answer` does."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (length,) = struct.unpack("<I", await reader.readexactly(4))
        await reader.readexactly(length)
        with contextlib.suppress(OSError):
            await answer(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def pull(
    address: str, request: FetchUnits | FetchKv, got: list[tuple[Unit, bytes]] | None = None
) -> list[tuple[Unit, bytes]]:
    """Everything asked for, from a holder named r1; `got` has what came before an error."""
    got = got if got is not None else []
    async for item in fetch("r1", address, request):
        got.append(item)
    return got


async def test_units_and_kv_arrive_whole_and_in_order() -> None:
    units = [(5, 1), (0, 0), (3, 2)]
    async with serving() as address:
        assert await pull(address, FetchUnits(units=units)) == [(u, Units().export_unit(*u)) for u in units]
        kv = FetchKv(pipeline="p7", units=[(2, 1)], blocks=[4, 9], num_tokens=17)
        assert await pull(address, kv) == [((2, 1), b"p7 2 1 [4, 9] 17")]
        assert await pull(address, FetchUnits(units=[])) == []


async def test_several_requests_on_one_connection() -> None:
    async with serving() as address:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        for units in ([(0, 1), (1, 1)], [(2, 2)], [(0, 0)]):
            body = msgspec.msgpack.encode(FetchUnits(units=units))
            writer.write(struct.pack("<I", len(body)) + body)
            for unit in units:
                status, length, checksum = ITEM.unpack(await reader.readexactly(ITEM.size))
                data = await reader.readexactly(length)
                assert (status, data) == (0, Units().export_unit(*unit))
                assert xxhash.xxh3_64_intdigest(data) == checksum
        writer.close()


@pytest.mark.parametrize(("layer", "cause"), [(6, "layer 6 group 1"), (9, "RuntimeError: out of luck")])
async def test_an_error_of_the_holder_names_holder_unit_and_cause_after_the_units_before_it(
    layer: int, cause: str
) -> None:
    got: list[tuple[Unit, bytes]] = []
    async with serving() as address:
        with pytest.raises(TransferError, match=cause) as caught:
            await pull(address, FetchUnits(units=[(1, 1), (layer, 1), (2, 1)]), got)
        assert [unit for unit, _ in got] == [(1, 1)]
        assert caught.value.holder == "r1"
        assert f"layer {layer}, head group 1" in caught.value.what
        # The connection broke for nobody else.
        assert len(await pull(address, FetchUnits(units=[(1, 1)]))) == 1


async def test_a_request_that_cannot_be_read_is_answered_with_an_error() -> None:
    async with serving() as address:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(struct.pack("<I", 3) + b"\xc1\xc1\xc1")
        status, length, _ = ITEM.unpack(await asyncio.wait_for(reader.readexactly(ITEM.size), 5))
        assert status == 1
        assert await reader.readexactly(length)
        writer.close()


async def test_an_oversized_request_closes_the_connection() -> None:
    async with serving() as address:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(struct.pack("<I", (1 << 20) + 1))
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


async def test_corrupt_bytes_name_holder_and_unit() -> None:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = b"weights"
        writer.write(ITEM.pack(0, len(data), xxhash.xxh3_64_intdigest(data)) + data)
        writer.write(ITEM.pack(0, len(data), xxhash.xxh3_64_intdigest(data)) + b"wEights")
        await writer.drain()

    async with answering(answer) as address:
        got: list[tuple[Unit, bytes]] = []
        with pytest.raises(CorruptTransfer, match="checksum") as caught:
            await pull(address, FetchUnits(units=[(4, 2), (5, 2)]), got)
        assert got == [((4, 2), b"weights")]
        assert "r1" in str(caught.value)
        assert "(layer 5, head group 2)" in str(caught.value)


@pytest.mark.parametrize("sent", [b"", ITEM.pack(0, 7, 0), ITEM.pack(0, 7, 0) + b"wei"])
async def test_a_peer_that_dies_in_the_middle(sent: bytes) -> None:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await writer.drain()

    async with answering(answer) as address:
        with pytest.raises(TransferError, match=r"r1.*") as caught:
            await pull(address, FetchUnits(units=[(4, 2)]))
        assert "(layer 4, head group 2)" in str(caught.value)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "127.0.0.1:"])
async def test_nobody_there(address: str) -> None:
    with pytest.raises(TransferError, match="r1"):
        await pull(address, FetchUnits(units=[(1, 1)]))


async def test_a_server_that_closes_ends_the_pulls_under_way() -> None:
    server = ContextServer(Units())
    address = await server.start("127.0.0.1")
    items = fetch("r1", address, FetchUnits(units=[(5, 1)] * 1000))
    assert (await anext(items))[0] == (5, 1)
    await asyncio.wait_for(server.close(), 10)
    with pytest.raises(TransferError):
        async for _ in items:
            pass


async def test_a_pull_that_is_left_early_closes_its_connection() -> None:
    closed = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ITEM.pack(0, 1, xxhash.xxh3_64_intdigest(b"x")) + b"x")
        await reader.read()
        closed.set()

    async with (
        answering(answer) as address,
        contextlib.aclosing(fetch("r1", address, FetchUnits(units=[(0, 0), (0, 1)]))) as items,
    ):
        await anext(items)
        await items.aclose()
        await asyncio.wait_for(closed.wait(), 5)


@given(st.sets(st.tuples(st.integers(-1, 12), st.integers(0, 7))))
def test_ranges_give_the_same_units_back_each_once(units: set[Unit]) -> None:
    ranges = as_ranges(units)
    assert set().union(*(r.units() for r in ranges)) == units
    assert sum(len(r.units()) for r in ranges) == len(units)


@given(st.integers(-1, 5), st.integers(0, 9), st.integers(0, 5), st.integers(0, 5))
def test_a_rectangle_is_one_range(first_layer: int, num_layers: int, first_group: int, num_groups: int) -> None:
    units = {
        (layer, group)
        for layer in range(first_layer, first_layer + num_layers + 1)
        for group in range(first_group, first_group + num_groups + 1)
    }
    assert len(as_ranges(units)) == 1
