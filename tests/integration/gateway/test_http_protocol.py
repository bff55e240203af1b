"""The bound on the head of a request."""

import asyncio
import socket

import pytest
import uvicorn

from gateway.services.http_protocol import MAX_HEAD_BYTES, BoundedHttp


async def answer(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


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
