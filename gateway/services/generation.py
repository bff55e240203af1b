"""What a request handler holds of its running request: the new tokens of each choice, in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

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

    One reader. While it waits, `at_once` is tried first; it is woken if that does not do it, once for everything that
    has come until it runs.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        """Of the choices on the wire, by index."""
        self.at_once: Callable[[], bool] | None = None
        """Called when something has come: may `take` it, without a switch of tasks. False: wake the reader."""
        self._pending: list[Delivery] = []
        self._error: ApiError | None = None
        self._num_open = len(names)
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waits_for_all = False
        self._told_s = 0.0

    def put(self, delivery: Delivery) -> None:
        """Keep it for `tell`."""
        self._pending.append(delivery)
        if delivery.finish is not None:
            self._num_open -= 1

    def tell(self) -> None:
        """Hand on what was put."""
        waiter = self._waiter
        if not self._pending or waiter is None or waiter.done():
            return
        if self._waits_for_all and self._num_open > 0:
            return
        if self.at_once is not None and self.at_once():
            self._told_s = waiter.get_loop().time()
        else:
            self._wake()

    def take(self) -> list[Delivery]:
        """Everything that has come and was not taken."""
        pending, self._pending = self._pending, []
        return pending

    def fail(self, error: ApiError) -> None:
        self._error = self._error or error
        self._wake()

    async def next(self, silence_s: float = 0.0) -> list[Delivery]:
        """Everything that has come since the last call; waits for something, or (not 0) until `silence_s` is over.

        Empty also if `at_once` has left something else to do. Raises ApiError when the request has failed, after the
        tokens before.
        """
        if not self._pending and self._error is None:
            await self._wait(silence_s)
        if self._pending or self._error is None:
            return self.take()
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
        self._told_s = loop.time()
        if silence_s:
            self._timer = loop.call_later(silence_s, self._look, silence_s)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _look(self, silence_s: float) -> None:
        """Wake the reader if nothing has come for so long."""
        loop = asyncio.get_running_loop()
        left_s = self._told_s + silence_s - loop.time()
        if left_s > 0:
            self._timer = loop.call_later(left_s, self._look, silence_s)
        else:
            self._wake()

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
