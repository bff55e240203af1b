"""Speed of the gateway alone: a scripted engine behind it, a load client before it, and LiteLLM's proxy beside it.

Work is counted by CPU second of the gateway process, so that other processes of the machine matter little; the delay
that the gateway adds is the time to the first token at the client less the engine's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import nats
from nats.aio.client import Client
from tokenizers import Tokenizer

from deploy.preflight import find_nats_server, free_port
from loadtest import litellm_proxy, openai_stub
from loadtest.errors import BenchError
from loadtest.http_load import COUNTER, HOST, LoadOptions, LoadProcess, Snapshot
from loadtest.openai_stub import StubOptions
from loadtest.processes import Process
from loadtest.report import Check, Report, Table
from loadtest.scripted_engine import EngineOptions, set_step

REQUESTS_RATIO_TARGET: Final = 4.0
TOKENS_RATIO_TARGET: Final = 20.0
ADDED_P50_TARGET_MS: Final = 3.0
ADDED_P99_TARGET_MS: Final = 15.0
STREAM_TARGET_KB: Final = 50.0
SLOWEST_TARGET: Final = 0.5

WARM_UP_S: Final = 1.0
NUM_TOKENS: Final = 64
"""Of a streamed answer."""
NUM_BODY_TOKENS: Final = 16
"""Of an answer in one piece."""
LONG_TOKENS: Final = 4096
"""Of a stream that is to last."""
STEP_S: Final = 0.01
IDLE_STEP_S: Final = 3600.0
HALF: Final = 0.5
"""Of one core, at half load."""
SETTLE_S: Final = 1.0
TIMEOUT_S: Final = 60.0
TEXT: Final = (
    "The quick brown fox jumps over the lazy dog while a naïve café owner counts the morning's receipts, and nobody "
    "in the street can say where the time went or how many trains have left the station since the rain began to fall. "
)


class GatewayOptions(msgspec.Struct, frozen=True, kw_only=True):
    model: Path
    """A directory with a tokenizer and a chat template."""
    window_s: float = 8.0
    """Length of each measurement."""
    num_connections: int = 32
    """Of the closed loops."""
    num_streams: int = 1000
    """Of the test with many streams at once."""
    with_litellm: bool = True


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """Of one closed loop."""

    per_cpu_s: float
    per_s: float
    cpu_share: float
    """Of one core, used by the process that is measured."""
    tokens_per_event: float = 1.0
    """Above 1: tokens came faster than they were written, and share an event."""


class Delay(msgspec.Struct, frozen=True, kw_only=True):
    """Added time to the first token."""

    num_requests: int
    tokens_per_s: float
    cpu_share: float
    p50_ms: float
    p99_ms: float


class ManyStreams(msgspec.Struct, frozen=True, kw_only=True):
    num_streams: int
    num_errors: int
    errors: list[str]
    kb_per_idle_stream: float
    slowest_share: float
    """Tokens of the slowest stream over those of the median one, in the same window."""
    tokens: Throughput


class Figures(msgspec.Struct, kw_only=True):
    requests: Throughput | None = None
    tokens: Throughput | None = None
    flat_out_tokens: Throughput | None = None
    """The engine goes as fast as it can."""
    delay: Delay | None = None
    many: ManyStreams | None = None
    litellm_version: str = litellm_proxy.VERSION
    litellm_requests: Throughput | None = None
    litellm_tokens: Throughput | None = None
    litellm_flat_out_tokens: Throughput | None = None
    litellm_note: str = ""
    """Why there are no figures of it."""


class Window(msgspec.Struct, frozen=True):
    """What a load client and a process did in the same time."""

    before: Snapshot
    after: Snapshot
    cpu_s: float

    @property
    def seconds(self) -> float:
        return self.after.at_s - self.before.at_s

    @property
    def num_requests(self) -> int:
        return self.after.num_requests - self.before.num_requests

    @property
    def num_texts(self) -> int:
        return self.after.num_texts - self.before.num_texts

    def throughput(self, num: float, tokens_per_event: float = 1.0) -> Throughput:
        return Throughput(
            per_cpu_s=num / max(self.cpu_s, 1e-3),
            per_s=num / self.seconds,
            cpu_share=self.cpu_s / self.seconds,
            tokens_per_event=tokens_per_event,
        )


def measure(process: Process, load: LoadProcess, window_s: float) -> Window:
    """One window of both. Raises BenchError if a request has failed."""
    before, cpu_s = load.snapshot(), process.cpu_s()
    time.sleep(window_s)
    after, cpu_s = load.snapshot(), process.cpu_s() - cpu_s
    if after.num_errors:
        raise BenchError(f"{after.num_errors} requests to {process.name} failed, such as: {after.errors[0]}")
    return Window(before, after, cpu_s)


def closed_loop(process: Process, options: LoadOptions, window_s: float, num_tokens: int | None) -> Throughput:
    """Requests (`num_tokens` None) or tokens of streams of `num_tokens` by second."""
    with LoadProcess(options) as load:
        # Each connection has had an answer: what is only done once has been done.
        until(lambda: has_answered(load, options.num_connections), f"{process.name} answers each connection once")
        time.sleep(WARM_UP_S)
        window = measure(process, load, window_s)
    if not window.num_requests:
        raise BenchError(f"{process.name} answered no request in {window_s:g} s")
    if num_tokens is None:
        return window.throughput(window.num_requests)
    tokens_per_event = num_tokens * window.after.num_requests / window.after.num_texts_of_ended
    return window.throughput(window.num_texts * tokens_per_event, tokens_per_event)


def has_answered(load: LoadProcess, num_requests: int) -> bool:
    """Whether so many requests have been answered. Raises BenchError if one has failed."""
    snapshot = load.snapshot()
    if snapshot.num_errors:
        raise BenchError(f"a request failed: {snapshot.errors[0]}")
    return snapshot.num_requests >= num_requests


class GatewayStack:
    """nats-server, the scripted engine and a gateway, with a way to set the engine's step."""

    def __init__(self, gateway: Process, port: int, client: Client, loop: asyncio.AbstractEventLoop) -> None:
        self.gateway = gateway
        self.port = port
        self._client = client
        self._loop = loop

    def set_step(self, step_s: float) -> dict[str, float]:
        """By request: seconds that the engine took for its first token, since the last call."""
        return self._loop.run_until_complete(set_step(self._client, openai_stub.MODEL, step_s)).by_request_s

    def load(self, *, stream: bool, num_tokens: int, **options: Any) -> LoadOptions:
        return LoadOptions(
            port=self.port, path="/v1/chat/completions", body=chat_body(stream=stream, num_tokens=num_tokens), **options
        )


