"""Keys, limits, fairness between keys, timeouts, slow readers, metrics."""

import asyncio
import json
import logging
import socket
import time

import httpx
import msgspec
import pytest

from gateway.protocol import KeyFile, KeyRecord, hash_secret

SALT = "ab" * 16
BODY = {"model": "tiny-chat", "prompt": "abc", "max_tokens": 4}


def secret_of(id_):
    return f"{id_}-secret-secret-secret"


def bearer(id_):
    return {"authorization": f"Bearer sk-{id_}-{secret_of(id_)}"}


def record(id_, **limits):
    return KeyRecord(id=id_, salt=SALT, sha256=hash_secret(SALT, secret_of(id_)), **limits)


def write(path, *records):
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(KeyFile(keys=list(records))))
    fresh.replace(path)


@pytest.fixture
def guarded(make_stack, tmp_path):
    """`await guarded(key, ..., setting=...)`: a stack with one pipeline that asks for these keys, and their file."""

    async def make(*records, free_slots=8, step_s=0.001, **values):
        path = tmp_path / "keys.json"
        write(path, *records)
        stack = await make_stack(api_keys=str(path), **values)
        await stack.engine.add("p0", free_slots=free_slots, step_s=step_s)
        await stack.engine.plan("p0")
        await stack.ready()
        return stack, path

    return make


async def post(stack, id_, **fields):
    return await stack.http.post("/v1/completions", json=BODY | fields, headers=bearer(id_))


async def test_keys_are_asked_for_before_the_body_is_looked_at(guarded, caplog):
    caplog.set_level(logging.DEBUG)
    stack, _ = await guarded(record("aaaaaaaa"), record("bbbbbbbb", expires_s=time.time() - 1))
    for headers in (
        {},
        {"authorization": "Basic abc"},
        {"authorization": "Bearer sk-none"},
        {"authorization": f"Bearer sk-aaaaaaaa-{secret_of('bbbbbbbb')}"},
        {"authorization": f"Bearer sk-cccccccc-{secret_of('aaaaaaaa')}"},
        bearer("bbbbbbbb"),
    ):
        response = await stack.http.post("/v1/completions", content=b"{broken", headers=headers)
        assert response.status_code == 401, headers
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert (await stack.http.get("/v1/models", headers=headers)).status_code == 401
        assert (await stack.http.post("/tokenize", headers=headers)).status_code == 401
    for path in ("//v1/models", "/v1//models", "/v1/models/", "/v1/../v1/models", "/%76%31/models"):
        assert (await stack.http.get(httpx.URL(stack.url, raw_path=path.encode()))).status_code in (401, 404), path
    assert (await post(stack, "aaaaaaaa")).status_code == 200
    lower = {"authorization": bearer("aaaaaaaa")["authorization"].replace("Bearer", "bearer")}
    assert (await stack.http.get("/v1/models", headers=lower)).status_code == 200
    for path in ("/health", "/ready", "/metrics"):
        assert (await stack.http.get(path)).status_code == 200
    assert secret_of("aaaaaaaa") not in caplog.text


async def test_models_of_a_key(guarded):
    stack, _ = await guarded(record("aaaaaaaa", models=["other"]), record("bbbbbbbb", models=["tiny-chat"]))
    refused = await post(stack, "aaaaaaaa")
    assert refused.status_code == 403
    assert refused.json()["error"]["type"] == "permission_error"
    assert (await post(stack, "bbbbbbbb")).status_code == 200


async def test_the_file_is_read_again_when_it_changes(guarded):
    stack, path = await guarded(record("aaaaaaaa"))
    assert (await post(stack, "bbbbbbbb")).status_code == 401
    path.write_text("{broken")
    async with asyncio.timeout(10):
        await asyncio.sleep(0.6)
        assert (await post(stack, "aaaaaaaa")).status_code == 200
        write(path, record("bbbbbbbb"))
        while (await post(stack, "aaaaaaaa")).status_code != 401:
            await asyncio.sleep(0.05)
    assert (await post(stack, "bbbbbbbb")).status_code == 200


