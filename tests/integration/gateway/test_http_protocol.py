"""The bound on the head of a request, and what goes beside ASGI."""

import asyncio
import socket

import pytest
import uvicorn

from gateway.services.http_protocol import MAX_HEAD_BYTES, BoundedHttp, Exchange

GONE: list[bool] = []


async def answer(scope, receive, send):
    if scope["path"] == "/stream":
        await stream(scope, send)
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


async def stream(scope, send):
    exchange = Exchange.of(scope)
    ready = [exchange.ready]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    gone = asyncio.Event()
    exchange.watch(lambda _: gone.set())
    ready.append(exchange.ready)
    for number in range(4):
        exchange.write(b"event %d" % number)
    if scope["query_string"] == b"endless":
        await gone.wait()
        GONE.append(exchange.gone)
        ready.append(not exchange.ready)
    assert ready == [False, *[True] * (len(ready) - 1)]
    exchange.unwatch()
    await send({"type": "http.response.body", "body": b"end", "more_body": False})


@pytest.fixture
async def address():
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(answer, http=BoundedHttp, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve([listener]))
    yield listener.getsockname()
    server.should_exit = True
    await serving


@pytest.mark.parametrize("head", [b"GET / HTTP/1.1\r\nX: ", b"GET /"])
async def test_a_head_without_end_is_refused(address, head):
    reader, writer = await asyncio.open_connection(*address)
    writer.write(head)
    for _ in range(MAX_HEAD_BYTES // 1024 + 1):
        writer.write(b"x" * 1024)
    status = await reader.readline()
    assert b" 400 " in status
    writer.close()


async def test_large_bodies_and_many_requests_pass(address):
    reader, writer = await asyncio.open_connection(*address)
    body = b"x" * (4 * MAX_HEAD_BYTES)
    for _ in range(3):
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert b" 200 " in await reader.readline()
        await reader.readuntil(b"\r\n\r\n")
    writer.close()


async def test_parts_that_are_written_beside_asgi(address):
    reader, writer = await asyncio.open_connection(*address)
    for _ in range(2):
        writer.write(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b" 200 " in await reader.readline()
        assert b"transfer-encoding: chunked" in await reader.readuntil(b"\r\n\r\n")
        expected = b"".join(b"7\r\nevent %d\r\n" % number for number in range(4)) + b"3\r\nend\r\n0\r\n\r\n"
        assert await reader.readexactly(len(expected)) == expected
    writer.close()


async def test_a_client_that_goes_is_noticed(address):
    GONE.clear()
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET /stream?endless HTTP/1.1\r\nHost: a\r\n\r\n")
    await reader.readuntil(b"event 3\r\n")
    writer.close()
    async with asyncio.timeout(10):
        while not GONE:
            await asyncio.sleep(0.01)
    assert GONE == [True]
