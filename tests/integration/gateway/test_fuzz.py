"""Bodies that no client should send: nothing of them is a 500, a hang, or an error in another shape than OpenAI's."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

MODEL = "tiny-chat"
TIMEOUT_S = 20.0
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
# The same examples in every run: what is found here is found again.
BOUNDED: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
}

SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}}
CALL = {"id": "call_123456789", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}
SAMPLING: dict[str, Any] = {
    "model": MODEL,
    "temperature": 0.5,
    "top_p": 0.5,
    "n": 2,
    "stop": ["x", "y"],
    "seed": 1,
    "stream": False,
    "min_tokens": 1,
    "top_k": 5,
    "min_p": 0.1,
    "stop_token_ids": [5],
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1},
    "priority": 1,
    "user": "u",
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        **SAMPLING,
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "hello"}], "name": "n"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_123456789", "content": "r"},
        ],
        "max_completion_tokens": 4,
        "logprobs": True,
        "top_logprobs": 2,
        "tools": [TOOL],
        "tool_choice": "auto",
        "chat_template_kwargs": {"a": 1},
    },
    "/v1/completions": {
        **SAMPLING,
        "prompt": ["a", "b"],
        "max_tokens": 4,
        "logprobs": 2,
        "echo": True,
        "best_of": 2,
        "suffix": None,
    },
    "/v1/responses": {
        "model": MODEL,
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}],
        "instructions": "i",
        "max_output_tokens": 16,
        "temperature": 0.5,
        "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}},
        "tools": [{"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}],
        "tool_choice": "auto",
        "metadata": {"a": "b"},
        "store": False,
    },
    "/tokenize": {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "add_generation_prompt": True},
    "/detokenize": {"model": MODEL, "tokens": [5, 6]},
}


@pytest.fixture(scope="module")
def client(module_stack: Any, tokenizer: Any) -> Iterator[httpx.Client]:
    """Of a gateway whose engine answers every request at once, with JSON."""
    pipeline = module_stack.engine.pipelines["p0"]
    pipeline.step_s = 0
    pipeline.script = tokenizer.encode('{"a": "b"}', add_special_tokens=False)
    with httpx.Client(base_url=module_stack.url, timeout=TIMEOUT_S) as http:
        yield http
        assert http.get("/ready").status_code == 200


def check_reply(reply: httpx.Response) -> None:
    """No server error; whatever is refused is refused in OpenAI's envelope."""
    assert reply.status_code < 500, f"{reply.status_code}: {reply.text[:500]}"
    if reply.status_code >= 400:
        error = reply.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert isinstance(error["type"], str)
        assert isinstance(error["param"], str | None)
        assert isinstance(error["code"], str | None)
        assert "Traceback" not in error["message"]


def post(client: httpx.Client, path: str, content: bytes) -> httpx.Response:
    reply = client.post(path, content=content, headers={"content-type": "application/json"})
    check_reply(reply)
    return reply


# --- the document ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_what_the_document_allows_and_what_it_does_not(client: httpx.Client, mode: GenerationMode) -> None:
    document = schemathesis.openapi.from_url(f"{str(client.base_url).rstrip('/')}/openapi.json")
    found: Any = list(document.get_all_operations())
    operations = [result.ok() for result in found]
    assert len(operations) >= 12
    if mode is GenerationMode.NEGATIVE:
        # The others take any text or nothing.
        operations = [operation for operation in operations if operation.body]
    for operation in operations:

        @settings(**BOUNDED, max_examples=25 if operation.method == "post" else 5)
        @given(case=operation.as_strategy(generation_mode=mode), is_ours=st.booleans())
        def call(case: schemathesis.Case, is_ours: bool) -> None:
            # Almost no example guesses the model's name, and without it everything is a 404.
            if is_ours and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = MODEL
            case.call_and_validate(checks=CHECKS, timeout=TIMEOUT_S)

        call()


# --- bodies ---------------------------------------------------------------------------------------------------------


