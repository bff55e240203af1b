"""The HTTP application. Nothing happens at import time: `create_app` builds it from its parts."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import orjson
from litestar import Litestar, MediaType, Request, Response
from litestar.datastructures import MutableScopeHeaders, State
from litestar.exceptions import HTTPException
from litestar.types import Message, Scope
from opentelemetry.trace import Tracer

from gateway import openapi
from gateway.errors import ApiError, server_error
from gateway.routes import generation, health, models, responses, tokenize
from gateway.services.bus import Bus
from gateway.services.dispatcher import Dispatcher
from gateway.services.front import Front, version
from gateway.services.responses import Responses
from gateway.services.tokenizer import TextTokenizer
from gateway.settings import Settings

_log = logging.getLogger(__name__)

_MAX_BODY_BYTES = 8 * 1024 * 1024
_MAX_REQUEST_ID_CHARS = 128


def create_app(settings: Settings, tokenizer: TextTokenizer, tracer: Tracer) -> Litestar:
    """The application; its NATS connection is made at start-up, in the background. `app.state.front` serves it."""
    bus = Bus(settings.nats_url, settings.model, settings.gateway_id)
    dispatcher = Dispatcher(settings, bus)
    front = Front(settings, tokenizer, dispatcher, tracer)
    kept = Responses(front, bus, settings.model)

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        dispatcher.start()
        try:
            yield
        finally:
            await kept.close()
            await dispatcher.close()

    return Litestar(
        route_handlers=[
            generation.chat_completions,
            generation.completions,
            models.list_models,
            models.get_model,
            responses.create_response,
            responses.get_response,
            responses.cancel_response,
            responses.delete_response,
            tokenize.tokenize,
            tokenize.detokenize,
            tokenize.version,
            openapi.openapi_json,
            openapi.docs,
            health.health,
            health.ready,
            health.requests,
        ],
        lifespan=[lifespan],
        state=State({"front": front, "responses": kept, "openapi": openapi.document(version())}),
        exception_handlers={
            ApiError: _on_api_error,
            HTTPException: _on_http_exception,
            Exception: _on_exception,
        },
        before_send=[_add_request_id],
        request_max_body_size=_MAX_BODY_BYTES,
        openapi_config=None,
        logging_config=None,
    )


async def _add_request_id(message: Message, scope: Scope) -> None:
    """`x-request-id` on every response: the client's own if it sent a usable one."""
    if message["type"] != "http.response.start":
        return
    given = next((v for k, v in scope["headers"] if k == b"x-request-id"), b"").decode("latin-1")
    usable = 0 < len(given) <= _MAX_REQUEST_ID_CHARS and given.isascii() and given.isprintable()
    headers = MutableScopeHeaders.from_message(message)
    headers["x-request-id"] = given if usable else f"req-{secrets.token_hex(12)}"


def _on_api_error(_: Request[Any, Any, Any], error: ApiError) -> Response[bytes]:
    return Response(
        orjson.dumps(error.envelope()),
        status_code=error.status,
        headers=error.headers,
        media_type=MediaType.JSON,
    )


def _on_http_exception(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """The framework's own refusals (route, method, size) in OpenAI's envelope."""
    if error.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return _on_exception(request, error)
    status = HTTPStatus(error.status_code)
    path, method = request.url.path[:200], request.method
    messages: dict[HTTPStatus, Callable[[], str]] = {
        HTTPStatus.NOT_FOUND: lambda: f"Unknown URL: {method} {path}",
        HTTPStatus.METHOD_NOT_ALLOWED: lambda: f"{path} does not take {method}",
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE: lambda: f"The body exceeds {_MAX_BODY_BYTES} bytes",
    }
    message = messages.get(status, lambda: status.phrase)()
    code = "unknown_url" if status is HTTPStatus.NOT_FOUND else None
    api_error = ApiError(status, message, code=code, headers=dict(error.headers or {}))
    return _on_api_error(request, api_error)


def _on_exception(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _on_api_error(request, server_error())