@contextlib.contextmanager
def gateway_stack(options: GatewayOptions, directory: Path) -> Iterator[GatewayStack]:
    """All of it, ready."""
    nats_port, port = free_port(), free_port()
    nats_url = f"nats://{HOST}:{nats_port}"
    nats_server = [str(find_nats_server()), "-a", HOST, "-p", str(nats_port), "-js", "-sd", str(directory / "nats")]
    engine_options = EngineOptions(nats_url=nats_url, model=openai_stub.MODEL, script=script_of(options.model))
    engine = [sys.executable, "-m", "loadtest.scripted_engine", msgspec.json.encode(engine_options).decode()]
    environ = {
        "SPOTSERVE_GATEWAY_MODEL_DIR": str(options.model),
        "SPOTSERVE_GATEWAY_MODEL": openai_stub.MODEL,
        "SPOTSERVE_GATEWAY_SERVED_MODEL_NAME": openai_stub.MODEL,
        "SPOTSERVE_GATEWAY_NATS_URL": nats_url,
        "SPOTSERVE_GATEWAY_PORT": str(port),
        "SPOTSERVE_GATEWAY_MAX_QUEUE": str(4 * options.num_streams),
        "SPOTSERVE_GATEWAY_DRAIN_S": "0",
    }
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Process("nats-server", nats_server, directory))
        loop = asyncio.new_event_loop()
        stack.callback(loop.close)
        client = connected(server, loop, nats_url)
        stack.callback(lambda: loop.run_until_complete(client.close()))
        engine_process = stack.enter_context(Process("scripted-engine", engine, directory))
        engine_process.wait_until(lambda: "ready" in (directory / "scripted-engine.log").read_text())
        gateway = stack.enter_context(Process("gateway", [sys.executable, "-m", "gateway"], directory, environ))
        gateway.wait_until_ok(f"http://{HOST}:{port}/ready")
        yield GatewayStack(gateway, port, client, loop)


