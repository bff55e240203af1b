"""Errors of the gateway.

GatewayError
  SettingsError          a setting is missing or out of range
  ModelDirectoryError    tokenizer or template cannot be used
  TemplateRefused        the chat template does not accept these messages
  ApiError               ends a request with OpenAI's error envelope
"""

from __future__ import annotations

from http import HTTPStatus


class GatewayError(Exception):
    """Base of all errors that this package raises."""


class SettingsError(GatewayError):
    """A setting is missing or out of range."""

    def __init__(self, variable: str, problem: str) -> None:
        super().__init__(f"{variable}: {problem}")
        self.variable = variable


class ModelDirectoryError(GatewayError):
    """The model directory lacks a file, or one that cannot be read."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


class TemplateRefused(GatewayError):
    """The chat template does not accept the messages; the text says why."""


class ApiError(GatewayError):
    """Ends a request: `status` with an envelope of `message`, `kind` (its type), `param` and `code`."""

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["retry-after"] = str(retry_after_s)

    def envelope(self) -> dict[str, object]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the client's fault, in field `param`."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


def context_length_exceeded(message: str, param: str) -> ApiError:
    """400 with the code on which clients shorten their history."""
    return bad_request(message, param, "context_length_exceeded")


def model_not_found(model: str) -> ApiError:
    """404: not the model that is served here."""
    return ApiError(
        HTTPStatus.NOT_FOUND,
        f"The model `{model[:200]}` does not exist here; GET /v1/models lists what does.",
        param="model",
        code="model_not_found",
    )


def queue_full(waiting: int, retry_after_s: int) -> ApiError:
    """429: the admission queue has no room."""
    return ApiError(
        HTTPStatus.TOO_MANY_REQUESTS,
        f"The server is overloaded: {waiting} requests are waiting already. Retry in {retry_after_s} s.",
        kind="rate_limit_error",
        code="queue_full",
        retry_after_s=retry_after_s,
    )


REASON_HEADER = "x-spotserve-reason"


def unavailable(message: str, reason: str = "unavailable", retry_after_s: int = 5) -> ApiError:
    """503: the fleet does not serve the request now; `reason` is for programs: no_pipeline, queue_timeout, draining."""
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        message,
        kind="service_unavailable_error",
        code=reason,
        retry_after_s=retry_after_s,
        headers={REASON_HEADER: reason},
    )


def timed_out(timeout_s: float) -> ApiError:
    """504: the request's own time is over; to send it again would take as long."""
    return ApiError(
        HTTPStatus.GATEWAY_TIMEOUT,
        f"The request was not done in {timeout_s:g} s.",
        kind="timeout_error",
        code="request_timeout",
        headers={REASON_HEADER: "request_timeout", "x-should-retry": "false"},
    )


def server_error(message: str = "The server had an error while processing the request.") -> ApiError:
    """500: our fault, never the input's."""
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, message, kind="server_error")
