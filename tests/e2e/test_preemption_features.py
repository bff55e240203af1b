"""Preemption in the middle of everything that an answer can be: the result is that of an undisturbed run, exactly.

One pipeline of three stages, so that whatever happens interrupts all requests at once; float32 and `--reduction fixed`,
so that every shape computes the same bits. Texts, token ids, logprobs, calls, finish reasons and usage are compared.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.stack import Session, Stack
from tests.tiny_model import make_tiny_model

MODEL = "tiny"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MAX_EVENTS = 4
NUM_BEFORE = 40
"""Tokens before the event: enough to be in the middle, few enough to be still there when the pipeline stops."""
NOTICE_S = 2.5
"""A pipeline under notice stops two seconds before the end, so half a second after this one."""
COLOURS = {"type": "string", "enum": ["red", "green", "blue", "white"]}
LIST = {"type": "array", "items": COLOURS, "minItems": 12, "maxItems": 14}
OBJECT = {"type": "object", "properties": {"a": LIST}, "required": ["a"], "additionalProperties": False}
HELLO = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": OBJECT, "strict": True}}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": OBJECT, "strict": True}}
STOP_START, STOP_LENGTH = 12, 110


@dataclass
class Request:
    path: str
    body: dict[str, Any]
    num_choices: int = 1

    @property
    def whole_body(self) -> dict[str, Any]:
        options = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
        return {"model": MODEL, "seed": 11, **options, **self.body}

    def wire_ids(self, answer_id: str) -> list[str]:
        """What its choices are called towards the engine."""
        return [answer_id] if self.num_choices == 1 else [f"{answer_id}-{i}" for i in range(self.num_choices)]


REQUESTS = {
    "json": Request(CHAT, {"messages": HELLO, "response_format": SCHEMA}),
    "tool": Request(CHAT, {"messages": HELLO, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}),
    "n": Request(COMPLETIONS, {"prompt": "three of them", "n": 3, "max_tokens": 130, "logprobs": 2}, num_choices=3),
    "logprobs": Request(
        CHAT, {"messages": HELLO, "max_tokens": 130, "logprobs": True, "top_logprobs": 3, "min_p": 0.02}
    ),
    "penalties": Request(
        COMPLETIONS,
        {
            "prompt": "again and again",
            "max_tokens": 130,
            "temperature": 0,
            "logit_bias": {"40": 3, "41": -100},
            "presence_penalty": 0.4,
            "frequency_penalty": 0.3,
            "repetition_penalty": 1.1,
        },
    ),
    "echo": Request(
        COMPLETIONS, {"prompt": "an echo, café", "echo": True, "logprobs": 1, "max_tokens": 130, "top_k": 50}
    ),
    "plain": Request(COMPLETIONS, {"prompt": "stop", "max_tokens": 150, "ignore_eos": True}),
}


@dataclass
class Choice:
    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    calls: dict[int, list[str]] = field(default_factory=dict)
    """[name, arguments] by index."""
    finish_reasons: list[str] = field(default_factory=list)


@dataclass
class Result:
    """What a client makes of a stream. Ids and times of the answer are left out, and what the cache did."""

    choices: dict[int, Choice] = field(default_factory=lambda: defaultdict(Choice))
    usage: list[int] = field(default_factory=list)

    def take(self, chunk: dict[str, Any]) -> None:
        for given in chunk["choices"]:
            choice = self.choices[given["index"]]
            delta = given.get("delta", given)
            choice.text += delta.get("content") or delta.get("text") or ""
            choice.ids += given.get("token_ids") or []
            for name, values in (given["logprobs"] or {}).items():
                choice.logprobs[name] += values or []
            for call in delta.get("tool_calls") or []:
                known = choice.calls.setdefault(call["index"], ["", ""])
                known[0] += call["function"].get("name") or ""
                known[1] += call["function"].get("arguments") or ""
            choice.finish_reasons += [given["finish_reason"]] if given["finish_reason"] else []
        usage = chunk.get("usage")
        if usage:
            self.usage = [usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")]


async def stream(session: Session, request: Request, began: asyncio.Event) -> tuple[str, Result]:
    """(the answer's id, what came); `began` is set when some tokens are there."""
    result, answer_id = Result(), ""
    try:
        async with session.http.stream("POST", request.path, json=request.whole_body) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    chunk = json.loads(line.removeprefix("data: "))
                    assert "error" not in chunk, chunk
                    answer_id = chunk["id"]
                    result.take(chunk)
                    # A stop string holds chunks back; all are decoded in the same steps.
                    if "stop" in request.body or len(result.choices[0].ids) >= NUM_BEFORE:
                        began.set()
    finally:
        began.set()
    return answer_id, result


class Shared:
    """The stack, and what its requests answer undisturbed."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._expected: dict[str, Result] = {}
        self.requests = dict(REQUESTS)

    async def expected(self, session: Session) -> dict[str, Result]:
        if not self._expected:
            await self._run(session, REQUESTS)
            self._add_stops(self._expected["plain"].choices[0].text)
            await self._run(session, {name: self.requests[name] for name in ("stop", "no stop")})
        return self._expected

    async def _run(self, session: Session, requests: dict[str, Request]) -> None:
        answers = await asyncio.gather(*(stream(session, request, asyncio.Event()) for request in requests.values()))
        self._expected |= {name: result for name, (_, result) in zip(requests, answers, strict=True)}

    def _add_stops(self, text: str) -> None:
        """A stop string nearly as long as the text, so that a seam is in the middle of it; and one that never ends."""
        body, stop = REQUESTS["plain"].body, text[STOP_START : STOP_START + STOP_LENGTH]
        self.requests["stop"] = Request(COMPLETIONS, {**body, "stop": [stop]})
        self.requests["no stop"] = Request(COMPLETIONS, {**body, "stop": [stop + "no such end"]})
        del self.requests["plain"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    directory: Path = tmp_path_factory.mktemp("features")
    model = make_tiny_model(directory / MODEL, layers=3)
    shape = ("--pipelines", "1", "--stages", "3", "--tensor", "1")
    # For a model this small the cost model would compute the KV again, and nothing would be pulled.
    environ = {"SPOTSERVE_UP_RESTART_DELAY_S": "5", "SPOTSERVE_ENGINE_KV_TRANSFER": "always"}
    stack = Stack(directory / "state", model, *shape, "--reduction", "fixed", "--dtype", "float32", environ=environ)
    stack.start()
    yield Shared(stack)
    stack.stop()


@pytest.fixture
async def session(shared: Shared) -> AsyncIterator[Session]:
    async with Session(shared.stack) as session:
        await session.restore(3)
        yield session
        await session.settled()


async def test_undisturbed_answers_are_what_was_asked_for(shared: Shared, session: Session) -> None:
    """Without this, two equal answers would say little."""
    expected = await shared.expected(session)
    assert len(json.loads(expected["json"].choices[0].text)["a"]) in range(12, 15)
    assert expected["json"].choices[0].finish_reasons == ["stop"]
    [(name, arguments)] = expected["tool"].choices[0].calls.values()
    assert name == "f"
    assert len(json.loads(arguments)["a"]) in range(12, 15)
    assert expected["tool"].choices[0].finish_reasons == ["tool_calls"]
    assert len({tuple(choice.ids) for choice in expected["n"].choices.values()}) == 3
    assert all(len(c.logprobs["tokens"]) > 100 for c in expected["n"].choices.values())
    assert len(expected["logprobs"].choices[0].logprobs["content"]) > 100
    assert 41 not in expected["penalties"].choices[0].ids
    assert expected["echo"].choices[0].text.startswith("an echo, café")
    assert expected["echo"].choices[0].logprobs["token_logprobs"][0] is None
    plain = expected["plain"].choices[0]
    assert expected["stop"].choices[0].text == plain.text[:STOP_START]
    assert expected["stop"].choices[0].finish_reasons == ["stop"]
    assert 100 < len(expected["stop"].choices[0].ids) < len(plain.ids)
    assert expected["no stop"].choices[0] == plain


@pytest.mark.parametrize("notice_s", [NOTICE_S, None], ids=["notice", "kill"])
async def test_interrupted_answers_are_the_same(shared: Shared, session: Session, notice_s: float | None) -> None:
    """All at once, in rounds of one event each, until each was interrupted in the middle."""
    expected = await shared.expected(session)
    missing = set(shared.requests)
    for _ in range(MAX_EVENTS):
        began = [asyncio.Event() for _ in shared.requests]
        answers = asyncio.gather(*map(partial(stream, session), shared.requests.values(), began))
        await asyncio.gather(*(event.wait() for event in began))
        victim = (await session.ready_instances())[-1]
        await (session.kill(victim) if notice_s is None else session.preempt(victim, notice_s))
        for name, request, (answer_id, result) in zip(
            shared.requests, shared.requests.values(), await answers, strict=True
        ):
            assert result == expected[name], name
            # Beyond a quarter of it, the text of "stop" is held back.
            earliest = len(expected["stop"].choices[0].ids) // 4 if "stop" in name else 1
            if all(session.seams.get(wire_id, 0) >= earliest for wire_id in request.wire_ids(answer_id)):
                missing.discard(name)
        if not missing:
            break
        await session.until_gone(victim)
        await session.restore(3)
    assert not missing, f"never interrupted in the middle: {missing}"