def connected(server: Process, loop: asyncio.AbstractEventLoop, nats_url: str) -> Client:
    """A client of the bus, once it answers."""
    clients: list[Client] = []

    def is_ready() -> bool:
        try:
            connecting = nats.connect(nats_url, allow_reconnect=False, connect_timeout=1, error_cb=ignore)
            clients.append(loop.run_until_complete(connecting))
        except (OSError, TimeoutError, nats.errors.Error):
            return False
        return True

    server.wait_until(is_ready)
    return clients[0]


async def ignore(_error: Exception) -> None:
    """Refusals while the server starts."""


def measure_delay(stack: GatewayStack, options: GatewayOptions, tokens_per_s: float) -> Delay:
    """Streams of `NUM_TOKENS` that come at random moments, `tokens_per_s` altogether."""
    stack.set_step(STEP_S)
    requests_per_s = tokens_per_s / NUM_TOKENS
    at_once = max(1, round(requests_per_s * NUM_TOKENS * STEP_S))
    load_options = stack.load(
        stream=True, num_tokens=NUM_TOKENS, requests_per_s=requests_per_s, num_connections=at_once
    )
    with LoadProcess(load_options) as load:
        load.snapshot()
        time.sleep(WARM_UP_S)
        window = measure(stack.gateway, load, options.window_s)
        engine_s = stack.set_step(STEP_S)
    before = window.before.first_text_s
    added_s = [
        client_s - engine_s[name]
        for name, client_s in window.after.first_text_s.items()
        if name not in before and name in engine_s
    ]
    if not added_s:
        raise BenchError("no stream began while the delay was measured")
    return Delay(
        num_requests=len(added_s),
        tokens_per_s=window.num_texts / window.seconds,
        cpu_share=window.cpu_s / window.seconds,
        p50_ms=1e3 * percentile(added_s, 0.5),
        p99_ms=1e3 * percentile(added_s, 0.99),
    )


def measure_many(stack: GatewayStack, options: GatewayOptions) -> ManyStreams:
    """`num_streams` streams at once: what an idle one holds, and whether all go on alike when they go on."""
    stack.set_step(SETTLE_S)
    resident_bytes = stack.gateway.resident_bytes()
    load_options = stack.load(stream=True, num_tokens=LONG_TOKENS, num_connections=options.num_streams, only_once=True)
    with LoadProcess(load_options) as load:
        until(lambda: min(load.snapshot().texts_by_connection) > 0, "each stream has its first token")
        stack.set_step(IDLE_STEP_S)
        time.sleep(SETTLE_S)
        held_bytes = stack.gateway.resident_bytes() - resident_bytes
        # As fast as one process can be expected to keep up with.
        stack.set_step(options.num_streams / 10_000)
        time.sleep(WARM_UP_S)
        before, cpu_s = load.snapshot(), stack.gateway.cpu_s()
        time.sleep(options.window_s)
        after, cpu_s = load.snapshot(), stack.gateway.cpu_s() - cpu_s
        stack.set_step(IDLE_STEP_S)
    texts = [b - a for a, b in zip(before.texts_by_connection, after.texts_by_connection, strict=True)]
    seconds = after.at_s - before.at_s
    return ManyStreams(
        num_streams=options.num_streams,
        num_errors=after.num_errors,
        errors=after.errors,
        kb_per_idle_stream=held_bytes / options.num_streams / 1000,
        slowest_share=min(texts) / max(1.0, statistics.median(texts)),
        tokens=Throughput(
            per_cpu_s=sum(texts) / max(cpu_s, 1e-3), per_s=sum(texts) / seconds, cpu_share=cpu_s / seconds
        ),
    )


