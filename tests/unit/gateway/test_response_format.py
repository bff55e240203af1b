"""Chunks and bodies."""

import json

import pytest

from gateway.core import sse
from gateway.core.fold import Delta
from gateway.core.response_format import ChatFormat, CompletionFormat, Usage

DELTAS = [Delta("", [5]), Delta("he\u2028y\n", [6, 7]), Delta("!", [8], "length")]
WHOLE = Delta("he\u2028y\n!", [5, 6, 7, 8], "length")
USAGE = Usage(3, 4, 2)


def make(format_class, *, with_token_ids=False):
    return format_class("id-1", 1700000000, "m", [[1, 2, 3], [4]], with_token_ids=with_token_ids)


@pytest.mark.parametrize("with_token_ids", [False, True])
@pytest.mark.parametrize("format_class", [ChatFormat, CompletionFormat])
def test_chunks_add_up_to_the_body(format_class, with_token_ids):
    stream = make(format_class, with_token_ids=with_token_ids)
    choices = [chunk["choices"][0] for delta in DELTAS for chunk in stream.chunks(0, delta)]
    whole = make(format_class, with_token_ids=with_token_ids).body([WHOLE], USAGE)["choices"][0]
    texts = [c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices]
    assert "".join(texts) == whole.get("text", whole.get("message", {}).get("content"))
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]
    assert ("token_ids" in whole) == with_token_ids
    if with_token_ids:
        assert [i for c in choices for i in c["token_ids"]] == whole["token_ids"] == WHOLE.token_ids


def test_chat_chunks():
    stream = make(ChatFormat)
    deltas = [chunk["choices"][0]["delta"] for delta in DELTAS for chunk in stream.chunks(1, delta)]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "he\u2028y\n"}, {"content": "!"}, {}]


def test_prompt_ids_come_once():
    chat = make(ChatFormat, with_token_ids=True)
    chunks = [c for index in (0, 1) for delta in DELTAS for c in chat.chunks(index, delta)]
    assert [c.get("prompt_token_ids") for c in chunks] == [[1, 2, 3]] + [None] * (len(chunks) - 1)
    completion = make(CompletionFormat, with_token_ids=True)
    choices = [c["choices"][0] for index in (0, 1) for d in DELTAS for c in completion.chunks(index, d)]
    assert [c["prompt_token_ids"] for c in choices if "prompt_token_ids" in c] == [[1, 2, 3], [4]]


def test_empty_answer_is_an_empty_string():
    body = make(ChatFormat).body([Delta("", [0], "stop")], USAGE)
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "", "refusal": None}
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_usage_chunk_has_no_choices():
    chunk = make(ChatFormat).usage_chunk(USAGE)
    assert (chunk["choices"], chunk["object"]) == ([], "chat.completion.chunk")


def test_event_is_one_line():
    data = sse.event({"text": "a\r\nb\u2028\u00e9"})
    assert data.startswith(b"data: {")
    assert data.endswith(b"}\n\n")
    assert data.count(b"\n") == 2
    assert b"\r" not in data
    assert json.loads(data[6:]) == {"text": "a\r\nb\u2028\u00e9"}
