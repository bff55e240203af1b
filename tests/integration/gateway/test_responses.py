"""/v1/responses with the official SDK."""

import asyncio
import time

import openai
import pytest


def say(stack, tokenizer, text):
    pipeline = stack.engine.pipelines["p0"]
    pipeline.script = tokenizer.encode(text, add_special_tokens=False)
    return pipeline


async def test_create_and_go_on(stack, tokenizer):
    pipeline = say(stack, tokenizer, "Hello there.")
    first = await stack.sdk.responses.create(model="tiny-chat", input="hi", instructions="Be kind.")
    assert (first.output_text, first.status) == ("Hello there.", "completed")
    assert first.usage.output_tokens == len(pipeline.script) + 1
    assert (await stack.sdk.responses.retrieve(first.id)).output_text == "Hello there."
    second = await stack.sdk.responses.create(model="tiny-chat", input="more", previous_response_id=first.id)
    prompt = tokenizer.decode(pipeline.submitted[-1].prompt_ids)
    assert "hi" in prompt
    assert "Hello there." in prompt
    assert "Be kind." not in prompt
    assert second.previous_response_id == first.id
    await stack.sdk.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        await stack.sdk.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as caught:
        await stack.sdk.responses.create(model="tiny-chat", input="x", previous_response_id=first.id)
    assert caught.value.code == "previous_response_not_found"


async def test_stream_equals_body(stack, tokenizer):
    say(stack, tokenizer, "Hello there.")
    async with stack.sdk.responses.stream(model="tiny-chat", input="hi") as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert final.output_text == "Hello there."
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (await stack.sdk.responses.retrieve(final.id)).output_text == "Hello there."


async def test_function_call(stack, tokenizer):
    say(stack, tokenizer, '<tool_call>{"name": "time", "arguments": {"zone": "UTC"}}</tool_call>')
    tool = {"type": "function", "name": "time", "parameters": {"type": "object"}, "strict": False}
    answer = await stack.sdk.responses.create(model="tiny-chat", input="hi", tools=[tool])
    (call,) = answer.output
    assert (call.type, call.name, call.arguments) == ("function_call", "time", '{"zone": "UTC"}')


async def settled(stack, response_id, status):
    deadline_s = time.monotonic() + 10
    while (found := await stack.sdk.responses.retrieve(response_id)).status != status:
        assert time.monotonic() < deadline_s, f"still {found.status}"
        await asyncio.sleep(0.02)
    return found


async def test_background(stack, tokenizer):
    pipeline = say(stack, tokenizer, "Hello there.")
    begun = await stack.sdk.responses.create(model="tiny-chat", input="hi", background=True)
    assert begun.status == "queued"
    assert (await settled(stack, begun.id, "completed")).output_text == "Hello there."
    pipeline.step_s = 0.2
    begun = await stack.sdk.responses.create(model="tiny-chat", input="hi", background=True)
    assert (await stack.sdk.responses.cancel(begun.id)).status == "cancelled"
    await settled(stack, begun.id, "cancelled")
    deadline_s = time.monotonic() + 10
    while pipeline.running():
        assert time.monotonic() < deadline_s, "the engine goes on"
        await asyncio.sleep(0.02)


async def test_a_deleted_response_stays_away_and_stops(stack, tokenizer):
    pipeline = say(stack, tokenizer, "Hello there." * 20)
    pipeline.step_s = 0.05
    begun = await stack.sdk.responses.create(model="tiny-chat", input="hi", background=True)
    await settled(stack, begun.id, "in_progress")
    with pytest.raises(openai.BadRequestError) as caught:
        await stack.sdk.responses.create(model="tiny-chat", input="x", previous_response_id=begun.id)
    assert caught.value.param == "previous_response_id"
    await stack.sdk.responses.delete(begun.id)
    await stack.until_counts(running=0)
    # What ends after it is written after it.
    pipeline.script, pipeline.step_s = pipeline.script[:3], 0.0
    other = await stack.sdk.responses.create(model="tiny-chat", input="hi", background=True)
    await settled(stack, other.id, "completed")
    with pytest.raises(openai.NotFoundError):
        await stack.sdk.responses.retrieve(begun.id)


async def test_fields_are_named_as_the_client_knows_them(stack):
    for fields, param in (
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"input": "word " * 2000}, "input"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].function.name"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await stack.sdk.responses.create(**{"model": "tiny-chat", "input": "hi", **fields})
        assert caught.value.param == param


async def test_a_full_store_forgets_the_oldest(stack, tokenizer):
    say(stack, tokenizer, "Hello.")
    await stack.sdk.responses.create(model="tiny-chat", input="hi")
    stream = stack.engine.client.jetstream()
    name = f"KV_spotserve-{stack.engine.slug}-responses"
    assert (await stream.stream_info(name)).config.discard == "old"


async def test_what_is_too_large_says_so(stack, tokenizer):
    say(stack, tokenizer, "Hello.")
    answer = await stack.sdk.responses.create(model="tiny-chat", input="hi", metadata={"a": "x" * 2**21})
    assert answer.output_text == "Hello."
    kept = await stack.sdk.responses.retrieve(answer.id)
    assert kept.status == "failed"
    assert "too large" in kept.error.message


async def test_not_stored(stack, tokenizer):
    say(stack, tokenizer, "Hello.")
    answer = await stack.sdk.responses.create(model="tiny-chat", input="hi", store=False)
    with pytest.raises(openai.NotFoundError):
        await stack.sdk.responses.retrieve(answer.id)
    with pytest.raises(openai.BadRequestError) as caught:
        await stack.sdk.responses.create(model="tiny-chat", input="hi", store=False, background=True)
    assert caught.value.param == "background"
    with pytest.raises(openai.BadRequestError) as caught:
        await stack.sdk.responses.cancel((await stack.sdk.responses.create(model="tiny-chat", input="hi")).id)
    assert caught.value.param == "response_id"