def until(condition: Callable[[], bool], what: str) -> None:
    """Poll; raises BenchError naming `what` after `TIMEOUT_S`."""
    give_up_s = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > give_up_s:
            raise BenchError(f"not reached in {TIMEOUT_S:.0f} s: {what}")
        time.sleep(0.1)


def measure_gateway(options: GatewayOptions, directory: Path, figures: Figures) -> None:
    """Everything about our own gateway, into `figures`."""
    with gateway_stack(options, directory) as stack:
        connections = {"num_connections": options.num_connections}
        stack.set_step(0.0)
        requests = stack.load(stream=False, num_tokens=NUM_BODY_TOKENS, **connections)
        figures.requests = closed_loop(stack.gateway, requests, options.window_s, None)
        streams = stack.load(stream=True, num_tokens=NUM_TOKENS, **connections)
        figures.flat_out_tokens = closed_loop(stack.gateway, streams, options.window_s, NUM_TOKENS)
        stack.set_step(STEP_S)
        figures.tokens = closed_loop(stack.gateway, streams, options.window_s, NUM_TOKENS)
        # Streams that begin and end cost more than those that only go on: what half load is shows when it is tried.
        rough = measure_delay(stack, options, HALF * figures.tokens.per_cpu_s)
        figures.delay = measure_delay(stack, options, rough.tokens_per_s * HALF / rough.cpu_share)
    with gateway_stack(options, directory) as stack:
        warm = stack.load(stream=True, num_tokens=NUM_TOKENS, **connections)
        closed_loop(stack.gateway, warm, WARM_UP_S, NUM_TOKENS)
        figures.many = measure_many(stack, options)


def measure_litellm(options: GatewayOptions, directory: Path, figures: Figures) -> None:
    """The same loops through LiteLLM's proxy, with an upstream of the same step times, into `figures`."""
    python = litellm_proxy.ensure_installed()
    texts = [f" {word}" for word in TEXT.split()]
    loops = {
        "litellm_requests": (False, NUM_BODY_TOKENS, 0.0),
        "litellm_flat_out_tokens": (True, NUM_TOKENS, 0.0),
        "litellm_tokens": (True, NUM_TOKENS, STEP_S),
    }
    for name, (stream, num_tokens, step_s) in loops.items():
        upstream_port, port = free_port(), free_port()
        answer = [texts[index % len(texts)] for index in range(num_tokens)]
        stub_options = StubOptions(port=upstream_port, texts=answer, step_s=step_s)
        stub = [sys.executable, "-m", "loadtest.openai_stub", msgspec.json.encode(stub_options).decode()]
        load = LoadOptions(
            port=port,
            path="/v1/chat/completions",
            body=chat_body(stream=stream, num_tokens=num_tokens),
            num_connections=options.num_connections,
        )
        with (
            Process("openai-stub", stub, directory),
            litellm_proxy.proxy(python, port, upstream_port, directory) as proxy,
        ):
            proxy.wait_until_ok(f"http://{HOST}:{port}/health/liveliness")
            setattr(figures, name, closed_loop(proxy, load, options.window_s, num_tokens if stream else None))


