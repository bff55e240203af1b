"""What a request handler holds of its running request: the new tokens of each choice, in order."""

from __future__ import annotations

import asyncio

import msgspec

from engine.protocol import TokenLogprobs
from gateway.errors import ApiError


class Delivery(msgspec.Struct, frozen=True):
    """New tokens of choice `index`; `finish` is "stop" or "length" with the last ones."""

    index: int
    ids: list[int]
    finish: str | None
    cached_tokens: int
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class Generation:
    """All choices of one request. What the reader has not taken is token ids only, so at most max_tokens."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        """Of the choices on the wire, by index."""
        self._pending: list[Delivery] = []
        self._error: ApiError | None = None
        self._changed = asyncio.Event()

    def put(self, delivery: Delivery) -> None:
        self._pending.append(delivery)
        self._changed.set()

    def fail(self, error: ApiError) -> None:
        self._error = self._error or error
        self._changed.set()

    async def next(self) -> list[Delivery]:
        """Everything that has come since the last call; waits for something.

        Raises ApiError when the request has failed, after the tokens before.
        """
        await self._changed.wait()
        if self._pending:
            pending, self._pending = self._pending, []
            if self._error is None:
                self._changed.clear()
            return pending
        assert self._error is not None
        raise self._error
