"""Clients that people use, as they come from the package registry, on one real stack with a tiny random model.

What the model says is noise, so the tests look at what the clients make of it: streams equal bodies, JSON fits its
schema, calls have arguments that parse, usage adds up, refusals are the client's own exceptions.
"""

from __future__ import annotations

import asyncio
import functools
import json
import operator
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from openai.types.chat import ChatCompletionMessageFunctionToolCall

from tests.e2e.stack import Stack
from tests.tiny_model import make_tiny_model

# Before litellm is imported, which is where it would fetch a table of prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
litellm = pytest.importorskip("litellm")

# Pytest takes warnings for errors; these two are the clients' own, about their own use of pydantic.
pytestmark = [
    # LangChain dumps the SDK's parsed chunk, whose type does not name the class that was parsed.
    pytest.mark.filterwarnings("ignore:(?s)Pydantic serializer warnings.*field_name='parsed':UserWarning"),
    # LiteLLM copies a chunk field by field, found on the instance.
    pytest.mark.filterwarnings("ignore:Accessing the 'model_(computed_)?fields' attribute on the instance"),
]

HELLO: Any = [{"role": "user", "content": "What flew by?"}]
MODEL = "tiny"
KEY = "none"


class Sighting(pydantic.BaseModel):
    """A bird that was seen."""

    kind: Literal["owl", "heron", "wren"]
    count: int = pydantic.Field(ge=0, le=99)
    certain: bool
    hours: list[Literal["dawn", "noon", "dusk"]] = pydantic.Field(min_length=1, max_length=3)