def places(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of each value below `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from places(item, (*at, key))


PLACES = [(path, place) for path, body in BODIES.items() for place in places(body)]
NUMBERS = st.sampled_from(
    [*(0, -1, 1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**40), *(0.5, -0.5, 1.0, 1e308, 5e-324, -0.0)]
)
# As text: what json.dumps writes for them is not JSON, and some servers read it all the same.
RAW = st.sampled_from(
    ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", r'"\ud83d"', r'"\udc00x"', '"\\u0000"', "1" * 400]
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.text(max_size=8),
    st.sampled_from(["", "5", "null", "x" * 5000, "\x00", "\U0010ffff", "٣"]),
    st.lists(st.one_of(NUMBERS, st.text(max_size=3), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=3), st.one_of(NUMBERS, st.text(max_size=3)), max_size=3),
)
MARK = "\ue000replaced\ue000"


def replaced(body: dict[str, Any], place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    whole = copy.deepcopy(body)
    target: Any = whole
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    return whole


def test_one_odd_value(client: httpx.Client) -> None:
    """In a body that is good without it, at any place of it."""

    @settings(**BOUNDED, max_examples=250)
    @given(
        place=st.sampled_from(PLACES),
        value=st.one_of(ODD.map(json.dumps), RAW),
        stream=st.booleans(),
        is_plain=st.booleans(),
    )
    def call(place: tuple[str, tuple[str | int, ...]], value: str, stream: bool, is_plain: bool) -> None:
        path, where = place
        body = {**BODIES[path], **({"stream": True} if stream and path.startswith("/v1") else {})}
        if is_plain and where[0] != "response_format":
            body.pop("response_format", None)
        text = json.dumps(replaced(body, where, MARK)).replace(json.dumps(MARK), value)
        reply = post(client, path, text.encode())
        if value in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999"):
            assert reply.status_code == 400, text

    call()


def test_arbitrary_bytes(client: httpx.Client) -> None:
    """Cut, overwritten and doubled bodies, and noise."""

    @settings(**BOUNDED, max_examples=100)
    @given(
        path=st.sampled_from(list(BODIES)),
        start=st.integers(0, 400),
        noise=st.one_of(st.binary(max_size=20), st.sampled_from([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x00", b'"'])),
        num_dropped=st.integers(0, 30),
    )
    def call(path: str, start: int, noise: bytes, num_dropped: int) -> None:
        whole = json.dumps(BODIES[path]).encode()
        post(client, path, whole[:start] + noise + whole[start + num_dropped :])

    call()


DEEP = 100_000
HOPELESS = {
    "empty": b"",
    "no object": b"[]",
    "a string": b'"x"',
    "null": b"null",
    "cut": b'{"model": "tiny-chat", "prom',
    "two": b"{} {}",
    "byte order mark": b'\xef\xbb\xbf{"model": "tiny-chat"}',
    "UTF-16": '{"model": "tiny-chat"}'.encode("utf-16"),
    "deep lists": b"[" * DEEP,
    "deep lists that end": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep inside a field that is ignored": b'{"model": "tiny-chat", "user": ' + b"[" * DEEP + b"]" * DEEP + b"}",
}


@pytest.mark.parametrize("content", HOPELESS.values(), ids=HOPELESS.keys())
def test_no_body_at_all(client: httpx.Client, content: bytes) -> None:
    for path in BODIES:
        assert post(client, path, content).status_code == 400


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "text", [b"a\xff", b"\xc3(", b"\xed\xa0\xbd", b"\xf5\x80\x80\x80", rb"\ud83d", rb"\udc00\ud83d"], ids=repr
)
def test_text_that_is_none(client: httpx.Client, path: str, text: bytes) -> None:
    """Bytes that are not UTF-8, and halves of surrogate pairs, where text is wanted."""
    body = {**BODIES[path], "prompt": MARK} if path == "/v1/completions" else BODIES[path]
    mark = json.dumps(MARK).encode()
    content = json.dumps({**body, "model": MARK}).encode().replace(mark, b'"' + text + b'"')
    assert post(client, path, content).status_code in (400, 404)
    content = json.dumps(body).encode().replace(b'"hello"', b'"' + text + b'"').replace(mark, b'"' + text + b'"')
    reply = post(client, path, content)
    if b"\\u" not in text and path != "/detokenize":
        assert reply.status_code == 400


@pytest.mark.parametrize("depth", [50, 400, 900])
@pytest.mark.parametrize("where", ["response_format", "tools", "chat_template_kwargs", "content", "arguments"])
def test_deep_values(client: httpx.Client, depth: int, where: str) -> None:
    """Deep enough for a recursive walk to fail, shallow enough for the decoder."""
    body = copy.deepcopy(BODIES["/v1/chat/completions"])
    match where:
        case "response_format":
            body["response_format"]["json_schema"]["schema"] = MARK
        case "tools":
            body["tools"][0]["function"]["parameters"] = MARK
        case "chat_template_kwargs":
            body["chat_template_kwargs"] = MARK
        case "content":
            body["messages"][1]["content"] = [MARK]
        case _:
            body["messages"][2]["tool_calls"][0]["function"]["arguments"] = "[" * depth * 100
    opening, closing = '{"type": "object", "properties": {"a": ', "}}"
    deep = opening * depth + '{"type": "string"}' + closing * depth
    post(client, "/v1/chat/completions", json.dumps(body).replace(json.dumps(MARK), deep).encode())


@pytest.mark.parametrize("path", BODIES)
def test_ten_megabytes(client: httpx.Client, path: str) -> None:
    body = {**BODIES[path], "messages" if "chat" in path else "prompt": "x" * 10_000_000, "input": "x", "user": "y"}
    assert post(client, path, json.dumps(body).encode()).status_code == 413


@pytest.mark.parametrize(
    ("path", "field"),
    [("/v1/completions", "prompt"), ("/v1/responses", "input"), ("/tokenize", "prompt"), ("/v1/completions", "stop")],
)
@pytest.mark.parametrize("unit", ["x", "é", "[1],", '"a",', "1,"])
def test_long_values_below_the_limit_of_the_body(client: httpx.Client, path: str, field: str, unit: str) -> None:
    text = unit * (1_000_000 // len(unit.encode()))
    value = json.dumps(text) if unit in ("x", "é") else f"[{text[:-1]}]"
    body = {**BODIES[path], field: MARK}
    reply = post(client, path, json.dumps(body).replace(json.dumps(MARK), value).encode())
    assert reply.status_code in (400, 413) or path == "/tokenize"


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": ""},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "application/json", "x-request-id": "x" * 5000},
        {"content-type": "application/json", "traceparent": "00-zz-zz-01"},
        {"content-type": "application/json", "authorization": "Bearer \xff"},
    ],
    ids=str,
)
def test_odd_headers(client: httpx.Client, headers: dict[str, str]) -> None:
    encoded = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
    reply = client.post("/v1/completions", content=b'{"model": "tiny-chat", "prompt": "a"}', headers=encoded)
    check_reply(reply)
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/v1/responses/%00", "/v1/models/%ff", "/v1/responses/..%2f..", "/v1/" + "a" * 5000])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PUT", "PATCH", "OPTIONS"])
def test_odd_paths(client: httpx.Client, path: str, method: str) -> None:
    check_reply(client.request(method, path))
