"""/v1/responses: create, retrieve, cancel, delete."""

from __future__ import annotations

from typing import Any

from litestar import Request, delete, get, post
from litestar.types import ASGIApp

from gateway.core.responses import ResponseBody
from gateway.openai import decode
from gateway.routes.replies import JsonReply, StreamReply, json_body, whole_reply
from gateway.services.caller import current_caller
from gateway.services.responses import Responses, not_found


@post("/v1/responses", status_code=200)
async def create_response(request: Request[Any, Any, Any]) -> ASGIApp:
    """Answer an input, with the conversation before it if `previous_response_id` is given."""
    responses: Responses = request.app.state.responses
    body = decode(await json_body(request), ResponseBody)
    running = await responses.begin(body, request.headers, _owner())
    if body.background:
        return JsonReply(await responses.run_in_background(running))
    if body.stream:
        return StreamReply(responses.stream(running), running.answer.close)
    return await whole_reply(request.scope, responses.run(running), running.answer.close)


@get("/v1/responses/{response_id:str}")
async def get_response(request: Request[Any, Any, Any]) -> ASGIApp:
    """A response that was kept."""
    responses: Responses = request.app.state.responses
    response_id = _id(request)
    stored = await responses.store.get(response_id, _owner())
    if stored is None:
        raise not_found(response_id)
    return JsonReply(stored.response)


@post("/v1/responses/{response_id:str}/cancel", status_code=200)
async def cancel_response(request: Request[Any, Any, Any]) -> ASGIApp:
    """Stop a response that runs in the background."""
    responses: Responses = request.app.state.responses
    return JsonReply(await responses.cancel(_id(request), _owner()))


@delete("/v1/responses/{response_id:str}", status_code=200)
async def delete_response(request: Request[Any, Any, Any]) -> ASGIApp:
    """Forget a response; one that runs in the background is stopped."""
    responses: Responses = request.app.state.responses
    response_id = _id(request)
    await responses.delete(response_id, _owner())
    return JsonReply({"id": response_id, "object": "response", "deleted": True})


def _id(request: Request[Any, Any, Any]) -> str:
    return str(request.path_params["response_id"])


def _owner() -> str:
    """Who may see what this request makes: the key's owner; without keys, anybody."""
    return current_caller.get().principal.id
