"""What a request handler holds of its running request: the new tokens of each choice, in order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

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
    """All choices of one request. What the reader has not taken is token ids only, so at most max_tokens.

    One reader; it is woken once for everything that has come until it runs.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        """Of the choices on the wire, by index."""
        self._pending: list[Delivery] = []
        self._error: ApiError | None = None
        self._num_open = len(names)
        self._waiter: asyncio.Future[None] | None = None
        self._waits_for_all = False

    def put(self, delivery: Delivery) -> None:
        self._pending.append(delivery)
        if delivery.finish is not None:
            self._num_open -= 1
        if not self._waits_for_all or self._num_open <= 0:
            self._wake()

    def fail(self, error: ApiError) -> None:
        self._error = self._error or error
        self._wake()

    async def next(self, silence_s: float = 0.0) -> list[Delivery]:
        """Everything that has come since the last call; waits for something, or (not 0) until `silence_s` is over.

        Raises ApiError when the request has failed, after the tokens before.
        """
        if not self._pending and self._error is None:
            await self._wait(silence_s)
        if self._pending or self._error is None:
            pending, self._pending = self._pending, []
            return pending
        raise self._error

    async def all(self) -> list[Delivery]:
        """Everything up to the end of all choices that has not been taken. Raises ApiError, as `next` does."""
        self._waits_for_all = True
        while self._num_open > 0 and self._error is None:
            await self._wait(0.0)
        if self._error is not None:
            raise self._error
        return await self.next()

    async def _wait(self, silence_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(silence_s, self._wake) if silence_s else None
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def joined(deliveries: Sequence[Delivery]) -> list[Delivery]:
    """One delivery a choice: what came while the client was written to goes out in fewer and larger events."""
    by_index: dict[int, Delivery] = {}
    for new in deliveries:
        known = by_index.get(new.index)
        by_index[new.index] = new if known is None else _both(known, new)
    return list(by_index.values())


def _both(first: Delivery, second: Delivery) -> Delivery:
    return Delivery(
        first.index,
        first.ids + second.ids,
        second.finish,
        max(first.cached_tokens, second.cached_tokens),
        first.logprobs if second.logprobs is None else (first.logprobs or []) + second.logprobs,
        second.prompt_logprobs if first.prompt_logprobs is None else first.prompt_logprobs,
    )
