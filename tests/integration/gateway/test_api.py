"""The HTTP API with the official SDK and with raw bytes."""

import asyncio
import contextlib
import gc
import json

import httpx
import openai
import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from engine.protocol import RejectReason
from gateway.services.answer import Answer, EventStream
from gateway.services.generation import Generation

HELLO = [{"role": "user", "content": "hello"}]


async def test_chat_equals_decoded_log(stack, tokenizer, expected):
    answer = await stack.sdk.chat.completions.create(
        model="tiny-chat", messages=HELLO, max_tokens=12, seed=5, temperature=0
    )
    request = stack.engine.pipelines["p0"].submitted[0]
    ids = expected(request)
    assert answer.choices[0].message.content == tokenizer.decode(ids)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == len(request.prompt_ids)
    assert tokenizer.decode(request.prompt_ids) == "user\nhello\nassistant\n"
    assert request.sampling.seed == 5
    assert request.sampling.eos_token_ids == [1]
    assert answer.model == "tiny-chat"
    assert answer.id.startswith("chatcmpl-")


async def test_stream_equals_body(stack):
    arguments = {"model": "tiny-chat", "messages": HELLO, "max_tokens": 40, "seed": 3}
    whole = await stack.sdk.chat.completions.create(**arguments)
    stream = await stack.sdk.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answered_request_leaves_nothing_to_the_garbage_collector(stack, stream):
    """A collection stops all streams for milliseconds, so that requests must go by themselves when they are done."""
    body = {"model": "tiny-chat", "messages": HELLO, "max_tokens": 4, "stream": stream}

    async def ask():
        assert (await stack.http.post("/v1/chat/completions", json=body)).status_code == 200

    await ask()
    gc.collect()
    num_before = _num_left(Answer, EventStream, Generation, RequestResponseCycle)  # the connection holds its last one
    gc.disable()
    try:
        for _ in range(4):
            await ask()
        async with asyncio.timeout(10):
            while _num_left(Answer, EventStream, Generation, RequestResponseCycle) != num_before:
                await asyncio.sleep(0.01)
    finally:
        gc.enable()


def _num_left(*types):
    kinds = [type(one) for one in gc.get_objects()]
    return [kinds.count(kind) for kind in types]


def test_sync_sdk(sync_stack):
    client, _ = sync_stack
    answer = client.chat.completions.create(model="tiny-chat", messages=HELLO, max_tokens=8, seed=1)
    stream = client.completions.create(model="tiny-chat", prompt="abc", max_tokens=8, seed=1, stream=True)
    text = "".join(chunk.choices[0].text for chunk in stream)
    whole = client.completions.create(model="tiny-chat", prompt="abc", max_tokens=8, seed=1)
    assert answer.choices[0].message.content
    assert text == whole.choices[0].text
    assert client.models.list().data[0].id == "tiny-chat"
    assert client.models.retrieve("tiny-chat").id == "tiny-chat"


