"""A conversation with the served model: each answer is streamed, and the history grows by it."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from typing import Any

import httpx

from deploy.errors import CommandError

CONNECT_TIMEOUT_S = 5.0


class Conversation:
    """Asks `endpoint` (`http://host:port`); one conversation has one history."""

    def __init__(
        self,
        client: httpx.Client,
        model: str,
        *,
        system: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
    ) -> None:
        self._client = client
        self._options = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer's pieces as they come.

        An answer that is cut short (the iterator is closed) stays in the history as far as it came; a question
        that failed does not stay. Raises CommandError.
        """
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            for piece in self._stream():
                pieces.append(piece)
                yield piece
        except CommandError:
            self.messages.pop()
            raise
        except (GeneratorExit, KeyboardInterrupt):
            self._keep(pieces)
            raise
        self._keep(pieces)

    def _keep(self, pieces: list[str]) -> None:
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _stream(self) -> Iterator[str]:
        given = {name: value for name, value in self._options.items() if value is not None}
        body = {**given, "messages": self.messages, "stream": True}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    raise CommandError(_error_of(response.status_code, response.read()))
                for line in response.iter_lines():
                    yield from _pieces_of(line)
        except httpx.HTTPError as error:
            raise CommandError(f"the connection to the gateway failed: {error}") from error


def open_client(endpoint: str, api_key: str | None = None, tls_cert: str | None = None) -> httpx.Client:
    """No limit between tokens: a request may wait for capacity. Raises CommandError for a certificate without use."""
    verify: ssl.SSLContext | bool = True
    if tls_cert is not None:
        try:
            verify = ssl.create_default_context(cafile=tls_cert)
        except (OSError, ssl.SSLError) as error:
            raise CommandError(f"cannot read the certificate {tls_cert}: {error}") from error
        # It is this very certificate that is trusted; its names need not include this machine's loopback address.
        verify.check_hostname = False
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
    return httpx.Client(base_url=endpoint, headers=headers, timeout=timeout, verify=verify, trust_env=False)


def _pieces_of(line: str) -> Iterator[str]:
    """The text in one line of the event stream; raises CommandError for an error event."""
    if not line.startswith("data:"):
        return
    payload = line.removeprefix("data:").strip()
    if payload == "[DONE]":
        return
    event: dict[str, Any] = json.loads(payload)
    if "error" in event:
        raise CommandError(event["error"].get("message", "the gateway reported an error"))
    for choice in event.get("choices", []):
        if piece := choice.get("delta", {}).get("content"):
            yield piece


def _error_of(status: int, body: bytes) -> str:
    try:
        return f"{json.loads(body)['error']['message']} (HTTP {status})"
    except (ValueError, KeyError, TypeError):
        return f"the gateway answered with HTTP {status}"
