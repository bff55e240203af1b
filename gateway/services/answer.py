"""From the running request to its answer: one fold a choice, as a stream of events or as one body."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, Protocol

from gateway.core import sse
from gateway.core.fold import ChoiceFold, Delta, merge
from gateway.core.response_format import ResponseFormat, Usage
from gateway.errors import ApiError
from gateway.services.dispatcher import Dispatcher
from gateway.services.generation import Delivery, Generation, joined
from gateway.telemetry import RequestTrace


class Writer(Protocol):
    """Takes a part of a body without waiting."""

    @property
    def ready(self) -> bool:
        """Whether `write` may be called now."""
        ...

    def write(self, data: bytes) -> None: ...


class Answer:
    """The answer to one request. Call `close` at the end, whatever happens: it stops what still runs."""

    def __init__(
        self,
        answer_id: str,
        dispatcher: Dispatcher,
        generation: Generation,
        response_format: ResponseFormat,
        folds: Sequence[ChoiceFold],
        num_prompt_tokens: int,
        trace: RequestTrace,
        *,
        num_drawn: int = 1,
        num_kept: int = 1,
    ) -> None:
        """`folds` by choice; of each prompt's `num_drawn` choices the `num_kept` best are answered."""
        self.id = answer_id
        self._dispatcher = dispatcher
        self._generation = generation
        self._format = response_format
        self._folds = folds
        self._num_open = len(folds)
        """Choices that have not finished."""
        self._can_end_early = any(fold.can_end_early for fold in folds)
        self._num_drawn, self._num_kept = num_drawn, num_kept
        self._num_prompt_tokens = num_prompt_tokens
        self._num_cached_tokens = 0
        self._trace = trace
        self._outcome: str | None = "client disconnected"
        self._closed = False

    @property
    def usage(self) -> Usage:
        """So far."""
        num_completion_tokens = sum(fold.num_tokens for fold in self._folds)
        num_reasoning_tokens = sum(fold.num_reasoning_tokens for fold in self._folds)
        return Usage(self._num_prompt_tokens, num_completion_tokens, self._num_cached_tokens, num_reasoning_tokens)

    def _usage_now(self) -> Usage:
        return self.usage

    async def deltas(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """(choice, delta) until all choices have finished. Raises ApiError if the request fails."""
        try:
            while self._num_open:
                yield self._fold_new(await self._generation.next())
        except ApiError as error:
            self._outcome = error.message
            raise
        self._outcome = None

    async def body(self) -> dict[str, Any]:
        """The whole answer. Raises ApiError."""
        parts: list[list[Delta]] = [[] for _ in self._folds]
        async for deltas in self.deltas() if self._can_end_early else self._all_at_once():
            for index, delta in deltas:
                parts[index].append(delta)
        return self._format.body([merge(parts[index]) for index in self._kept()], self.usage)

    async def _all_at_once(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """As `deltas`, and without waking up for every token."""
        try:
            yield self._fold_new(await self._generation.all())
        except ApiError as error:
            self._outcome = error.message
            raise
        self._outcome = None

    def _kept(self) -> list[int]:
        """The choices that are answered: of each prompt those whose tokens were likeliest on average."""

        def mean_logprob(index: int) -> float:
            fold = self._folds[index]
            return fold.sum_logprob / max(1, fold.num_tokens)

        if self._num_kept == self._num_drawn:
            return list(range(len(self._folds)))
        kept: list[int] = []
        for first in range(0, len(self._folds), self._num_drawn):
            drawn = range(first, first + self._num_drawn)
            kept += sorted(drawn, key=mean_logprob, reverse=True)[: self._num_kept]
        return kept

    def events(self, *, include_usage: bool, continuous_usage: bool, keep_alive_s: float) -> EventStream:
        """The stream; after `keep_alive_s` without an event (0: never) a comment is sent."""
        return EventStream(self, self._generation, include_usage, continuous_usage, keep_alive_s)

    @property
    def has_finished(self) -> bool:
        """All choices have."""
        return not self._num_open

    def end(self, error: ApiError | None) -> None:
        """Everything has been told, up to `error`."""
        self._outcome = error.message if error is not None else None

    def close(self, cause: str | None = None) -> None:
        """Stop what still runs, for `cause` (None: the client has gone); does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        if cause is not None:
            self._outcome = cause
        self._dispatcher.cancel(self._generation)
        self._generation.at_once = None  # it leads back here: a cycle, which only the collector would find
        usage = self.usage
        self._trace.end(
            prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens, error=self._outcome
        )

    def _fold_new(self, deliveries: Sequence[Delivery]) -> list[tuple[int, Delta]]:
        deltas = []
        for delivery in deliveries if len(deliveries) == 1 else joined(deliveries):
            fold = self._folds[delivery.index]
            if fold.finish_reason is not None:
                continue
            self._num_cached_tokens = max(self._num_cached_tokens, delivery.cached_tokens)
            delta = fold.push(delivery.ids, delivery.finish, delivery.logprobs, delivery.prompt_logprobs)
            deltas.append((delivery.index, delta))
            if delta.finish_reason is not None:
                self._num_open -= 1
                if delivery.finish is None:
                    # A stop string: the engine does not know that it is done.
                    self._dispatcher.cancel(self._generation, delivery.index)
        return deltas

    def encode_new(self, deliveries: Sequence[Delivery], *, include_usage: bool, continuous_usage: bool) -> bytes:
        """The events of what has come, with the end of the stream if that was all."""
        with_usage = include_usage or continuous_usage
        usage = self._usage_now if continuous_usage else None
        data = b""
        for index, delta in self._fold_new(deliveries):
            data += self._format.events(index, delta, usage, with_usage=with_usage)
        if self._num_open:
            return data
        last = sse.event(self._format.usage_chunk(self.usage)) if include_usage else b""
        return data + last + sse.DONE


class EventStream:
    """The events of an answer, a few at a time: `async for`.

    An error before the first one is raised, a later one is an event. While the reader waits, events go to the writer
    that it has named, if there is one: without a switch of tasks.
    """

    def __init__(
        self,
        answer: Answer,
        generation: Generation,
        include_usage: bool,
        continuous_usage: bool,
        keep_alive_s: float,
    ) -> None:
        self._answer, self._generation = answer, generation
        self._include_usage, self._continuous_usage = include_usage, continuous_usage
        self._keep_alive_s = keep_alive_s
        self._began = False
        self.has_ended = False
        """What was given last is the end."""
        self._last = b""
        """What `_write_at_once` has left to the reader: the end."""
        self._fault: Exception | None = None

    def write_to(self, writer: Writer) -> None:
        """Write to `writer`, whenever it is ready, what comes while the reader waits."""
        self._generation.at_once = partial(self._write_at_once, writer)

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> bytes:
        while not self.has_ended:
            try:
                deliveries = await self._generation.next(self._keep_alive_s)
            except ApiError as error:
                self._answer.end(error)
                self.has_ended = True
                if not self._began:
                    raise
                return sse.event(error.envelope()) + sse.DONE
            if self._fault is not None:
                raise self._fault
            data = self._last or self._encode(deliveries)
            if self._answer.has_finished:
                self._answer.end(None)
                self.has_ended = True
            if data:
                return data
            if not deliveries and self._began:
                return sse.KEEP_ALIVE
        raise StopAsyncIteration

    def _encode(self, deliveries: Sequence[Delivery]) -> bytes:
        if not deliveries:
            return b""
        self._began = True
        return self._answer.encode_new(
            deliveries, include_usage=self._include_usage, continuous_usage=self._continuous_usage
        )

    def _write_at_once(self, writer: Writer) -> bool:
        if not writer.ready:
            return False
        try:
            data = self._encode(self._generation.take())
            if self._answer.has_finished:
                self._last = data
                return False
            if data:
                writer.write(data)
        except Exception as error:  # noqa: BLE001 # of this request; whoever tells has others to tell
            self._fault = error
            return False
        return True
