"""Responses: input items as messages, deltas as items and events."""

import json

import openai.types.responses as sdk
import pydantic
import pytest

from gateway import openai
from gateway.core.fold import Delta
from gateway.core.parsing import ToolCallDelta
from gateway.core.response_format import Usage
from gateway.core.response_input import answered_messages, chat_body, input_messages
from gateway.core.responses import ResponseBody, ResponseFold
from gateway.errors import ApiError, unavailable

USAGE = Usage(3, 4, 2, 1)
DELTAS = [
    Delta("", [1], reasoning="hm"),
    Delta("", [2], reasoning="!"),
    Delta("Hel", [3]),
    Delta("lo", [4]),
    Delta("", [5], tool_calls=(ToolCallDelta(0, "call_a", "f"),)),
    Delta("", [6], tool_calls=(ToolCallDelta(0, None, None, '{"a'),)),
    Delta("", [7], tool_calls=(ToolCallDelta(0, None, None, '": 1}'), ToolCallDelta(1, "call_b", "g", "{}"))),
]


def body(**fields):
    return openai.decode(json.dumps({"model": "m", "input": "hi", **fields}).encode(), ResponseBody)


def run(deltas, finish="stop"):
    fold = ResponseFold("resp_1", 1700000000, body())
    events = fold.start()
    for delta in deltas:
        events += fold.push(delta)
    return fold, events + fold.finish(finish, USAGE)


def test_events_are_numbered_and_of_the_official_types():
    _, events = run(DELTAS)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    adapter = pydantic.TypeAdapter(sdk.ResponseStreamEvent)
    for event in events:
        parsed = adapter.validate_python(event)
        assert parsed.type == event["type"]


def test_items_are_what_the_events_say():
    fold, events = run(DELTAS)
    assert [item["type"] for item in fold.response["output"]] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    text = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    assert text == fold.response["output"][1]["content"][0]["text"] == "Hello"
    for index, item in enumerate(fold.response["output"]):
        done = [e for e in events if e["type"] == "response.output_item.done" and e["output_index"] == index]
        assert [e["item"] for e in done] == [item]
        assert item["status"] == "completed"
    arguments = [e for e in events if e["type"] == "response.function_call_arguments.done"]
    assert [e["arguments"] for e in arguments] == ['{"a": 1}', "{}"]
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"] == fold.response
    assert sdk.Response.model_validate(fold.response).output_text == "Hello"
    assert fold.response["usage"]["output_tokens_details"] == {"reasoning_tokens": 1}


def test_cut_and_failed():
    fold, events = run([Delta("x", [1])], "length")
    assert events[-1]["type"] == "response.incomplete"
    assert fold.response["incomplete_details"] == {"reason": "max_output_tokens"}
    fold = ResponseFold("resp_1", 1, body())
    fold.push(Delta("x", [1]))
    assert fold.fail(unavailable("gone"), USAGE)[-1]["type"] == "response.failed"
    assert fold.response["error"]["message"] == "gone"


def test_output_goes_on_as_input():
    fold, _ = run(DELTAS)
    messages = answered_messages(fold.response["output"])
    assert [message.role for message in messages] == ["assistant"]
    assert messages[0].content == [{"type": "text", "text": "Hello"}]
    assert [call.id for call in messages[0].tool_calls or []] == ["call_a", "call_b"]


def test_input_items():
    messages = input_messages(
        [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "42"},
            {"type": "reasoning", "summary": []},
        ]
    )
    assert [message.role for message in messages] == ["user", "assistant", "tool"]
    assert messages[2].tool_call_id == "c"


def test_the_same_as_a_chat():
    given = body(
        instructions="Be brief.",
        max_output_tokens=5,
        tools=[{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}],
        tool_choice={"type": "function", "name": "f"},
        text={"format": {"type": "json_schema", "name": "s", "schema": {}, "strict": True}},
    )
    chat = chat_body(given, [])
    assert [message.role for message in chat.messages] == ["system", "user"]
    assert chat.tools == [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}
    ]
    assert chat.tool_choice == {"type": "function", "function": {"name": "f"}}
    assert chat.response_format == {"type": "json_schema", "json_schema": {"name": "s", "schema": {}, "strict": True}}
    assert chat.wanted_tokens == 5


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "image"}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": [{"role": "user", "content": None}]}, "input[0].content"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"text": {"format": 1}}, "text.format"),
    ],
)
def test_bad_fields_are_named(fields, param):
    with pytest.raises(ApiError) as caught:
        chat_body(body(**fields), [])
    assert (caught.value.status, caught.value.param) == (400, param)
