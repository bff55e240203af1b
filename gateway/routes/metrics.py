"""GET /metrics: Prometheus' text."""

from __future__ import annotations

from typing import Any

from litestar import Request, get
from litestar.types import ASGIApp

from gateway.routes.replies import BytesReply
from gateway.services.front import Front
from gateway.services.metrics import CONTENT_TYPE


@get("/metrics")
async def metrics(request: Request[Any, Any, Any]) -> ASGIApp:
    """Counters of this gateway and of the fleet behind it."""
    front: Front = request.app.state.front
    front.dispatcher.observe()
    return BytesReply(front.dispatcher.accounts.metrics.text(), CONTENT_TYPE)
