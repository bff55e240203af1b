"""POST /tokenize and /detokenize, as vLLM has them, and GET /version."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import Request, get, post
from litestar.types import ASGIApp

from gateway.core.messages import checked_ids
from gateway.errors import bad_request
from gateway.openai import ChatMessage, decode
from gateway.routes.replies import JsonReply, json_body
from gateway.services.front import Front
from gateway.services.front import version as installed_version


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)] | None = None
    add_generation_prompt: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    tokens: list[Any]
    model: str | None = None


@post("/tokenize", status_code=200)
async def tokenize(request: Request[Any, Any, Any]) -> ASGIApp:
    """Token ids of a text, or of messages as the chat template writes them."""
    front: Front = request.app.state.front
    body = decode(await json_body(request), TokenizeBody)
    front.check_model(body.model or front.model_name)
    ids = _ids(front, body)
    strings = {"token_strs": [front.tokenizer.token_string(i) for i in ids]} if body.return_token_strs else {}
    return JsonReply({"count": len(ids), "max_model_len": front.max_model_len, "tokens": ids, **strings})


@post("/detokenize", status_code=200)
async def detokenize(request: Request[Any, Any, Any]) -> ASGIApp:
    """Text of token ids; special tokens are left out."""
    front: Front = request.app.state.front
    body = decode(await json_body(request), DetokenizeBody)
    front.check_model(body.model or front.model_name)
    ids = checked_ids(body.tokens, "tokens", front.tokenizer.vocab_size) if body.tokens else []
    return JsonReply({"prompt": front.tokenizer.decode(ids)})


@get("/version")
async def version() -> ASGIApp:
    """Of this software."""
    return JsonReply({"version": installed_version()})


def _ids(front: Front, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("either prompt or messages must be given", "prompt")
    if body.prompt is not None:
        return front.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    assert body.messages is not None, "checked above"
    variables = dict(body.chat_template_kwargs or {})
    if body.add_generation_prompt is not None:
        variables["add_generation_prompt"] = body.add_generation_prompt
    return front.render(body.messages, tools=body.tools, variables=variables).ids
