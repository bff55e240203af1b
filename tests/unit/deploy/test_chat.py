"""A conversation against canned responses of the gateway."""

from __future__ import annotations

import json

import httpx
import pytest

from deploy.chat import Conversation
from deploy.errors import CommandError

STREAM = (
    'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n'
    ": keep-alive\n\n"
    'data: {"choices": [{"delta": {"content": "Hel"}}]}\n\n'
    'data: {"choices": [{"delta": {"content": "lo"}}]}\n\n'
    'data: {"choices": [], "usage": {}}\n\ndata: [DONE]\n\n'
)


def conversation(*responses: httpx.Response, **options: object) -> tuple[Conversation, list[dict[str, object]]]:
    bodies: list[dict[str, object]] = []
    queue = list(responses)

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return queue.pop(0)

    client = httpx.Client(base_url="http://gateway", transport=httpx.MockTransport(answer))
    return Conversation(client, "tiny", **options), bodies  # type: ignore[arg-type]  # options are passed through


def test_an_answer_is_streamed_and_joins_the_history() -> None:
    chat, bodies = conversation(
        httpx.Response(200, text=STREAM), httpx.Response(200, text=STREAM), system="Be brief.", max_tokens=5
    )
    assert list(chat.ask("Hi")) == ["Hel", "lo"]
    assert list(chat.ask("Again")) == ["Hel", "lo"]
    assert bodies[1] == {
        "model": "tiny",
        "max_tokens": 5,
        "stream": True,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Again"},
        ],
    }


def test_an_answer_cut_short_stays_as_far_as_it_came() -> None:
    chat, _ = conversation(httpx.Response(200, text=STREAM))
    answer = chat.ask("Hi")
    assert next(answer) == "Hel"
    answer.close()  # type: ignore[attr-defined]  # it is a generator
    assert chat.messages[-1] == {"role": "assistant", "content": "Hel"}


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (httpx.Response(429, json={"error": {"message": "the queue is full"}}), r"the queue is full \(HTTP 429\)"),
        (httpx.Response(502, text="bad"), "HTTP 502"),
        (httpx.Response(200, text='data: {"error": {"message": "no capacity"}}\n\n'), "no capacity"),
    ],
)
def test_an_error_is_said_and_the_question_forgotten(response: httpx.Response, message: str) -> None:
    chat, _ = conversation(response)
    with pytest.raises(CommandError, match=message):
        list(chat.ask("Hi"))
    assert chat.messages == []
