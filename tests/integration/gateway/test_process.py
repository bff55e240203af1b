"""`python -m gateway` as a process: start, drain on SIGTERM, refusals to start, end with the parent."""

import asyncio
import json
import os
import signal
import socket
import ssl
import subprocess
import sys

import httpx
import msgspec
import nats
import pytest

from gateway.protocol import KeyFile, KeyRecord, hash_secret


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


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux tells the time")
async def test_a_client_that_takes_nothing_of_a_slow_stream_is_cut_and_counted(
    spawn, nats_server, free_port, fake_engine_class
):
    port = free_port()
    spawn(port, SPOTSERVE_GATEWAY_SLOW_READER_TIMEOUT_S="0.5")
    client = await nats.connect(nats_server.url)
    engine = fake_engine_class(client, "process")
    await engine.start()
    await engine.add("p0", step_s=0.05)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        await alive(http)
        await engine.plan("p0")
        async with asyncio.timeout(10):
            while (await http.get("/ready")).status_code != 200:
                await engine.announce()
                await asyncio.sleep(0.05)
        fields = {"max_tokens": 900, "n": 8, "stream": True, "ignore_eos": True}
        body = json.dumps({"model": "tiny-chat", "prompt": "abc", **fields}).encode()
        with socket.socket() as reader:
            # Full after a few events, long before the gateway would have to wait.
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", port))
            head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            reader.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            async with asyncio.timeout(15):
                while 'stalled_readers_total{model_name="tiny-chat"} 1.0' not in (await http.get("/metrics")).text:
                    await asyncio.sleep(0.05)
        assert (await http.get("/internal/requests")).json()["running"] == 0
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


async def serve_one(nats_server, fake_engine_class, http, **options):
    """An engine with the pipeline `p0`, once the gateway at `http` is ready."""
    engine = fake_engine_class(await nats.connect(nats_server.url), "process")
    await engine.start()
    await engine.add("p0", **options)
    await alive(http)
    await engine.plan("p0")
    await until_ready(engine, http)
    return engine


async def until_ready(engine, http):
    async with asyncio.timeout(10):
        while (await http.get("/ready")).status_code != 200:
            await engine.announce()
            await asyncio.sleep(0.05)


async def test_draining_flips_ready_only(spawn, nats_server, free_port, fake_engine_class):
    port, admin_port = free_port(), free_port()
    process = spawn(port, SPOTSERVE_GATEWAY_ADMIN_PORT=str(admin_port))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        engine = await serve_one(nats_server, fake_engine_class, http, step_s=0.02)
        body = {"model": "tiny-chat", "prompt": "abc", "max_tokens": 100, "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            await anext(lines)
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(5):
                while (await http.get("/ready")).status_code == 200:
                    await asyncio.sleep(0.02)
            for base in ("", f"http://127.0.0.1:{admin_port}"):
                ready = await http.get(f"{base}/ready")
                assert (ready.status_code, ready.json()["reason"]) == (503, "the gateway is shutting down")
                assert (await http.get(f"{base}/health")).status_code == 200
            refused = await http.post("/v1/completions", json=body)
            assert (refused.status_code, refused.headers["x-spotserve-reason"]) == (503, "draining")
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) > 50
    assert await wait(process) == 0
    await engine.close()


async def test_workers_share_port_metrics_and_limits(spawn, nats_server, free_port, fake_engine_class, tmp_path):
    port, admin_ports = free_port(), [free_port(), free_port()]
    secret = "a-secret-of-20-characters"
    key = KeyRecord(id="aaaaaaaa", salt="ab", sha256=hash_secret("ab", secret), requests_per_minute=20)
    (tmp_path / "keys.json").write_bytes(msgspec.json.encode(KeyFile(keys=[key])))
    for number, admin_port in enumerate(admin_ports):
        spawn(
            port,
            SPOTSERVE_GATEWAY_ADMIN_PORT=str(admin_port),
            SPOTSERVE_GATEWAY_GATEWAY_ID=f"gw-{number}",
            SPOTSERVE_GATEWAY_REUSE_PORT="1",
            SPOTSERVE_GATEWAY_API_KEYS=str(tmp_path / "keys.json"),
            PROMETHEUS_MULTIPROC_DIR=str(tmp_path / "metrics"),
        )
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{admin_ports[0]}") as admin:
        engine = await serve_one(nats_server, fake_engine_class, admin, step_s=0.001)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{admin_ports[1]}") as admin:
        await alive(admin)
        await until_ready(engine, admin)

    async def ask():
        # A connection of its own: the kernel spreads connections over the processes.
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            body = {"model": "tiny-chat", "prompt": "abc", "max_tokens": 3}
            headers = {"authorization": f"Bearer sk-aaaaaaaa-{secret}"}
            return (await http.post("/v1/completions", json=body, headers=headers)).status_code

    first = [await ask() for _ in range(16)]
    assert first == [200] * 16
    assert {one.gateway for one in engine.pipelines["p0"].submitted} == {"gw-0", "gw-1"}
    await asyncio.sleep(1.5)  # what each has counted reaches the other within a second
    second = [await ask() for _ in range(16)]
    assert 429 in second
    # 20 in the first minute, and what is refilled in the seconds of this test.
    assert 18 <= (first + second).count(200) <= 24
    num_served = (first + second).count(200)
    async with httpx.AsyncClient() as http:
        for url in (f"http://127.0.0.1:{one}/metrics" for one in (port, *admin_ports)):
            assert f'vllm:generation_tokens_total{{model_name="tiny-chat"}} {3 * num_served}.0' in (
                await until_text(http, url, f" {3 * num_served}.0")
            )
    await engine.close()


async def until_text(http, url, wanted):
    async with asyncio.timeout(5):
        while wanted not in (text := (await http.get(url)).text):
            await asyncio.sleep(0.05)
    return text


async def test_no_keys_outside_the_loopback_address(spawn, free_port):
    process = spawn(free_port(), SPOTSERVE_GATEWAY_HOST="0.0.0.0")
    assert await wait(process) == 2
    (line,) = process.stderr.read().decode().splitlines()
    assert "SPOTSERVE_GATEWAY_HOST" in line
    assert "spotserve keys create" in line
    assert "NO_AUTH=1" in line


async def test_tls(spawn, free_port, tmp_path):
    port, admin_port = free_port(), free_port()
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    files = {"SPOTSERVE_GATEWAY_TLS_CERT": str(cert), "SPOTSERVE_GATEWAY_TLS_KEY": str(key)}
    spawn(port, SPOTSERVE_GATEWAY_ADMIN_PORT=str(admin_port), **files)
    context = ssl.create_default_context(cafile=cert)
    async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{port}", verify=context) as http:
        assert (await alive(http)).status_code == 200
        assert (await http.get(f"http://127.0.0.1:{admin_port}/metrics")).status_code == 200
    broken = spawn(free_port(), **files | {"SPOTSERVE_GATEWAY_TLS_KEY": str(cert)})
    assert await wait(broken) == 2
    assert "SPOTSERVE_GATEWAY_TLS_CERT" in broken.stderr.read().decode()