def script_of(model: Path) -> list[int]:
    """Token ids of a plain text."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(TEXT, add_special_tokens=False).ids
    return ids


def chat_body(*, stream: bool, num_tokens: int) -> str:
    """The JSON of a request; no two are the same, as no two first messages of a conversation are."""
    body = {
        "model": openai_stub.MODEL,
        "messages": [{"role": "user", "content": f"{COUNTER} {TEXT}"}],
        "max_tokens": num_tokens,
        "temperature": 0.7,
        "stream": stream,
    }
    return msgspec.json.encode(body).decode()


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all are below (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def run(options: GatewayOptions) -> Report:
    """All figures. Raises BenchError if something does not start or a request fails."""
    if not (options.model / "tokenizer.json").is_file():
        raise BenchError(f"{options.model} holds no tokenizer.json: run `make model`, or give --model")
    figures = Figures()
    with tempfile.TemporaryDirectory(prefix="spotserve-bench-") as scratch:
        directory = Path(scratch)
        if options.with_litellm:
            try:
                measure_litellm(options, directory, figures)
            except BenchError as error:
                figures.litellm_note = str(error)
        measure_gateway(options, directory, figures)
    return report(figures)


def report(figures: Figures) -> Report:
    """Tables, and the figures beside their targets."""
    loops = [
        ("requests, answered in one piece", figures.requests),
        ("streamed tokens, one a step", figures.tokens),
        ("streamed tokens, engine flat out", figures.flat_out_tokens),
        (f"LiteLLM {litellm_proxy.VERSION}: requests", figures.litellm_requests),
        (f"LiteLLM {litellm_proxy.VERSION}: tokens, one a step", figures.litellm_tokens),
        (f"LiteLLM {litellm_proxy.VERSION}: tokens, upstream flat out", figures.litellm_flat_out_tokens),
    ]
    rows = [
        [name, f"{one.per_cpu_s:.0f}", f"{one.per_s:.0f}", f"{one.cpu_share:.2f}", f"{one.tokens_per_event:.2f}"]
        for name, one in loops
        if one is not None
    ]
    tables = [Table("Work by second", ["", "per CPU s", "per s", "cores used", "tokens per event"], rows)]
    pairs = [
        ("requests", figures.requests, figures.litellm_requests, REQUESTS_RATIO_TARGET),
        ("tokens, flat out", figures.flat_out_tokens, figures.litellm_flat_out_tokens, TOKENS_RATIO_TARGET),
        ("tokens, one a step", figures.tokens, figures.litellm_tokens, TOKENS_RATIO_TARGET),
    ]
    if figures.many is not None:
        name = f"tokens of {figures.many.num_streams} streams, one a step"
        pairs.append((name, figures.many.tokens, figures.litellm_tokens, TOKENS_RATIO_TARGET))
    checks = [
        at_least(f"{name} per CPU second, of LiteLLM's", ours.per_cpu_s / theirs.per_cpu_s, "times", target)
        for name, ours, theirs, target in pairs
        if ours is not None and theirs is not None
    ]
    if figures.delay is not None:
        delay = figures.delay
        row = [f"{delay.num_requests}", f"{delay.tokens_per_s:.0f}", f"{delay.cpu_share:.2f}"]
        row += [f"{delay.p50_ms:.2f}", f"{delay.p99_ms:.2f}"]
        columns = ["streams", "tokens per s", "cores used", "p50 ms", "p99 ms"]
        tables.append(Table("Added time to the first token, at half load", columns, [row]))
        checks.append(Check(name="added delay, median", value=delay.p50_ms, unit="ms", target=ADDED_P50_TARGET_MS))
        checks.append(Check(name="added delay, p99", value=delay.p99_ms, unit="ms", target=ADDED_P99_TARGET_MS))
    if figures.many is not None:
        many = figures.many
        row = [f"{many.num_errors}", f"{many.kb_per_idle_stream:.0f}", f"{many.slowest_share:.2f}"]
        row += [f"{many.tokens.per_cpu_s:.0f}", f"{many.tokens.per_s:.0f}", f"{many.tokens.cpu_share:.2f}"]
        columns = ["errors", "KB per idle stream", "slowest / median", "per CPU s", "tokens per s", "cores used"]
        tables.append(Table(f"{many.num_streams} streams at once", columns, [row]))
        checks.append(Check(name="errors of many streams", value=many.num_errors, unit="", target=0))
        checks.append(
            Check(name="memory of an idle stream", value=many.kb_per_idle_stream, unit="KB", target=STREAM_TARGET_KB)
        )
        checks.append(at_least("slowest stream, of the median", many.slowest_share, "", SLOWEST_TARGET))
    if figures.litellm_note:
        tables.append(Table("LiteLLM's proxy could not be measured", [figures.litellm_note], []))
    return Report(name="gateway", tables=tables, checks=checks, figures=figures)


def at_least(name: str, value: float, unit: str, target: float) -> Check:
    """A figure that should be large."""
    return Check(name=name, value=value, unit=unit, target=target, higher_is_better=True)
