"""Conversations as chat templates want them."""

import json

import pytest

from gateway import openai
from gateway.core.messages import template_messages, without_tools
from gateway.core.tools.formats import HERMES
from gateway.errors import ApiError
from gateway.openai import ChatBody

CALL = {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": '{"zone": "UTC"}'}}
TOOLS = [{"type": "function", "function": {"name": "time", "parameters": {}}}]


def rendered(*messages):
    body = openai.decode(json.dumps({"model": "m", "messages": messages}).encode(), ChatBody)
    return template_messages(body.messages)


def test_calls_and_results():
    messages = rendered(
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "noon"}]},
    )
    assert messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**CALL, "function": {"name": "time", "arguments": {"zone": "UTC"}}}],
    }
    assert messages[2] == {"role": "tool", "content": "noon", "tool_call_id": "call_1"}
    plain = without_tools(messages, HERMES, TOOLS)
    assert [message["role"] for message in plain] == ["system", "user", "assistant", "user"]
    assert plain[2]["content"] == '<tool_call>\n{"name": "time", "arguments": {"zone": "UTC"}}\n</tool_call>'
    assert "noon" in plain[3]["content"]
    assert without_tools(messages[:1], HERMES, None) == messages[:1]


def test_tools_join_the_system_message():
    messages = without_tools(rendered({"role": "system", "content": "Be brief."}), HERMES, TOOLS)
    assert len(messages) == 1
    assert messages[0]["content"].startswith("Be brief.\n\n")
    assert '"name": "time"' in messages[0]["content"]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant"}, "messages[0].content"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[0].tool_calls"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
        ({"role": "user", "content": []}, "messages[0].content"),
    ],
)
def test_bad_messages_are_named(message, param):
    with pytest.raises(ApiError) as caught:
        rendered(message)
    assert caught.value.param == param
