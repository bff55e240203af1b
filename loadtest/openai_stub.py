"""An OpenAI server that costs next to nothing: the upstream of a proxy that is to be measured.

    python -m loadtest.openai_stub '{"port": 9000, "texts": ["one", " two"]}'

A streamed answer is one event each `step_s` for every text; any other has all of them at once.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Final

import msgspec

from loadtest.http_load import HOST, LENGTH
from loadtest.scripted_engine import run_until_stopped

MODEL: Final = "bench"
_HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: "
_STREAM_HEAD: Final = _HEAD + b"text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class StubOptions(msgspec.Struct, frozen=True, kw_only=True):
    port: int
    texts: list[str]
    """Of the tokens of every answer."""
    step_s: float = 0.0
    """Between two tokens of a stream, and before the first."""


class Answers:
    """The same bytes for everybody, made once."""

    def __init__(self, options: StubOptions) -> None:
        self.step_s = options.step_s
        num_tokens = len(options.texts)
        usage = {"prompt_tokens": 8, "completion_tokens": num_tokens, "total_tokens": 8 + num_tokens}
        message = {"role": "assistant", "content": "".join(options.texts)}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        whole = msgspec.json.encode({**_header("chat.completion"), "choices": [choice], "usage": usage})
        self.whole = _HEAD + b"application/json\r\nContent-Length: %d\r\n\r\n" % len(whole) + whole
        self.first = _STREAM_HEAD + _event({"role": "assistant", "content": ""}, None)
        self.tokens = [_event({"content": text}, None) for text in options.texts]
        self.last = _event({}, "length") + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Stub(asyncio.Protocol):
    """One connection; a request is whole when its Content-Length has come."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._received = b""
        self._transport: asyncio.Transport | None = None
        self._next: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment] # uvloop's own class

    def connection_lost(self, _error: Exception | None) -> None:
        self._transport = None
        if self._next is not None:
            self._next.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        length = LENGTH.search(self._received[: end + 2]) if end >= 0 else None
        if end < 0 or len(self._received) < end + 4 + (int(length[1]) if length else 0):
            return
        body, self._received = self._received[end + 4 :].replace(b" ", b""), b""
        if b'"stream":true' not in body:
            self._write(self._answers.whole)
        elif self._answers.step_s == 0:
            self._write(self._answers.first + b"".join(self._answers.tokens) + self._answers.last)
        else:
            self._next = asyncio.get_running_loop().call_later(self._answers.step_s, self._token, 0)

    def _token(self, index: int) -> None:
        data = (self._answers.first if index == 0 else b"") + self._answers.tokens[index]
        if index + 1 == len(self._answers.tokens):
            self._write(data + self._answers.last)
            return
        self._write(data)
        self._next = asyncio.get_running_loop().call_later(self._answers.step_s, self._token, index + 1)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


def _header(object_name: str) -> dict[str, object]:
    return {"id": "chatcmpl-stub", "object": object_name, "created": 0, "model": MODEL}


def _event(delta: dict[str, str], finish_reason: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    data = msgspec.json.encode({**_header("chat.completion.chunk"), "choices": [choice]})
    return _chunk(b"data: " + data + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n" % len(data) + data + b"\r\n"


async def serve(options: StubOptions) -> None:
    """Run until cancelled."""
    answers = Answers(options)
    server = await asyncio.get_running_loop().create_server(lambda: Stub(answers), HOST, options.port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    stub_options = msgspec.json.decode(sys.argv[1], type=StubOptions)
    run_until_stopped(lambda: serve(stub_options))
