"""The OpenAPI document, made from the types that bodies are decoded with, and a page that shows it."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from litestar import MediaType, Request, Response, get
from litestar.types import ASGIApp

from gateway.core.responses import ResponseBody
from gateway.openai import ChatBody, CompletionBody
from gateway.routes.replies import JsonReply
from gateway.routes.tokenize import DetokenizeBody, TokenizeBody

_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_CREATED: Final[dict[str, tuple[str, type, bool]]] = {
    "/v1/chat/completions": ("Answer a conversation", ChatBody, True),
    "/v1/completions": ("Continue prompts", CompletionBody, True),
    "/v1/responses": ("Answer an input", ResponseBody, True),
    "/tokenize": ("Token ids of a text or of messages", TokenizeBody, False),
    "/detokenize": ("Text of token ids", DetokenizeBody, False),
}
_READ: Final = {
    "/v1/models": "The model that is served",
    "/health": "Whether the process answers",
    "/ready": "Whether a request sent now would be served",
    "/version": "Of this software",
}
_BY_ID: Final = {
    ("get", "/v1/models/{model_id}"): "One model",
    ("get", "/v1/responses/{response_id}"): "A response that was kept",
    ("delete", "/v1/responses/{response_id}"): "Forget a response",
    ("post", "/v1/responses/{response_id}/cancel"): "Stop a response that runs in the background",
}
_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>SpotServe API</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
code { font: 13px ui-monospace, monospace; } summary { cursor: pointer; padding: .4rem 0; }
table { border-collapse: collapse; width: 100%; } td, th { border-bottom: 1px solid #ddd; padding: .2rem .5rem;
text-align: left; vertical-align: top; } b { display: inline-block; width: 4.5rem; }
</style></head><body><h1>SpotServe API</h1>
<p>OpenAI-compatible. The document itself: <a href="/openapi.json">/openapi.json</a>.</p><div id="paths"></div>
<script>
const cell = (row, text) => { const td = row.insertCell(); const code = document.createElement("code");
  code.textContent = text; td.append(code); };
const kind = (s) => s.anyOf ? s.anyOf.map(kind).join(" | ") : s.$ref ? s.$ref.split("/").pop()
  : s.enum ? s.enum.join(" | ") : s.type || "any";
const limits = (s) => ["minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength", "default"]
  .filter((k) => k in s).map((k) => k + " " + JSON.stringify(s[k])).join(", ") || (s.anyOf || []).map(limits).join(" ");
fetch("/openapi.json").then((r) => r.json()).then((api) => {
  for (const [path, methods] of Object.entries(api.paths)) for (const [method, operation] of Object.entries(methods)) {
    const details = document.createElement("details"); const summary = document.createElement("summary");
    const b = document.createElement("b"); b.textContent = method.toUpperCase();
    const code = document.createElement("code"); code.textContent = path;
    summary.append(b, code, " \\u2013 " + operation.summary); details.append(summary);
    const body = operation.requestBody;
    if (body) {
      const name = body.content["application/json"].schema.$ref.split("/").pop();
      const table = document.createElement("table"); const schema = api.components.schemas[name];
      for (const [field, s] of Object.entries(schema.properties)) {
        const row = table.insertRow();
        cell(row, field + (schema.required.includes(field) ? " *" : "")); cell(row, kind(s)); cell(row, limits(s));
      }
      details.append(table);
    }
    document.getElementById("paths").append(details);
  }
});
</script></body></html>
"""


@get("/openapi.json", sync_to_thread=False)
def openapi_json(request: Request[Any, Any, Any]) -> ASGIApp:
    """The OpenAPI document."""
    return JsonReply(request.app.state.openapi)


@get("/docs", sync_to_thread=False)
def docs() -> Response[str]:
    """A page that shows it."""
    return Response(_PAGE, media_type=MediaType.HTML)


def document(version: str) -> dict[str, Any]:
    """OpenAPI 3.1 of all that clients call."""
    bodies = [body for _, body, _ in _CREATED.values()]
    schemas, components = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    paths: dict[str, dict[str, Any]] = {}
    for (path, (summary, _, streams)), schema in zip(_CREATED.items(), schemas, strict=True):
        content = {"application/json": {"schema": schema}}
        operation = _operation("post", path, summary, streams=streams)
        paths[path] = {"post": {**operation, "requestBody": {"required": True, "content": content}}}
    for path, summary in _READ.items():
        paths.setdefault(path, {})["get"] = _operation("get", path, summary)
    for (method, path), summary in _BY_ID.items():
        paths.setdefault(path, {})[method] = _operation(method, path, summary)
    return {
        "openapi": "3.1.0",
        "info": {"title": "SpotServe", "version": version, "description": "An OpenAI-compatible language model."},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(method: str, path: str, summary: str, *, streams: bool = False) -> dict[str, Any]:
    answer: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        answer["text/event-stream"] = {"schema": {"type": "string"}}
    error = {
        "description": "The error",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    ready = {"503": {"description": "Not ready", "content": answer}} if path == "/ready" else {"5XX": error}
    name = path.partition("{")[2].partition("}")[0]
    parameter = {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {
        "summary": summary,
        "operationId": method + path.translate(str.maketrans("/{}", "_  ")).replace(" ", ""),
        "responses": {"200": {"description": "The answer", "content": answer}, "4XX": error, **ready},
        **({"parameters": [parameter]} if name else {}),
    }
