"""What `vllm bench serve` sends, and how it reads the answer; vLLM itself is not needed.

Its reader is strict where other clients are not: events are what stands between blank lines, each must begin with
`data: `, the first one with choices is the first token, and usage counts only in one without choices.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

import httpx
import msgspec

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"
TIMEOUT_S: Final = 60.0
_DATA: Final = "data: "
_DONE: Final = "[DONE]"


class Shape(msgspec.Struct, frozen=True):
    """One kind of its requests."""

    name: str
    path: str
    body: dict[str, Any]
    num_choices: int = 1


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """As the tool would count it, and beyond: it takes a stream that ends early for a success."""

    shape: str
    num_output_tokens: int
    num_chunks: int
    """With choices: one a token, unless tokens came together."""
    first_token_s: float | None
    error: str = ""


def shapes(model: str, prompt: str, prompt_ids: Sequence[int], num_tokens: int) -> list[Shape]:
    """Text, token ids, batches of token ids, and chat with content in parts; each `num_tokens` long."""
    common = {"model": model, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    completion = {**common, "repetition_penalty": 1.0, "max_tokens": num_tokens, "logprobs": None, "temperature": 0.0}
    parts = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
    ids = list(prompt_ids)
    return [
        Shape("completions, text", COMPLETIONS, {**completion, "prompt": prompt}),
        Shape("completions, ids", COMPLETIONS, {**completion, "prompt": ids}),
        Shape("completions, batch of ids", COMPLETIONS, {**completion, "prompt": [ids, ids[1:]]}, 2),
        Shape("chat", CHAT, {**common, "messages": parts, "max_completion_tokens": num_tokens, "temperature": 0.0}),
    ]


async def replay(endpoint: str, all_shapes: Sequence[Shape], num_requests: int, concurrency: int) -> list[Outcome]:
    """`num_requests` of each shape, `concurrency` at once."""
    slots = asyncio.Semaphore(concurrency)
    headers = {"Authorization": "Bearer none"}
    async with httpx.AsyncClient(base_url=endpoint, headers=headers, timeout=TIMEOUT_S, trust_env=False) as client:

        async def one(shape: Shape, number: int) -> Outcome:
            async with slots:
                return await _send(client, shape, f"{shape.name.replace(' ', '-')}-{number}")

        sent = [one(shape, number) for number in range(num_requests) for shape in all_shapes]
        return list(await asyncio.gather(*sent))


async def _send(client: httpx.AsyncClient, shape: Shape, request_id: str) -> Outcome:
    began_s, first_token_s = time.perf_counter(), None
    num_chunks = num_tokens = 0
    error = ""
    try:
        async with client.stream(
            "POST", shape.path, json=shape.body, headers={"x-request-id": request_id.replace(",", "")}
        ) as response:
            if response.status_code != httpx.codes.OK:
                error = f"HTTP {response.status_code}: {(await response.aread())[:200]!r}"
            else:
                async for data in _events(response.aiter_bytes()):
                    if data.get("choices"):
                        first_token_s = first_token_s or time.perf_counter() - began_s
                        num_chunks += 1
                    elif data.get("usage"):
                        num_tokens = data["usage"]["completion_tokens"]
    except (httpx.HTTPError, ValueError) as problem:
        error = repr(problem)[:200]
    return Outcome(
        shape=shape.name,
        num_output_tokens=num_tokens,
        num_chunks=num_chunks,
        first_token_s=first_token_s,
        error=error or _shortfall(shape, num_tokens, first_token_s),
    )


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[Mapping[str, Any]]:
    """JSON of each event; ValueError for what that reader cannot read."""
    buffer, is_done = "", False
    async for chunk in chunks:
        buffer += chunk.decode("utf-8")
        while "\n\n" in buffer:
            event, buffer = buffer.split("\n\n", 1)
            text = event.strip().removeprefix(_DATA)
            if text == _DONE:
                is_done = True
            elif text and not text.startswith(":"):
                yield json.loads(text)
    if not is_done:
        raise ValueError("the stream ended without [DONE]")


def _shortfall(shape: Shape, num_tokens: int, first_token_s: float | None) -> str:
    wanted = shape.num_choices * (shape.body.get("max_tokens") or shape.body["max_completion_tokens"])
    if first_token_s is None:
        return "no token came"
    return "" if num_tokens == wanted else f"{num_tokens} tokens instead of {wanted}"
