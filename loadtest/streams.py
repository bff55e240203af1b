"""Clients of a stack: streams that begin again as soon as they end, with the time of every chunk."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Final

import httpx
import msgspec

from loadtest.errors import StreamError
from loadtest.pauses import StreamLog

REQUEST_TIMEOUT_S: Final = 300.0
FIRST_TOKEN_ID: Final = 100
LAST_TOKEN_ID: Final = 250
"""In every vocabulary."""


class Traffic:
    """`async with Traffic(...)`: `num_streams` streams, each greedy over a prompt of its own, again and again.

    Raises StreamError from `check` and `progress` once a stream has failed.
    """

    def __init__(self, endpoint: str, model: str, *, num_streams: int, num_prompt_tokens: int, num_tokens: int) -> None:
        self._client = httpx.AsyncClient(base_url=endpoint, timeout=REQUEST_TIMEOUT_S, trust_env=False)
        self._model = model
        self._num_tokens = num_tokens
        draw = random.Random(0)
        self._prompts = [
            [draw.randint(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(num_prompt_tokens)] for _ in range(num_streams)
        ]
        self._workers: list[asyncio.Task[None]] = []
        self._open: list[StreamLog] = [StreamLog() for _ in self._prompts]
        self._num_chunks = [0] * num_streams
        self.logs: list[StreamLog] = []
        """Of all streams, ended and open."""

    async def __aenter__(self) -> Traffic:
        self._workers = [asyncio.create_task(self._work(index)) for index in range(len(self._prompts))]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        await self._client.aclose()

    def check(self) -> None:
        """Raise what has ended a stream, if something has."""
        for worker in self._workers:
            if worker.done():
                worker.result()

    def progress(self) -> list[int]:
        """Chunks that each stream has brought so far, over all its requests."""
        self.check()
        return list(self._num_chunks)

    def mean_context_tokens(self) -> float:
        """Prompt and generated tokens of the streams as they are now."""
        return sum(len(p) + log.num_tokens for p, log in zip(self._prompts, self._open, strict=True)) / len(self._open)

    async def _work(self, index: int) -> None:
        while True:
            log = StreamLog()
            self._open[index] = log
            self.logs.append(log)
            try:
                await self._stream(index, log)
            except httpx.HTTPError as error:
                raise StreamError(log.request_id, f"{type(error).__name__}: {error}") from error
            if log.num_tokens != self._num_tokens:
                raise StreamError(log.request_id, f"ended after {log.num_tokens} of {self._num_tokens} tokens")

    async def _stream(self, index: int, log: StreamLog) -> None:
        body = {
            "model": self._model,
            "prompt": self._prompts[index],
            "max_tokens": self._num_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        async for chunk in read_chunks(self._client, body):
            log.request_id = chunk["id"]
            num_tokens = sum(len(choice.get("token_ids") or []) for choice in chunk["choices"])
            if num_tokens:
                log.num_tokens += num_tokens
                log.chunk_times_s.append(time.time())
                self._num_chunks[index] += 1


async def read_chunks(client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The chunks of one streamed completion; raises StreamError for an error in place of one."""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.is_error:
            raise StreamError("", f"HTTP {response.status_code}: {(await response.aread()).decode(errors='replace')}")
        async for line in response.aiter_lines():
            payload = line.removeprefix("data: ")
            if payload == line or payload == "[DONE]":
                continue
            chunk: dict[str, Any] = msgspec.json.decode(payload)
            if "error" in chunk:
                raise StreamError("", chunk["error"]["message"])
            yield chunk
