"""The HTTP application. Nothing happens at import time: `create_app` builds it from its parts."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import orjson
from litestar import Litestar, MediaType, Request, Response
from litestar.datastructures import MutableScopeHeaders, State
from litestar.exceptions import HTTPException
from litestar.types import Message, Scope
from opentelemetry.trace import Tracer

from gateway import openapi
from gateway.errors import ApiError, bad_request, server_error
from gateway.protocol import is_loopback
from gateway.routes import generation, health, metrics, models, responses, tokenize
from gateway.routes.access import identify
from gateway.services.admin_server import AdminServer
from gateway.services.bus import Bus
from gateway.services.caller import current_caller
from gateway.services.dispatcher import Dispatcher
from gateway.services.front import Front, version
from gateway.services.key_file import SharedUsage, WatchedKeys
from gateway.services.listener import listen
from gateway.services.responses import Responses
from gateway.services.tokenizer import TextTokenizer
from gateway.settings import Settings

_log = logging.getLogger(__name__)

_MAX_REQUEST_ID_CHARS = 128


def create_app(settings: Settings, tokenizer: TextTokenizer, tracer: Tracer) -> Litestar:
    """The application; its NATS connection is made at start-up, in the background. `app.state.front` serves it."""
    bus = Bus(settings.nats_url, settings.model, settings.gateway_id)
    dispatcher = Dispatcher(settings, bus)
    keys = WatchedKeys(Path(settings.api_keys)) if settings.api_keys else None
    if keys is not None and not len(keys.ring) and not is_loopback(settings.host):
        _log.warning("%s has no key: nobody can use the API", settings.api_keys)
    front = Front(settings, tokenizer, dispatcher, tracer)
    kept = Responses(front, bus, settings.model)
    admin = _admin_server(settings, front)

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        dispatcher.start()
        admin.start()
        tasks = [asyncio.create_task(run) for run in _key_tasks(settings, keys, bus, dispatcher)]
        try:
            yield
        finally:
            await _end(tasks)
            await kept.close()
            await dispatcher.close()
            await admin.stop()

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
            *([metrics.metrics] if settings.public_metrics else []),
        ],
        lifespan=[lifespan],
        state=State(
            {
                "front": front,
                "api_keys": keys,
                "admin": admin,
                "responses": kept,
                "openapi": openapi.document(version()),
            }
        ),
        exception_handlers={
            ApiError: _on_api_error,
            RecursionError: _on_recursion,
            HTTPException: _on_http_exception,
            Exception: _on_exception,
        },
        before_request=identify,
        before_send=[_add_request_id, _rate_headers(dispatcher)],
        request_max_body_size=settings.max_body_bytes,
        openapi_config=None,
        logging_config=None,
    )


def _admin_server(settings: Settings, front: Front) -> AdminServer:
    """Raises SettingsError if its port is taken."""
    app = Litestar(
        route_handlers=[health.health, health.ready, health.requests, metrics.metrics],
        state=State({"front": front}),
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_exception, Exception: _on_exception},
        openapi_config=None,
        logging_config=None,
    )
    return AdminServer(app, listen(settings.admin_host, settings.admin_port, "SPOTSERVE_GATEWAY_ADMIN_PORT"))


def _key_tasks(
    settings: Settings, keys: WatchedKeys | None, bus: Bus, dispatcher: Dispatcher
) -> list[Coroutine[Any, Any, None]]:
    if keys is None:
        return []
    return [keys.run(), SharedUsage(bus, settings.model, dispatcher.accounts.limits).run()]


async def _end(tasks: Iterable[asyncio.Task[None]]) -> None:
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        # Python 3.11's wait_for, inside the NATS client, loses a cancellation that comes together with its result.
        _, left = await asyncio.wait(left, timeout=0.2)


def _rate_headers(dispatcher: Dispatcher) -> Callable[[Message, Scope], Awaitable[None]]:
    """`x-ratelimit-*` on every response to a key that has limits."""

    async def add(message: Message, _: Scope) -> None:
        key = current_caller.get().principal.key
        if message["type"] == "http.response.start" and key is not None:
            headers = MutableScopeHeaders.from_message(message)
            for name, value in dispatcher.accounts.limits.headers(key, time.time()).items():
                headers[name] = value

    return add


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
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE: lambda: (
            f"The body exceeds {request.app.state.front.settings.max_body_bytes} bytes"
        ),
    }
    message = messages.get(status, lambda: status.phrase)()
    code = "unknown_url" if status is HTTPStatus.NOT_FOUND else None
    api_error = ApiError(status, message, code=code, headers=dict(error.headers or {}))
    return _on_api_error(request, api_error)


def _on_recursion(request: Request[Any, Any, Any], _: RecursionError) -> Response[bytes]:
    """Only values of the request are of any depth: schemas, arguments, what the template is given."""
    return _on_api_error(request, bad_request("The request has a value that is nested too deeply"))


def _on_exception(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _on_api_error(request, server_error())
