"""One trace a request, from the gateway through the engine, also over a preemption; a real OTLP receiver hears it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.e2e.stack import Answer, Prompt, Session, Stack
from tests.tiny_model import make_tiny_model


class Receiver(ThreadingHTTPServer):
    """Keeps every span that is sent to /v1/traces."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                message = ExportTraceServiceRequest.FromString(body)
                for resource in message.resource_spans:
                    for scope in resource.scope_spans:
                        spans.extend(scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


async def test_one_trace_a_request(tmp_path: Path, receiver: Receiver) -> None:
    model = make_tiny_model(tmp_path / "tiny", max_len=4096)
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.server_port}",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "SPOTSERVE_ENGINE_KV_TRANSFER": "always",
    }
    stack = Stack(tmp_path / "state", model, "--instances", "2", "--dtype", "float32", environ=environ).start()
    try:
        async with Session(stack) as session:
            await session.quiet(2)
            answer = Answer()
            prompt = Prompt(ids=tuple(range(5, 30)), max_tokens=3500)
            task = asyncio.create_task(session.stream(prompt, answer))
            await session.until(lambda: len(answer.ids) >= 3, "tokens")
            victim = await session.serving_instance()
            await session.preempt(victim, 2.5)
            await session.until_gone(victim)
            await task
            assert answer.error is None
            await session.until(lambda: any(s.name == "text_completion" for s in receiver.spans), "the server span")
            (root,) = [s for s in receiver.spans if s.name == "text_completion"]
            wanted = {"queue", "attempt", "engine.generate", "engine.prefill", "engine.decode", "engine.resume"}

            def names() -> list[str]:
                return [s.name for s in receiver.spans if s.trace_id == root.trace_id]

            await session.until(lambda: wanted <= set(names()), f"{wanted} in one trace; there are {names()}")
            # Each rank sends its spans at its own time.
            await session.until(lambda: names().count("engine.generate") == 2, f"both attempts; there are {names()}")
            assert names().count("attempt") == 2
    finally:
        stack.stop()
