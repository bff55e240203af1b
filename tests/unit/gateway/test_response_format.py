"""Chunks and bodies."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import TokenLogprobs
from gateway.core import sse
from gateway.core.fold import ChoiceFold, Delta, merge
from gateway.core.parsing import ToolCallDelta
from gateway.core.response_format import ChatFormat, CompletionFormat, Extras, Header, Usage

DELTAS = [Delta("", [5]), Delta("he\u2028y\n", [6, 7]), Delta("!", [8], "length")]
WHOLE = Delta("he\u2028y\n!", [5, 6, 7, 8], "length")
USAGE = Usage(3, 4, 2)


class Texts:
    """A token is one letter; 26 and above are the single bytes of a character of three."""

    def decode(self, ids):
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def is_special(self, token_id):
        return False

    def is_byte(self, token_id):
        return False

    def whole_text(self, token_id):
        return None

    def token_bytes(self, token_id):
        return "\u2028".encode()[token_id - 26 : token_id - 25] if token_id >= 26 else bytes([97 + token_id])


HEADER = Header(id="id-1", created=1700000000, model="m", system_fingerprint="fp")


def make(format_class, *, with_token_ids=False, **extras):
    return format_class(HEADER, [[1, 2, 3], [4]], Extras(token_ids=with_token_ids, **extras), Texts())


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
        "completion_tokens_details": {"reasoning_tokens": 0},
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


def score(token_id, logprob=-0.5, rank=1, top=()):
    return TokenLogprobs(logprob, rank, [i for i, _ in top], [p for _, p in top])


def fold(ids, stops=(), **options):
    """The deltas of a log of one token a step."""
    choice = ChoiceFold(Texts(), stops, **options)
    deltas = []
    for number, token_id in enumerate(ids):
        finish = "length" if number == len(ids) - 1 else None
        logprobs = score(token_id, -0.1 * number, 1, [(token_id, -0.1 * number), (0, float("-inf"))])
        deltas.append(choice.push([token_id], finish, [logprobs]))
    return deltas


IDS = [7, 4, 26, 27, 28, 11]


@pytest.mark.parametrize("format_class", [ChatFormat, CompletionFormat])
def test_logprobs_of_the_stream_are_those_of_the_body(format_class):
    deltas = fold(IDS)
    stream, whole = make(format_class, top_logprobs=2), make(format_class, top_logprobs=2)
    choices = [chunk["choices"][0] for delta in deltas for chunk in stream.chunks(0, delta)]
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    expected = whole.body([merge(deltas)], USAGE)["choices"][0]["logprobs"]
    for key in expected:
        if expected[key] is not None:
            assert [entry for part in parts for entry in part[key]] == expected[key]


def test_chat_logprobs():
    found = make(ChatFormat, top_logprobs=1).body([merge(fold(IDS))], USAGE)["choices"][0]["logprobs"]
    assert b"".join(bytes(entry["bytes"]) for entry in found["content"]).decode() == "he\u2028l"
    first = {"token": "h", "logprob": 0.0, "bytes": [104]}
    assert found["content"][0] == {**first, "top_logprobs": [first]}
    assert found["refusal"] is None


def test_completion_logprobs_and_offsets():
    found = make(CompletionFormat, top_logprobs=2).body([merge(fold(IDS))], USAGE)["choices"][0]["logprobs"]
    assert found["text_offset"] == [0, 1, 2, 2, 2, 3]
    assert found["tokens"][0] == "h"
    assert found["top_logprobs"][0] == {"h": 0.0, "a": -9999.0}
    assert len({len(values) for values in found.values()}) == 1


def test_stop_string_takes_its_tokens_logprobs_along():
    whole = merge(fold([0, 1, 2, 3, 4], stops=["cd"]))
    found = make(ChatFormat, top_logprobs=0).body([whole], USAGE)["choices"][0]
    assert found["message"]["content"] == "ab"
    assert [entry["token"] for entry in found["logprobs"]["content"]] == ["a", "b"]
    assert [entry["top_logprobs"] for entry in found["logprobs"]["content"]] == [[], []]


def test_included_stop_string():
    assert merge(fold([0, 1, 2, 3, 4], stops=["cd"], include_stop=True)).text == "abcd"


def test_echo_with_logprobs():
    prompt = [None, score(2, -2.0), score(3, -3.0)]
    deltas = [Delta("a", [0], None, [], prompt), Delta("b", [1], "length")]
    extras = {"top_logprobs": 0, "echo_texts": ["bcd", "e"]}
    whole = make(CompletionFormat, **extras).body([merge(deltas)], USAGE)["choices"][0]
    assert whole["text"] == "bcdab"
    assert whole["logprobs"] == {
        "tokens": ["b", "c", "d"],
        "token_logprobs": [None, -2.0, -3.0],
        "top_logprobs": [None, {"c": -2.0}, {"d": -3.0}],
        "text_offset": [0, 1, 2],
    }
    stream = make(CompletionFormat, **extras)
    texts = [chunk["choices"][0]["text"] for delta in deltas for chunk in stream.chunks(0, delta)]
    assert texts == ["bcda", "b"]


class TextsWithMark(Texts):
    """Token 9 is special."""

    def is_special(self, token_id):
        return token_id == 9

    def decode(self, ids):
        return super().decode([i for i in ids if i != 9])

    def token_bytes(self, token_id):
        return b"<s>" if token_id == 9 else super().token_bytes(token_id)


@pytest.mark.parametrize(
    ("text", "offsets"), [("b<s>c<s>", [0, 1, 4, 5]), ("bc", [0, 1, 1, 2]), ("b<s>c", [0, 1, 4, 5])]
)
def test_offsets_where_the_prompt_has_special_tokens(text, offsets):
    prompt = [None, *[score(1)] * 3]
    extras = Extras(top_logprobs=0, echo_texts=[text])
    form = CompletionFormat(HEADER, [[1, 9, 2, 9]], extras, TextsWithMark())
    found = form.body([Delta("", [0], "length", [], prompt)], USAGE)["choices"][0]["logprobs"]
    assert found["text_offset"] == offsets


def test_logprobs_of_no_text():
    found = make(ChatFormat, top_logprobs=2).body([Delta("", [0], "stop")], USAGE)["choices"][0]
    assert found["logprobs"] == {"content": [], "refusal": None}


def test_prompt_logprobs():
    scores = [None, score(2, -2.0, 5, [(3, -0.25)]), score(3, -0.5, 1, [(3, -0.5)])]
    body = make(ChatFormat, top_prompt_logprobs=1).body([Delta("", [], "length", [], scores)], USAGE)
    assert body["prompt_logprobs"] == [
        None,
        {
            "2": {"logprob": -2.0, "rank": 5, "decoded_token": "c"},
            "3": {"logprob": -0.25, "rank": 1, "decoded_token": "d"},
        },
        {"3": {"logprob": -0.5, "rank": 1, "decoded_token": "d"}},
    ]
    assert "prompt_logprobs" not in make(ChatFormat).body([Delta("", [], "length", [], scores)], USAGE)


CALLS = [
    Delta("", [1], None, reasoning="hm"),
    Delta("", [2], None, tool_calls=(ToolCallDelta(0, "call_1", "f"),)),
    Delta("", [3], "tool_calls", tool_calls=(ToolCallDelta(0, None, None, "{}"), ToolCallDelta(1, "call_2", "g"))),
]


def test_tool_calls_and_reasoning():
    message = make(ChatFormat).body([merge(CALLS)], USAGE)["choices"][0]["message"]
    assert message == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": ""}},
        ],
    }


def test_streamed_tool_calls():
    stream = make(ChatFormat)
    choices = [chunk["choices"][0] for delta in CALLS for chunk in stream.chunks(0, delta)]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert calls == [
        {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}},
        {"index": 0, "function": {"arguments": "{}"}},
        {"index": 1, "id": "call_2", "type": "function", "function": {"name": "g", "arguments": ""}},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["tool_calls"]


deltas_of_a_stream = st.lists(
    st.builds(
        Delta,
        st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["\0text\0", '"', "\u2028", "\x85", ""]),
        st.lists(st.integers(0, 25), max_size=2),
        reasoning=st.sampled_from(["", "", "hm"]),
    ),
    max_size=6,
)


@given(
    deltas_of_a_stream,
    st.sampled_from([ChatFormat, CompletionFormat]),
    st.sampled_from([(False, False), (True, False), (True, True)]),
    st.sampled_from([{}, {"token_ids": True}, {"top_logprobs": 0}]),
)
def test_events_from_a_template_are_those_of_the_chunks(deltas, format_class, usages, extras):
    header = Header(id="i", created=1, model='m"\0text\0', system_fingerprint=None)
    with_usage, continuous = usages
    by_template, by_chunk = (format_class(header, [[1]], Extras(**extras), Texts()) for _ in range(2))
    for delta in [*deltas, Delta("end", [1], "stop")]:
        expected = by_chunk.chunks(0, delta)
        if with_usage:
            expected = [{**chunk, "usage": USAGE.as_json() if continuous else None} for chunk in expected]
        usage = (lambda: USAGE) if continuous else None
        found = by_template.events(0, delta, usage, with_usage=with_usage)
        assert found == b"".join(map(sse.event, expected))