async def test_rates_and_budgets(guarded):
    stack, _ = await guarded(
        record("aaaaaaaa", requests_per_minute=2),
        record("bbbbbbbb", tokens_per_minute=20),
        record("cccccccc", budget_tokens=5),
        record("dddddddd"),
    )
    first = await post(stack, "aaaaaaaa")
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert (await post(stack, "aaaaaaaa")).status_code == 200
    refused = await post(stack, "aaaaaaaa")
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    # The answer puts the key into debt.
    assert (await post(stack, "bbbbbbbb", max_tokens=40, ignore_eos=True)).status_code == 200
    in_debt = await post(stack, "bbbbbbbb")
    assert in_debt.status_code == 429
    assert in_debt.headers["x-ratelimit-remaining-tokens"] == "0"
    assert int(in_debt.headers["retry-after"]) > 30
    assert (await post(stack, "cccccccc")).status_code == 200
    used_up = await post(stack, "cccccccc")
    assert (used_up.status_code, used_up.json()["error"]["code"]) == (429, "insufficient_quota")
    assert used_up.headers["x-should-retry"] == "false"
    assert "x-ratelimit-limit-requests" not in (await post(stack, "dddddddd")).headers


async def test_what_finds_the_queue_full_costs_the_key_nothing(guarded):
    stack, _ = await guarded(record("aaaaaaaa", requests_per_minute=9), free_slots=1, step_s=0.02, max_queue=1)
    running = asyncio.create_task(post(stack, "aaaaaaaa", max_tokens=20, ignore_eos=True))
    await stack.until_counts(running=1)
    waiting = asyncio.create_task(post(stack, "aaaaaaaa"))
    await stack.until_counts(waiting=1)
    refused = await post(stack, "aaaaaaaa")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert refused.headers["x-ratelimit-remaining-requests"] == "7"
    assert [(await task).status_code for task in (running, waiting)] == [200, 200]


async def test_a_key_that_floods_does_not_keep_another_waiting(guarded):
    stack, _ = await guarded(record("aaaaaaaa"), record("bbbbbbbb"), free_slots=1, step_s=0.01, max_queue=12)
    done = []

    async def ask(id_):
        response = await post(stack, id_)
        done.append((id_, response.status_code))

    flood = [asyncio.create_task(ask("aaaaaaaa")) for _ in range(13)]
    await stack.until_counts(waiting=12)
    # The queue is full: the flood gives way.
    await asyncio.gather(*(ask("bbbbbbbb") for _ in range(2)))
    assert [code for id_, code in done if id_ == "bbbbbbbb"] == [200, 200]
    assert sum(id_ == "aaaaaaaa" and code == 200 for id_, code in done) <= 5
    await asyncio.gather(*flood)
    assert [code for id_, code in done if id_ == "aaaaaaaa"].count(429) in (1, 2)


async def test_priority_of_a_request(guarded):
    stack, _ = await guarded(record("aaaaaaaa"), free_slots=1, step_s=0.02)
    order = []

    async def ask(name, **fields):
        assert (await post(stack, "aaaaaaaa", **fields)).status_code == 200
        order.append(name)

    tasks = [asyncio.create_task(ask("running", max_tokens=40))]
    await stack.until_counts(running=1)
    for number, (name, priority) in enumerate((("late", 5), ("normal", 0), ("early", -5))):
        tasks.append(asyncio.create_task(ask(name, priority=priority)))
        await stack.until_counts(waiting=number + 1)
    await asyncio.gather(*tasks)
    assert order == ["running", "early", "normal", "late"]


async def test_timeout_of_a_request(stack):
    await stack.engine.add("p0", step_s=0.05)
    response = await stack.http.post(
        "/v1/completions", json=BODY | {"max_tokens": 200}, headers={"x-request-timeout-s": "0.3"}
    )
    assert response.status_code == 504
    assert response.json()["error"]["code"] == response.headers["x-spotserve-reason"] == "request_timeout"
    bad = await stack.http.post("/v1/completions", json=BODY, headers={"x-request-timeout-s": "soon"})
    assert bad.status_code == 400
    assert bad.json()["error"]["param"] == "x-request-timeout-s"


