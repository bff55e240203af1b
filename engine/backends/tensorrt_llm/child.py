"""The process around an engine: the only one, with those that it starts, that imports TensorRT-LLM.

    python -m engine.backends.tensorrt_llm.child SOCKET

It imports the package while the old engine still serves, builds an engine when it is told to, and from then on passes
requests in and tokens out. Everything that could be decided elsewhere is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import sys
import threading
from typing import Any, Final

from engine.backends.tensorrt_llm.cursor import Cursor
from engine.backends.tensorrt_llm.launch import MARK
from engine.backends.tensorrt_llm.llm import build, import_package, sampling_params
from engine.backends.tensorrt_llm.processes import kill_marked
from engine.backends.tensorrt_llm.wire import (
    Abort,
    Batch,
    Build,
    Built,
    Closed,
    EngineSpec,
    Failed,
    Generate,
    Message,
    Shutdown,
    Tokens,
    encode,
    receive,
)
from engine.errors import EngineUnavailable

ABORT_WAIT_S: Final = 5.0
"""An abort may never be answered: after this its request is forgotten."""


class Child:
    """The conversation with the parent, on one event loop, from which all requests are made."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._llm: Any = None
        self._spec: EngineSpec | None = None
        self._results: dict[int, Any] = {}
        self._readers: dict[int, asyncio.Task[None]] = {}
        self._news: list[Tokens] = []

    async def run(self) -> bool:
        """Until the parent says so; False: it is gone."""
        self._say(import_package())
        while (message := await receive(self._reader)) is not None:
            if isinstance(message, Build):
                self._build(message.spec)
            elif isinstance(message, Generate):
                self._generate(message)
            elif isinstance(message, Abort):
                self._abort(message.id)
            elif isinstance(message, Shutdown):
                await self._shut_down()
                return True
            await self._writer.drain()
        return False

    def _say(self, message: Message) -> None:
        self._writer.write(encode(message))

    def _build(self, spec: EngineSpec) -> None:
        """Blocks: nothing else is to be done meanwhile, and the package wants the main thread."""
        self._spec = spec
        self._llm, phases_s = build(spec)
        self._say(Built(phases_s=phases_s))

    def _generate(self, request: Generate) -> None:
        from tensorrt_llm.llmapi import RequestError

        assert self._spec is not None, "a request before there is an engine"
        try:
            result = self._llm.generate_async(
                inputs=request.token_ids,
                sampling_params=sampling_params(self._spec, request),
                streaming=True,
            )
        except (RequestError, ValueError, TypeError) as error:  # Of its arguments: of this request alone.
            self._tell(Tokens(id=request.id, ended=True, error=in_words(error)))
            return
        self._results[request.id] = result
        self._readers[request.id] = asyncio.create_task(self._read(request, result))

    async def _read(self, request: Generate, result: Any) -> None:
        """Pass on what comes; any exception is the last that is heard of this object."""
        from tensorrt_llm.llmapi import RequestError

        run_id, num_top = request.id, request.sampling.logprobs
        cursor = Cursor(num_top)
        finish_reason, stop_id, error = None, None, None
        try:
            async for output in result:
                news = cursor.read(output.outputs)
                if news is None:
                    continue
                finish_reason, stop_id = news.finish_reason, news.stop_id
                cached_tokens = int(getattr(output, "cached_tokens", 0) or 0)
                self._tell(Tokens(id=run_id, ids=news.ids, logprobs=news.logprobs, cached_tokens=cached_tokens))
                if finish_reason is not None:
                    break
        except asyncio.CancelledError:
            finish_reason = "cancelled"
        except RequestError as caught:
            error = in_words(caught)
        except (AssertionError, ValueError) as caught:
            if num_top is None:
                self._die(caught)
                return
            error = f"logprobs: {in_words(caught)}"  # The lists do not agree; that is of this request alone.
        except Exception as caught:  # noqa: BLE001 - whatever it is, the engine is not to be trusted any more
            self._die(caught)
            return
        self._forget(run_id)
        self._tell(Tokens(id=run_id, ended=True, finish_reason=finish_reason, stop_id=stop_id, error=error))

    def _abort(self, run_id: int) -> None:
        """Asks the engine, and waits for its answer for a while only: it may have dropped the request unheard."""
        result, reader = self._results.get(run_id), self._readers.get(run_id)
        if result is None or reader is None:
            return
        with contextlib.suppress(AttributeError, TypeError):  # The executor is gone; the parent will see it.
            result.abort()
        self._loop.call_later(ABORT_WAIT_S, reader.cancel)

    def _forget(self, run_id: int) -> None:
        self._results.pop(run_id, None)
        self._readers.pop(run_id, None)

    def _tell(self, news: Tokens) -> None:
        if not self._news:
            self._loop.call_soon(self._flush)
        self._news.append(news)

    def _flush(self) -> None:
        news, self._news = self._news, []
        self._say(Batch(tokens=news))

    def _die(self, error: Exception) -> None:
        if self._news:
            self._flush()
        self._say(Failed(cause=in_words(error)))

    async def _shut_down(self) -> None:
        """In a thread of its own: it may hang for ever, and the parent kills us then."""
        if self._llm is not None:
            done: asyncio.Future[None] = self._loop.create_future()

            def shut_down() -> None:
                with contextlib.suppress(Exception):
                    self._llm.shutdown()
                self._loop.call_soon_threadsafe(done.set_result, None)

            threading.Thread(target=shut_down, daemon=True).start()
            await done
        self._say(Closed())
        await self._writer.drain()


def in_words(error: BaseException) -> str:
    """The error and what it was caused by, in one line."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < 3:
        text = str(cause).strip().partition("\n")[0]
        parts.append(f"{type(cause).__name__}: {text}" if text else type(cause).__name__)
        cause = cause.__cause__
    return ", from ".join(parts)


def _end_with(parent: socket.socket) -> None:
    """Kill our process group when the parent is gone, also while the engine is built.

    By the socket and not by standard input: launchers run us in the background, without one.
    """
    ends = select.poll()
    ends.register(os.dup(parent.fileno()), select.POLLRDHUP)

    def watch() -> None:
        ends.poll()
        _kill_all()

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _kill_all() -> None:
    kill_marked(os.environ.get(MARK) or "none")  # Workers are in groups of their own where MPI starts them.
    os.killpg(os.getpgid(0), signal.SIGKILL)


async def _main(socket_path: str) -> int:
    reader, writer = await asyncio.open_unix_connection(socket_path)
    _end_with(writer.get_extra_info("socket"))
    try:
        if not await Child(reader, writer).run():
            _kill_all()
    except Exception as error:  # noqa: BLE001 - the parent must hear of it, whatever it is
        cause = str(error) if isinstance(error, EngineUnavailable) else in_words(error)
        writer.write(encode(Failed(cause=cause)))
        await writer.drain()
        while (
            await receive(reader) is not None
        ):  # Were we gone, what the parent sends now would cost it our last words.
            pass
        return 1
    finally:
        writer.close()
    return 0


def main() -> None:
    """Run, and end at once: TensorRT-LLM's exit handlers may hang."""
    code = asyncio.run(_main(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
