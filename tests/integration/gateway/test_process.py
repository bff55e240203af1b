"""`python -m gateway` as a process: start, drain on SIGTERM, refusals to start, end with the parent."""

import asyncio
import os
import signal
import socket
import subprocess
import sys

import httpx
import nats
import pytest


@pytest.fixture
def spawn(nats_server, model_dir):
    processes = []

    def start(port, **variables):
        environ = {
            **os.environ,
            "SPOTSERVE_GATEWAY_MODEL_DIR": str(model_dir),
            "SPOTSERVE_GATEWAY_MODEL": "process",
            "SPOTSERVE_GATEWAY_NATS_URL": nats_server.url,
            "SPOTSERVE_GATEWAY_PORT": str(port),
            **variables,
        }
        command = [sys.executable, "-m", "gateway"]
        process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


async def alive(client):
    async with asyncio.timeout(20):
        while True:
            try:
                return await client.get("/health")
            except httpx.ConnectError:
                await asyncio.sleep(0.05)


async def wait(process):
    return await asyncio.wait_for(asyncio.to_thread(process.wait), 15)


async def test_sigterm_lets_streams_finish(spawn, nats_server, free_port, fake_engine_class):
    port = free_port()
    process = spawn(port)
    client = await nats.connect(nats_server.url)
    engine = fake_engine_class(client, "process")
    await engine.start()
    pipeline = await engine.add("p0", step_s=0.02)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        assert (await alive(http)).status_code == 200
        await engine.plan("p0")
        async with asyncio.timeout(10):
            while (await http.get("/ready")).status_code != 200:
                await engine.announce()
                await asyncio.sleep(0.05)
        body = {"model": "tiny-chat", "prompt": "abc", "max_tokens": 50, "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            await anext(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) > 20
    assert await wait(process) == 0
    assert not pipeline.cancelled
    await engine.close()


async def test_sigterm_ends_what_does_not_finish(spawn, free_port):
    port = free_port()
    process = spawn(port, SPOTSERVE_GATEWAY_DRAIN_S="0.3")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        await alive(http)
        body = {"model": "tiny-chat", "prompt": "abc"}
        waiting = asyncio.create_task(http.post("/v1/completions", json=body))
        async with asyncio.timeout(10):
            while (await http.get("/internal/requests")).json()["waiting"] == 0:
                await asyncio.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        response = await waiting
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "service_unavailable_error"
    assert await wait(process) == 0


async def test_taken_port(spawn):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = spawn(port)
        assert await wait(process) == 2
    lines = process.stderr.read().decode().splitlines()
    assert len(lines) == 1
    assert str(port) in lines[0]
    assert "--port" in lines[0]


async def test_missing_model(spawn, free_port, tmp_path):
    process = spawn(free_port(), SPOTSERVE_GATEWAY_MODEL_DIR=str(tmp_path))
    assert await wait(process) == 2
    assert "tokenizer.json" in process.stderr.read().decode()