async def test_reasons_of_503(make_stack):
    stack = await make_stack(no_pipeline_timeout_s=0.2)
    response = await stack.http.post("/v1/completions", json=BODY)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == response.headers["x-spotserve-reason"] == "no_pipeline"
    assert 1 <= int(response.headers["retry-after"]) <= 60


async def test_a_reader_that_stalls_is_cut(make_stack, caplog):
    stack = await make_stack(slow_reader_timeout_s=0.5, send_buffer_bytes=8192)
    await stack.engine.add("p0", step_s=0.004)
    await stack.engine.plan("p0")
    await stack.ready()
    fields = {"max_tokens": 800, "n": 8, "stream": True, "ignore_eos": True}
    body = json.dumps(BODY | fields).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", int(stack.url.rpartition(":")[2])))
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        await loop.sock_sendall(client, f"{head}\r\n\r\n".encode() + body)
        assert await loop.sock_recv(client, 12) == b"HTTP/1.1 200"
        async with asyncio.timeout(30):
            while "the client has not read for 0.5 s" not in caplog.text:
                await asyncio.sleep(0.05)
    await stack.until_counts(running=0, waiting=0)
    assert 'spotserve_stalled_readers_total{model_name="tiny-chat"} 1.0' in (await stack.http.get("/metrics")).text


async def test_a_request_under_which_pipelines_break_ends(make_stack):
    stack = await make_stack(max_broken_pipelines=2)
    for name in ("p0", "p1"):
        await stack.engine.add(name, step_s=0.02)
    await stack.engine.plan("p0")
    await stack.ready()
    asked = asyncio.create_task(stack.http.post("/v1/completions", json=BODY | {"max_tokens": 200}))
    await stack.until_counts(running=1)
    await stack.engine.plan("p1", retiring={"p0": True})
    await stack.until_counts(pipelines={"p1": 1})
    await stack.engine.plan(retiring={"p1": True})
    response = await asked
    assert response.status_code == 500
    assert "2 pipelines broke" in response.json()["error"]["message"]


def values_of(text):
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {line.partition("{")[0].partition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


async def test_metrics_here_and_on_the_admin_port(stack):
    assert (await stack.http.post("/v1/completions", json=BODY | {"ignore_eos": True})).status_code == 200
    response = await stack.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    values = values_of(response.text)
    prompt = (await stack.http.post("/tokenize", json={"prompt": "abc"})).json()["count"]
    assert values["vllm:prompt_tokens_total"] == prompt
    assert values["vllm:generation_tokens_total"] == 4
    assert values["vllm:num_requests_waiting"] == 0
    assert values["vllm:kv_cache_usage_perc"] == 0
    assert values["vllm:time_to_first_token_seconds_count"] == values["vllm:request_queue_time_seconds_count"] == 1
    assert values["vllm:request_success_total"] == values["spotserve_pipelines_ready"] == 1
    async with asyncio.timeout(10):  # the pipeline tells ten times a second how many it runs
        while values_of((await stack.http.get("/metrics")).text)["vllm:num_requests_running"]:
            await asyncio.sleep(0.02)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{stack.admin_port}") as admin:
        assert values_of((await admin.get("/metrics")).text)["vllm:generation_tokens_total"] == 4
        for path in ("/health", "/ready", "/internal/requests"):
            assert (await admin.get(path)).status_code == 200
        assert (await admin.get("/v1/models")).status_code == 404


async def test_metrics_can_be_kept_off_the_main_port(make_stack):
    stack = await make_stack(public_metrics=False)
    assert (await stack.http.get("/metrics")).status_code == 404
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{stack.admin_port}") as admin:
        assert (await admin.get("/metrics")).status_code == 200
