"""GET /health (alive), /ready (a pipeline would take a request), and what runs now for operators on this machine."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from litestar import HttpMethod, Request, get, route
from litestar.exceptions import NotFoundException
from litestar.types import ASGIApp

from gateway.routes.replies import JsonReply
from gateway.services.front import Front

_LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")


_READ = (HttpMethod.GET, HttpMethod.HEAD)
"""Health checks of balancers and containers often ask for the status alone."""


@route("/health", http_method=_READ)
async def health() -> ASGIApp:
    """200 for as long as the process answers."""
    return JsonReply({"status": "alive"})


@route("/ready", http_method=_READ)
async def ready(request: Request[Any, Any, Any]) -> ASGIApp:
    """200 if a pipeline would take a request now, else 503 with the reason."""
    front: Front = request.app.state.front
    reason = front.dispatcher.not_ready_reason()
    if reason is None:
        return JsonReply({"status": "ready"})
    return JsonReply({"status": "not ready", "reason": reason}, HTTPStatus.SERVICE_UNAVAILABLE, {"retry-after": "1"})


@get("/internal/requests")
async def requests(request: Request[Any, Any, Any]) -> ASGIApp:
    """Counts of choices that run and wait; loopback only."""
    front: Front = request.app.state.front
    if request.client is None or request.client.host not in _LOOPBACK:
        raise NotFoundException
    return JsonReply(front.dispatcher.counts())
