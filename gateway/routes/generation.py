"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import asyncio
from typing import Any

from litestar import Request, post
from litestar.types import ASGIApp

from gateway.core.messages import prompts_of
from gateway.core.tools.definitions import tool_use
from gateway.errors import bad_request
from gateway.openai import ChatBody, CompletionBody, GenerationBody, parse
from gateway.routes.replies import StreamReply, json_body, whole_reply
from gateway.services.answer import Answer
from gateway.services.front import CHAT, COMPLETION, Front, Prompt

_LONG_BODY_BYTES = 64 * 1024
"""Tokenizing more than this takes long enough to stall other streams, so it goes to a thread."""


@post("/v1/chat/completions", status_code=200)
async def chat_completions(request: Request[Any, Any, Any]) -> ASGIApp:
    """Answer a conversation."""
    front: Front = request.app.state.front
    data = await json_body(request)
    body = parse(data, ChatBody)
    front.check_model(body.model)
    tools = tool_use(body)
    prompt = await _maybe_in_thread(data, front.chat_prompt, body)
    shape = await front.structure.shape(body, tools, prompt.text)
    answer = front.start(CHAT, body, [prompt], request.headers, grammar=shape.grammar, parser=shape.parser)
    return await _reply(request, front, body, answer)


@post("/v1/completions", status_code=200)
async def completions(request: Request[Any, Any, Any]) -> ASGIApp:
    """Continue prompts."""
    front: Front = request.app.state.front
    data = await json_body(request)
    body = parse(data, CompletionBody)
    front.check_model(body.model)
    prompts = await _maybe_in_thread(data, _completion_prompts, front, body)
    shape = await front.structure.shape(body, None, "")
    answer = front.start(COMPLETION, body, prompts, request.headers, grammar=shape.grammar)
    return await _reply(request, front, body, answer)


async def _reply(request: Request[Any, Any, Any], front: Front, body: GenerationBody, answer: Answer) -> ASGIApp:
    """The answer as a whole or as a stream."""
    if body.stream:
        events = answer.events(
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
            keep_alive_s=front.settings.keep_alive_s,
        )
        return StreamReply(events, answer.close)
    return await whole_reply(request.scope, answer.body(), answer.close)


async def _maybe_in_thread(data: bytes, work: Any, *args: Any) -> Any:
    if len(data) > _LONG_BODY_BYTES:
        return await asyncio.to_thread(work, *args)
    return work(*args)


def _completion_prompts(front: Front, body: CompletionBody) -> list[Prompt]:
    tokenizer, add_special_tokens = front.tokenizer, body.add_special_tokens is not False
    prompts = [
        Prompt(tokenizer.encode(prompt, add_special_tokens=add_special_tokens), prompt)
        if isinstance(prompt, str)
        else Prompt(prompt, tokenizer.decode(prompt) if body.echo else "")
        for prompt in prompts_of(body.prompt, tokenizer.vocab_size)
    ]
    if not all(prompt.ids for prompt in prompts):
        raise bad_request("prompt must have at least one token", "prompt")
    return prompts