async def test_raw_framing(stack):
    body = {"model": "tiny-chat", "messages": HELLO, "max_tokens": 5, "stream": True}
    response = await stack.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in response.headers
    assert b"\r" not in response.content
    events = response.content.split(b"\n\n")
    assert events[-1] == b""
    assert events[-2] == b"data: [DONE]"
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events[:-2]]
    assert all(event.startswith(b"data: {") for event in events[:-2])
    assert chunks[0]["choices"][0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert all("usage" not in chunk for chunk in chunks)


async def test_return_token_ids(stack, expected):
    body = {"model": "tiny-chat", "messages": HELLO, "max_tokens": 20, "seed": 9, "return_token_ids": True}
    whole = (await stack.http.post("/v1/chat/completions", json=body)).json()
    request = stack.engine.pipelines["p0"].submitted[0]
    assert whole["choices"][0]["token_ids"] == expected(request)
    assert whole["prompt_token_ids"] == request.prompt_ids
    stream = await stack.http.post("/v1/chat/completions", json={**body, "stream": True})
    chunks = [json.loads(e[6:]) for e in stream.content.split(b"\n\n")[:-2]]
    assert [i for c in chunks for i in c["choices"][0]["token_ids"]] == expected(request)
    assert chunks[0]["prompt_token_ids"] == request.prompt_ids
    assert all("prompt_token_ids" not in c for c in chunks[1:])


async def test_completion_prompts_and_samples(stack, expected, tokenizer):
    answer = await stack.sdk.completions.create(model="tiny-chat", prompt=[[10, 11], [12]], max_tokens=6, n=2, seed=4)
    requests = sorted(stack.engine.pipelines["p0"].submitted, key=lambda r: r.request_id)
    assert [(r.prompt_ids, r.choice) for r in requests] == [([10, 11], 0), ([10, 11], 1), ([12], 0), ([12], 1)]
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert [c.text for c in answer.choices] == [tokenizer.decode(expected(r)) for r in requests]
    assert len({c.text for c in answer.choices}) == 4
    assert answer.usage.prompt_tokens == 3
    assert answer.usage.completion_tokens == 24


async def test_stop_string_ends_and_cancels(stack, expected, tokenizer):
    arguments = {"model": "tiny-chat", "prompt": "abc", "max_tokens": 100, "seed": 2}
    text = (await stack.sdk.completions.create(**arguments)).choices[0].text
    start = next(i for i in range(10, len(text)) if "\ufffd" not in text[i : i + 3] and text.find(text[i : i + 3]) == i)
    answer = await stack.sdk.completions.create(**arguments, stop=text[start : start + 3])
    assert answer.choices[0].text == text[:start]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 100
    pipeline = stack.engine.pipelines["p0"]
    async with asyncio.timeout(5):
        while pipeline.submitted[1].request_id not in pipeline.cancelled:
            await asyncio.sleep(0.01)


async def test_end_of_sequence(stack, tokenizer, expected):
    stack.engine.pipelines["p0"].eos_at = 4
    answer = await stack.sdk.completions.create(model="tiny-chat", prompt="abc", max_tokens=10, seed=2)
    request = stack.engine.pipelines["p0"].submitted[0]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == tokenizer.decode(expected(request)[:4])
    assert answer.usage.completion_tokens == 5


@pytest.mark.parametrize("stream", [False, True])
async def test_bad_field_is_a_plain_error(stack, stream):
    body = {"model": "tiny-chat", "messages": HELLO, "temperature": 3, "stream": stream}
    response = await stack.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "temperature"
    assert response.headers["content-type"] == "application/json"
    refused = {**body, "temperature": 1, "messages": [{"role": "assistant", "content": "x", "name": "y"}]}
    assert (await stack.http.post("/v1/chat/completions", json={**refused, "max_tokens": 1})).status_code == 200
    assert len(stack.engine.pipelines["p0"].submitted) == 1


async def test_neutral_and_unknown_fields_are_accepted(stack):
    body = {
        "model": "tiny-chat",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        "max_tokens": 2,
        "max_completion_tokens": 3,
        "temperature": None,
        "stop": None,
        "n": 1,
        "logprobs": False,
        "top_logprobs": 0,
        "tools": None,
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "modalities": ["text"],
        "user": "u",
        "metadata": {"a": 1},
        "service_tier": "auto",
        "never_heard_of": [1, {"x": None}],
    }
    response = await stack.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 3


async def test_framework_errors_have_the_envelope(stack):
    unknown = await stack.http.get("/v1/embeddings")
    method = await stack.http.get("/v1/chat/completions")
    media = await stack.http.post("/v1/completions", content=b"x=1", headers={"content-type": "text/plain"})
    large = await stack.http.post(
        "/v1/completions", content=b" " * (9 << 20), headers={"content-type": "application/json"}
    )
    model = await stack.http.post("/v1/completions", json={"model": "no/such", "prompt": "x"})
    lookup = await stack.http.get("/v1/models/no%2Fsuch")
    got = [(r.status_code, r.json()["error"]["code"]) for r in (unknown, method, media, large, model, lookup)]
    assert got == [
        (404, "unknown_url"),
        (405, None),
        (415, None),
        (413, None),
        (404, "model_not_found"),
        (404, "model_not_found"),
    ]
    assert "POST" in method.headers["allow"]
    packed = await stack.http.post(
        "/v1/completions", content=b"{}", headers={"content-type": "application/json", "content-encoding": "gzip"}
    )
    assert packed.status_code == 415
    assert "gzip" in packed.json()["error"]["message"]
    assert all(set(r.json()["error"]) == {"message", "type", "param", "code"} for r in (unknown, large))
    assert all(r.headers["x-request-id"] for r in (unknown, method, media, large))


async def test_request_id_is_echoed(stack):
    response = await stack.http.get("/health", headers={"x-request-id": "abc-1"})
    too_long = await stack.http.get("/health", headers={"x-request-id": "a" * 200})
    assert response.headers["x-request-id"] == "abc-1"
    assert too_long.headers["x-request-id"] != "a" * 200


async def test_context_length(stack):
    prompt = list(range(10, 210))
    with pytest.raises(openai.BadRequestError) as caught:
        await stack.sdk.completions.create(model="tiny-chat", prompt=prompt, max_tokens=900)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    assert "1024" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        await stack.sdk.chat.completions.create(
            model="tiny-chat", messages=[{"role": "user", "content": "\u0416" * 600}], stream=True
        )
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


async def test_engine_refusals_are_client_errors(stack):
    pipeline = stack.engine.pipelines["p0"]
    pipeline.refuse_with = [RejectReason.TOO_LONG]
    with pytest.raises(openai.BadRequestError) as caught:
        await stack.sdk.completions.create(model="tiny-chat", prompt="abc")
    assert caught.value.code == "context_length_exceeded"
    pipeline.refuse_with = [RejectReason.FULL, RejectReason.NOT_LEADER, RejectReason.DRAINING]
    answer = await stack.sdk.completions.create(model="tiny-chat", prompt="abc")
    assert answer.usage.completion_tokens == 16


async def test_models_and_health(stack):
    models = (await stack.http.get("/v1/models")).json()
    assert models["object"] == "list"
    assert models["data"][0]["max_model_len"] == 1024
    assert (await stack.http.get("/health")).status_code == 200
    for path in ("/health", "/ready"):
        head = await stack.http.head(path)
        assert (head.status_code, head.content) == (200, b"")
    stack.engine.pipelines["p0"].ready = False
    async with asyncio.timeout(5):
        while (response := await stack.http.get("/ready")).status_code == 200:
            await asyncio.sleep(0.02)
    assert response.status_code == 503
    assert "ready" in response.json()["reason"]


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_cancels(stack, stream):
    pipeline = stack.engine.pipelines["p0"]
    body = {"model": "tiny-chat", "messages": HELLO, "max_tokens": 200, "stream": stream, "seed": 1}
    pipeline.step_s = 0.05
    async with httpx.AsyncClient(base_url=stack.url) as client:
        with contextlib.suppress(httpx.ReadTimeout):
            async with client.stream("POST", "/v1/chat/completions", json=body, timeout=0.3) as response:
                await anext(response.aiter_bytes())
    async with asyncio.timeout(5):
        while not pipeline.cancelled:
            await asyncio.sleep(0.01)
    assert pipeline.cancelled == [pipeline.submitted[0].request_id]


async def test_plan_is_read_from_the_bucket(make_stack):
    stack = await make_stack()
    await stack.engine.add("p0")
    await stack.engine.plan("p0", store=True)
    await stack.ready()


async def test_logprobs_of_stream_and_body(stack, expected):
    body = {"model": "tiny-chat", "prompt": "abc", "max_tokens": 12, "seed": 3, "logprobs": 2}
    whole = await stack.sdk.completions.create(**body)
    parts = [c.choices[0] async for c in await stack.sdk.completions.create(**body, stream=True)]
    logprobs = whole.choices[0].logprobs
    assert "".join(part.text for part in parts) == whole.choices[0].text
    assert [x for part in parts if part.logprobs for x in part.logprobs.token_logprobs] == logprobs.token_logprobs
    ids = expected(stack.engine.pipelines["p0"].submitted[0])
    assert logprobs.token_logprobs == [pytest.approx(-0.01 * (i % 7)) for i in ids]
    assert logprobs.text_offset[0] == 0


async def test_chat_logprobs(stack):
    chat = await stack.sdk.chat.completions.create(
        model="tiny-chat", messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 5
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    text = b"".join(bytes(entry.bytes) for entry in content).decode("utf-8", "replace")
    assert text == chat.choices[0].message.content


@pytest.mark.parametrize("prompt", ["abc d", [5, 6, 7]])
async def test_echo_scores_the_prompt(stack, tokenizer, prompt):
    body = {"model": "tiny-chat", "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}
    choice = (await stack.sdk.completions.create(**body)).choices[0]
    assert choice.text == (prompt if isinstance(prompt, str) else tokenizer.decode(prompt))
    assert choice.logprobs.token_logprobs[0] is None
    assert all(isinstance(logprob, float) for logprob in choice.logprobs.token_logprobs[1:])
    assert choice.finish_reason == "length"
    plain = {**body, "logprobs": None}
    assert (await stack.sdk.completions.create(**plain)).choices[0].text == choice.text
    longer = (await stack.sdk.completions.create(**{**body, "max_tokens": 4})).choices[0]
    assert longer.text.startswith(choice.text)
    assert len(longer.logprobs.tokens) == len(choice.logprobs.tokens) + 4


async def test_best_of_answers_the_likeliest(stack, expected):
    body = {"model": "tiny-chat", "prompt": ["a", "b"], "max_tokens": 4, "n": 1, "best_of": 3}
    answer = await stack.sdk.completions.create(**body, extra_body={"return_token_ids": True})

    def mean(ids):
        return sum(-0.01 * (i % 7) for i in ids) / len(ids)

    submitted = stack.engine.pipelines["p0"].submitted
    for index, choice in enumerate(answer.choices):
        prompt_ids = choice.model_extra["prompt_token_ids"]
        drawn = [expected(r) for r in submitted if r.prompt_ids == prompt_ids]
        assert len(drawn) == 3
        assert choice.index == index
        assert mean(choice.model_extra["token_ids"]) == pytest.approx(max(map(mean, drawn)))
        assert choice.logprobs is None
    assert answer.usage.completion_tokens == 2 * 3 * 4


async def test_prompt_logprobs(stack):
    reply = await stack.http.post(
        "/v1/completions", json={"model": "tiny-chat", "prompt": [5, 6], "max_tokens": 2, "prompt_logprobs": 0}
    )
    first, second = reply.json()["choices"][0]["prompt_logprobs"]
    assert first is None
    assert second["6"]["rank"] == 1


async def test_tokenize_and_back(stack, tokenizer):
    reply = (await stack.http.post("/tokenize", json={"prompt": "hello world", "return_token_strs": True})).json()
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
    assert reply["max_model_len"] == 1024
    back = (await stack.http.post("/detokenize", json={"model": "tiny-chat", "tokens": reply["tokens"]})).json()
    assert back == {"prompt": "hello world"}
    assert (await stack.http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}
    chat = await stack.sdk.chat.completions.create(model="tiny-chat", messages=HELLO, max_tokens=1)
    counted = (await stack.http.post("/tokenize", json={"messages": HELLO})).json()
    assert counted["count"] == chat.usage.prompt_tokens
    assert "version" in (await stack.http.get("/version")).json()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"model": "other", "prompt": "a"}, "model"),
        ("/tokenize", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ("/detokenize", {"tokens": [100_000]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
async def test_bad_tokenize(stack, path, body, param):
    reply = await stack.http.post(path, json=body)
    assert reply.status_code in (400, 404)
    assert reply.json()["error"]["param"] == param


async def test_openapi_document(stack):
    document = (await stack.http.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.")
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = document["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    assert {"model", "messages"} <= set(schema["required"])
    assert "/openapi.json" in (await stack.http.get("/docs")).text