REPORT: Any = {
    "type": "function",
    "function": {"name": "report", "description": "Report a bird.", "parameters": Sighting.model_json_schema()},
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    directory = tmp_path_factory.mktemp("clients")
    model = make_tiny_model(directory / MODEL, layers=2)
    stack = Stack(directory / "state", model, "--instances", "1", "--dtype", "float32").start()
    yield stack
    stack.stop()


@pytest.fixture(scope="module")
def url(stack: Stack) -> str:
    return f"{stack.base_url}/v1"


@pytest.fixture
def sdk(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
async def async_sdk(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def chain(url: str) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL, base_url=url, api_key=pydantic.SecretStr(KEY), temperature=0, max_retries=0, timeout=60
    )


def lite(url: str, **arguments: Any) -> dict[str, Any]:
    return {
        "model": f"openai/{MODEL}",
        "api_base": url,
        "api_key": KEY,
        "messages": HELLO,
        "num_retries": 0,
        **arguments,
    }


# --- the official SDK -----------------------------------------------------------------------------------------------


def test_sdk_models(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == [MODEL]
    assert sdk.models.retrieve(MODEL).id == MODEL


def test_sdk_chat_stream_equals_body(sdk: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": HELLO, "max_completion_tokens": 24, "seed": 5, "logprobs": True}
    whole = sdk.chat.completions.create(**asked)
    (choice,) = whole.choices
    assert choice.finish_reason in ("length", "stop")
    assert whole.usage is not None
    assert whole._request_id
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(sdk.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == choice.message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    raw = b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content)
    assert raw.decode(errors="replace") == choice.message.content


def test_sdk_completions_batch(sdk: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "prompt": ["one", "two"], "max_tokens": 8, "temperature": 0, "n": 2, "echo": True}
    whole = sdk.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in whole.choices] == ["one", "one", "two", "two"]
    texts = ["", "", "", ""]
    for chunk in sdk.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


async def test_sdk_async_streams_at_once(async_sdk: openai.AsyncOpenAI) -> None:
    async def text(seed: int, *, stream: bool) -> str:
        asked: Any = {"model": MODEL, "messages": HELLO, "max_completion_tokens": 16, "seed": seed}
        if not stream:
            return (await async_sdk.chat.completions.create(**asked)).choices[0].message.content or ""
        chunks = await async_sdk.chat.completions.create(**asked, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    streamed = await asyncio.gather(*(text(seed, stream=True) for seed in range(6)))
    assert await asyncio.gather(*(text(seed, stream=False) for seed in range(6))) == streamed
    assert len(set(streamed)) == 6


def test_sdk_structured_parse(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Sighting, n=2)
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    assert all(isinstance(choice.message.parsed, Sighting) for choice in answer.choices)


def test_sdk_structured_stream_helper(sdk: openai.OpenAI) -> None:
    with sdk.chat.completions.stream(model=MODEL, messages=HELLO, response_format=Sighting, seed=3) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    (done,) = [event for event in events if event.type == "content.done"]
    assert isinstance(done.parsed, Sighting)
    assert done.parsed == final.choices[0].message.parsed
    assert "".join(event.delta for event in events if event.type == "content.delta") == done.content


def test_sdk_tool_helpers(sdk: openai.OpenAI) -> None:
    asked: Any = {
        "model": MODEL,
        "messages": HELLO,
        "seed": 4,
        "parallel_tool_calls": False,
        "tools": [openai.pydantic_function_tool(Sighting)],
        "tool_choice": "required",
    }
    choice = sdk.chat.completions.parse(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Sighting)
    with sdk.chat.completions.stream(**asked) as stream:
        events = list(stream)
    (done,) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert done.parsed_arguments == call.function.parsed_arguments
    deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert "".join(event.arguments_delta for event in deltas) == call.function.arguments


async def test_sdk_async_tool_conversation(async_sdk: openai.AsyncOpenAI) -> None:
    """Calls go back into the conversation with their results."""
    named: Any = {"type": "function", "function": {"name": "report"}}
    answer = await async_sdk.chat.completions.create(model=MODEL, messages=HELLO, tools=[REPORT], tool_choice=named)
    message = answer.choices[0].message
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    Sighting.model_validate_json(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "noted"}
    messages = [*HELLO, message.model_dump(), result]
    after = await async_sdk.chat.completions.create(
        model=MODEL, messages=messages, tools=[REPORT], tool_choice="none", max_completion_tokens=8
    )
    assert after.choices[0].message.tool_calls is None
    assert after.usage is not None
    assert answer.usage is not None
    assert after.usage.prompt_tokens > answer.usage.prompt_tokens


def test_sdk_responses(sdk: openai.OpenAI) -> None:
    parsed = sdk.responses.parse(model=MODEL, input="What flew by?", text_format=Sighting)
    assert isinstance(parsed.output_parsed, Sighting)
    with sdk.responses.stream(model=MODEL, input="And then?", text_format=Sighting) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert isinstance(final.output_parsed, Sighting)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text
    assert sdk.responses.retrieve(final.id).output_text == final.output_text


def test_sdk_refusals_are_its_exceptions(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.chat.completions.create(model="other", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.chat.completions.create(model=MODEL, messages=HELLO, temperature=3, stream=True)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        sdk.completions.create(model=MODEL, prompt="x" * 5000)
    assert long.value.code == "context_length_exceeded"


# --- LangChain ------------------------------------------------------------------------------------------------------


def test_langchain_invoke_and_stream(chain: ChatOpenAI) -> None:
    model = chain.bind(max_tokens=16)
    whole = model.invoke("What flew by?")
    chunks = list(model.stream("What flew by?"))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert isinstance(whole, AIMessage)
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 16
    assert whole.response_metadata["finish_reason"] == "length"


async def test_langchain_async_batch(chain: ChatOpenAI) -> None:
    model = chain.bind(max_tokens=8)
    questions: Any = [f"Question {number}" for number in range(4)]
    answers = await model.abatch(questions)
    streamed = ["".join([chunk.text async for chunk in model.astream(question)]) for question in questions]
    assert [answer.text for answer in answers] == streamed


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structured_output(chain: ChatOpenAI, method: Literal["json_schema", "function_calling"]) -> None:
    assert isinstance(chain.with_structured_output(Sighting, method=method).invoke("What flew by?"), Sighting)
    *_, last = chain.with_structured_output(Sighting, method=method).stream("What flew by?")
    assert isinstance(last, Sighting)


def test_langchain_tools(chain: ChatOpenAI) -> None:
    model = chain.bind_tools([Sighting], tool_choice="required", parallel_tool_calls=False)
    asked: list[BaseMessage] = [HumanMessage("What flew by?")]
    answer = model.invoke(asked)
    (call,) = answer.tool_calls
    Sighting.model_validate(call["args"])
    whole: Any = functools.reduce(operator.add, model.stream(asked))
    assert [again["args"] for again in whole.tool_calls] == [call["args"]]
    after = chain.bind(max_tokens=4).invoke([*asked, answer, ToolMessage("noted", tool_call_id=call["id"])])
    assert after.text


def test_langchain_over_responses(url: str) -> None:
    chain = ChatOpenAI(
        model=MODEL, base_url=url, api_key=pydantic.SecretStr(KEY), use_responses_api=True, max_retries=0, timeout=60
    )
    answer = chain.bind(max_output_tokens=16).invoke("What flew by?")
    assert answer.text
    assert isinstance(chain.with_structured_output(Sighting).invoke("What flew by?"), Sighting)


# --- LiteLLM --------------------------------------------------------------------------------------------------------


def test_litellm_completion_and_stream(url: str) -> None:
    asked = lite(url, max_tokens=16, temperature=0)
    whole = litellm.completion(**asked)
    assert whole.usage.completion_tokens == 16
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 16
    rebuilt = litellm.stream_chunk_builder(chunks, messages=HELLO)
    assert rebuilt.choices[0].message.content == text


def test_litellm_tools_and_schema(url: str) -> None:
    asked = lite(url, tools=[REPORT], tool_choice="required", parallel_tool_calls=False, seed=2)
    choice = litellm.completion(**asked).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    Sighting.model_validate_json(call.function.arguments)
    chunks = list(litellm.completion(**asked, stream=True))
    (streamed,) = litellm.stream_chunk_builder(chunks, messages=HELLO).choices[0].message.tool_calls
    assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)
    answer = litellm.completion(**lite(url, response_format=Sighting))
    Sighting.model_validate_json(answer.choices[0].message.content)


def test_litellm_text_completion(url: str) -> None:
    asked: dict[str, Any] = {"model": f"text-completion-openai/{MODEL}", "api_base": url, "api_key": KEY}
    answer = litellm.text_completion(**asked, prompt="What flew by?", max_tokens=8, temperature=0)
    assert answer.usage.completion_tokens == 8
    assert answer.choices[0].text


async def test_litellm_async(url: str) -> None:
    whole = await litellm.acompletion(**lite(url, max_tokens=8, temperature=0))
    chunks = await litellm.acompletion(**lite(url, max_tokens=8, temperature=0, stream=True))
    text = "".join([choice.delta.content or "" async for chunk in chunks for choice in chunk.choices])
    assert text == whole.choices[0].message.content
    await litellm.close_litellm_async_clients()


def test_litellm_refusals_are_its_exceptions(url: str) -> None:
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**lite(url, temperature=3))
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**lite(url), "model": "openai/other"})
