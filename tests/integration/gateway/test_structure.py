"""Structured output, tool calls and reasoning with the official SDK; what the engine says is scripted."""

import json
from typing import Any

import pydantic
import pytest
from llguidance import LLMatcher, LLTokenizer

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'


def say(stack, tokenizer, text):
    pipeline = stack.engine.pipelines["p0"]
    pipeline.script = tokenizer.encode(text, add_special_tokens=False)
    return pipeline


async def test_tool_call_in_body_and_stream(stack, tokenizer):
    pipeline = say(stack, tokenizer, f"Wait. {CALL}\n{CALL}")
    arguments = {"model": "tiny-chat", "messages": HELLO, "tools": [WEATHER]}
    choice = (await stack.sdk.chat.completions.create(**arguments)).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Wait.")
    calls = choice.message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == [("weather", '{"place": "Rome"}')] * 2
    assert len({call.id for call in calls}) == 2
    assert pipeline.submitted[0].sampling.grammar is None
    prompt = tokenizer.decode(pipeline.submitted[0].prompt_ids)
    assert '"name": "weather"' in prompt
    async with stack.sdk.chat.completions.stream(**arguments) as stream:
        final = (await stream.get_final_completion()).choices[0]
    assert final.finish_reason == "tool_calls"
    assert [call.function.arguments for call in final.message.tool_calls] == ['{"place": "Rome"}'] * 2


async def test_required_call_has_a_grammar(stack, tokenizer, model_dir):
    pipeline = say(stack, tokenizer, CALL)
    choice = (
        await stack.sdk.chat.completions.create(
            model="tiny-chat", messages=HELLO, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False
        )
    ).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    grammar = pipeline.submitted[0].sampling.grammar
    matcher = LLMatcher(LLTokenizer(str(model_dir / "tokenizer.json"), eos_token=1), grammar)
    assert matcher.try_consume_tokens(pipeline.script) == len(pipeline.script)


async def test_conversation_with_results(stack, tokenizer):
    call = {"id": "call_123456789", "type": "function", "function": {"name": "weather", "arguments": '{"place": "X"}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_123456789", "content": "sunny"},
    ]
    pipeline = say(stack, tokenizer, "Sunny.")
    answer = await stack.sdk.chat.completions.create(model="tiny-chat", messages=messages, tools=[WEATHER])
    assert answer.choices[0].message.content == "Sunny."
    assert answer.choices[0].finish_reason == "stop"
    assert "sunny" in tokenizer.decode(pipeline.submitted[0].prompt_ids)


class Person(pydantic.BaseModel):
    name: str
    age: int


async def test_parse_helper(stack, tokenizer):
    pipeline = say(stack, tokenizer, '{"name": "Al", "age": 3}')
    answer = await stack.sdk.chat.completions.parse(model="tiny-chat", messages=HELLO, response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="Al", age=3)
    assert "age" in pipeline.submitted[0].sampling.grammar


@pytest.mark.parametrize(
    ("change", "param"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "strict": True, "schema": {"type": "array", "uniqueItems": True}},
                }
            },
            "response_format",
        ),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_grammar": "start: nowhere"}, "guided_grammar"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_enforced_is_refused(stack, change, param, stream):
    reply = await stack.http.post(
        "/v1/chat/completions", json={"model": "tiny-chat", "messages": HELLO, "stream": stream, **change}
    )
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
    assert stack.engine.pipelines["p0"].submitted == []


async def test_completions_take_grammars(stack, tokenizer):
    pipeline = say(stack, tokenizer, "yes")
    reply = await stack.http.post(
        "/v1/completions", json={"model": "tiny-chat", "prompt": "a", "guided_choice": ["yes", "no"]}
    )
    assert reply.json()["choices"][0]["text"] == "yes"
    assert json.dumps("yes") in pipeline.submitted[0].sampling.grammar


@pytest.mark.parametrize("kind", ["tools", "json", "free"])
async def test_interrupted_answers_are_the_same(stack, tokenizer, kind):
    """Calls and reasoning are read from the token log, wherever the pipeline was preempted."""
    texts = {"tools": f"Wait. {CALL}\n{CALL}", "json": '{"name": "Al", "age": 3}', "free": "a b c d e f g"}
    pipeline = say(stack, tokenizer, texts[kind])
    by_kind: dict[str, dict[str, Any]] = {
        "tools": {"tools": [WEATHER]},
        "json": {"response_format": {"type": "json_object"}},
        "free": {},
    }
    arguments = {"model": "tiny-chat", "messages": HELLO, "logprobs": True, "seed": 1, **by_kind[kind]}
    whole = (await stack.sdk.chat.completions.create(**arguments)).choices[0]
    other = await stack.engine.add("p1")
    other.script = pipeline.script
    pipeline.step_s = 0.02
    events = []
    stream = await stack.sdk.chat.completions.create(**arguments, stream=True, max_completion_tokens=200)
    async for chunk in stream:
        events.append(chunk.choices[0])
        if len(events) == 4:
            await stack.engine.plan("p1", retiring={"p0": False}, inherits={"p1": ["p0"]})
            await pipeline.interrupt(with_kv=False)
    assert other.submitted
    assert "".join(e.delta.content or "" for e in events) == (whole.message.content or "")
    calls = [call for e in events for call in e.delta.tool_calls or []]
    names = [call.function.name for call in whole.message.tool_calls or []]
    assert [call.function.name for call in calls if call.id] == names
    joined = "".join(call.function.arguments or "" for call in calls)
    assert joined == "".join(call.function.arguments for call in whole.message.tool_calls or [])
    logprobs = [entry.logprob for e in events if e.logprobs for entry in e.logprobs.content]
    assert logprobs == [entry.logprob for entry in whole.logprobs.content]
    assert events[-1].finish_reason == whole.finish_reason
