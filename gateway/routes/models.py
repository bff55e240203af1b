"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from litestar import Request, get
from litestar.types import ASGIApp

from gateway.routes.replies import JsonReply
from gateway.services.front import Front


@get("/v1/models")
async def list_models(request: Request[Any, Any, Any]) -> ASGIApp:
    """The one model."""
    return JsonReply({"object": "list", "data": [_model(request.app.state.front)]})


# Ids may have slashes, and clients send them escaped or not: the server unescapes both.
@get("/v1/models/{model_id:path}")
async def get_model(request: Request[Any, Any, Any]) -> ASGIApp:
    """It, by its id; 404 for any other."""
    front: Front = request.app.state.front
    front.check_model(str(request.path_params["model_id"]).removeprefix("/"))
    return JsonReply(_model(front))


def _model(front: Front) -> dict[str, object]:
    return {
        "id": front.model_name,
        "object": "model",
        "created": front.started_s,
        "owned_by": "spotserve",
        "max_model_len": front.max_model_len,
    }
