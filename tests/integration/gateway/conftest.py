"""A gateway on a real NATS server, and an engine in the test that speaks the engine's protocol."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import nats
import openai
import pytest
import uvicorn
from nats.aio.client import Client
from nats.aio.msg import Msg
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.protocol import (
    CancelRequest,
    EngineSubjects,
    FinishReason,
    GenerateRequest,
    Interruption,
    KvHolder,
    KvSource,
    PipelineState,
    RejectReason,
    ReleaseKv,
    ResendReply,
    ResendRequest,
    SubmitReply,
    TokenEntry,
    TokenFrame,
    TokenLogprobs,
)
from gateway.app import create_app
from gateway.services.http_protocol import BoundedHttp
from gateway.services.tokenizer import TextTokenizer
from gateway.settings import Settings
from gateway.telemetry import no_tracer
from planner.protocol import (
    Explanation,
    ModelShape,
    Pipeline,
    Plan,
    PlannerSubjects,
    Retiring,
    Shard,
    Stage,
)

MAX_MODEL_LEN = 1024
EOS = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('bad role') }}{% endif %}"
    "<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_T = TypeVar("_T")
encode = msgspec.msgpack.encode
decode = msgspec.msgpack.decode


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "condition not met in time"
        await asyncio.sleep(0.01)


class NatsServer:
    def __init__(self, directory: Path) -> None:
        self.port = _free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        binary = Path(sys.executable).parent / "nats-server"
        self._process = subprocess.Popen(
            [binary, "-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", self._directory],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline_s = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline_s, "nats-server does not start"
                time.sleep(0.02)

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(10)


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    yield server
    server.stop()


@pytest.fixture
def nats_factory() -> Iterator[Callable[[Path], NatsServer]]:
    """Servers of a test's own, to be stopped and started."""
    servers: list[NatsServer] = []

    def make(directory: Path) -> NatsServer:
        servers.append(NatsServer(directory))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer, so that any id sequence is text, with broken characters in between."""
    directory = tmp_path_factory.mktemp("models") / "tiny-chat"
    directory.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|start|>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["the quick brown fox jumps over the lazy dog, naïve café, 日本語のテキスト, 🙂🙃"] * 20
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 512, "eos_token_id": 1}
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer_config = {"eos_token": EOS, "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return directory


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> TextTokenizer:
    return TextTokenizer(model_dir)


def next_token(sequence: list[int], seed: int, choice: int) -> int:
    """Depends on the whole sequence, so a lost or doubled token changes all that follow; never special."""
    mixed = seed * 31 + choice * 17
    for token in sequence:
        mixed = (mixed * 1_000_003 + token + 7) % 2_147_483_647
    return 2 + (mixed // 11) % 380


def expected_ids(request: GenerateRequest) -> list[int]:
    ids = list(request.committed_ids)
    while len(ids) < request.sampling.max_tokens:
        ids.append(next_token(request.prompt_ids + ids, request.sampling.seed, request.choice))
    return ids


def scored(token: int, num_top: int) -> TokenLogprobs:
    """The logprobs of a token: a function of the token, so that they too are the same after a resume."""
    return TokenLogprobs(-0.01 * (token % 7), 1, list(range(num_top)), [-0.5 * rank for rank in range(num_top)])


def prompt_scores(request: GenerateRequest) -> list[TokenLogprobs | None] | None:
    num_top = request.sampling.prompt_logprobs
    if num_top is None or request.committed_ids:
        return None
    return [scored(i, num_top) if number else None for number, i in enumerate(request.prompt_ids)]


def cut(entry: TokenEntry, index: int) -> TokenEntry:
    """What of `entry` has index `index` and above."""
    return msgspec.structs.replace(
        entry,
        index=index,
        ids=entry.ids[index:],
        logprobs=entry.logprobs[index:] if entry.logprobs is not None else None,
        prompt_logprobs=entry.prompt_logprobs if index == 0 else None,
    )


class FakePipeline:
    """One pipeline of the engine, all of whose tokens are a function of the sequence before."""

    def __init__(self, engine: FakeEngine, name: str, *, step_s: float, free_slots: int) -> None:
        self.engine, self.name, self.step_s, self.free_slots = engine, name, step_s, free_slots
        self.submitted: list[GenerateRequest] = []
        self.headers: list[dict[str, str]] = []
        self.cancelled: list[str] = []
        self.resends: list[ResendRequest] = []
        self.lost_indices: set[int] = set()
        self.refuse_with: list[RejectReason] = []
        self.ready, self.draining, self.silent = True, False, False
        self.eos_at: int | None = None
        self.script: list[int] | None = None
        """Say this, then end."""
        self._entries: dict[str, TokenEntry] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        subjects, client = self.engine.subjects, self.engine.client
        await client.subscribe(subjects.submit(self.name), cb=self._on_submit)
        await client.subscribe(subjects.cancel(self.name), cb=self._on_cancel)
        await client.subscribe(subjects.resend(self.name), cb=self._on_resend)
        self._tasks["state"] = asyncio.create_task(self._publish_states())

    async def stop(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def kill(self) -> None:
        """As if the leader had been killed: no more tokens, no answers."""
        self.silent = True
        await self.stop()

    def running(self) -> int:
        return sum(not task.done() for name, task in self._tasks.items() if name != "state")

    async def publish_state(self) -> None:
        state = PipelineState(
            pipeline=self.name,
            epoch=1,
            ready=self.ready,
            draining=self.draining,
            running=self.running(),
            waiting=0,
            free_slots=max(0, self.free_slots - self.running()),
            total_kv_blocks=100,
            free_kv_blocks=100,
        )
        if not self.silent:
            await self.engine.client.publish(self.engine.subjects.state(self.name), encode(state))

    async def interrupt(self, *, with_kv: bool) -> None:
        """Stop all sequences at a token boundary and hand them back."""
        self.draining = True
        await self.publish_state()
        for request in {r.request_id: r for r in self.submitted}.values():
            task = self._tasks[request.request_id]
            if task.done():
                continue
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            so_far = self._entries[request.request_id]
            holder = KvHolder(
                rank=f"{self.name}-rank",
                context_address="127.0.0.1:1",
                first_layer=0,
                last_layer=1,
                first_group=0,
                last_group=0,
            )
            source = KvSource(pipeline=self.name, num_tokens=len(so_far.ids), holders=[holder])
            interruption = Interruption(reason="preempted", kv_source=source if with_kv else None)
            entry = msgspec.structs.replace(so_far, interruption=interruption)
            self._entries[request.request_id] = entry
            await self._publish(request.gateway, msgspec.structs.replace(entry, index=len(entry.ids), ids=[]))

    async def _publish_states(self) -> None:
        while True:
            await self.publish_state()
            await asyncio.sleep(0.1)

    async def _on_submit(self, message: Msg) -> None:
        if self.silent:
            return
        request = decode(message.data, type=GenerateRequest)
        if self.refuse_with:
            reply = SubmitReply(accepted=False, reason=self.refuse_with.pop(0), detail="refused by the test")
            await message.respond(encode(reply))
            return
        self.submitted.append(request)
        self.headers.append(dict(message.headers or {}))
        await message.respond(encode(SubmitReply(accepted=True)))
        self._entries[request.request_id] = TokenEntry(
            request_id=request.request_id,
            choice=request.choice,
            attempt=request.attempt,
            index=0,
            ids=list(request.committed_ids),
        )
        self._tasks[request.request_id] = asyncio.create_task(self._generate(request))

    async def _generate(self, request: GenerateRequest) -> None:
        sampling = request.sampling
        ids = list(request.committed_ids)
        if sampling.max_tokens == 0:
            entry = self._entries[request.request_id]
            scores = prompt_scores(request)
            entry = msgspec.structs.replace(entry, finish=FinishReason.LENGTH, prompt_logprobs=scores)
            await self._publish(request.gateway, entry)
            return
        while True:
            if self.step_s:
                await asyncio.sleep(self.step_s)
            token = next_token(request.prompt_ids + ids, sampling.seed, request.choice)
            if self.eos_at == len(ids) and not sampling.ignore_eos:
                token = sampling.eos_token_ids[0]
            if self.script is not None:
                token = [*self.script, sampling.eos_token_ids[0]][len(ids)]
            ids.append(token)
            finish = FinishReason.LENGTH if len(ids) == sampling.max_tokens else None
            if token in sampling.eos_token_ids + sampling.stop_token_ids:
                finish = FinishReason.STOP
            entry = msgspec.structs.replace(
                self._entries[request.request_id],
                index=0,
                ids=list(ids),
                finish=finish,
                logprobs=None if sampling.logprobs is None else [scored(i, sampling.logprobs) for i in ids],
                prompt_logprobs=prompt_scores(request),
            )
            self._entries[request.request_id] = entry
            if len(ids) - 1 not in self.lost_indices:
                await self._publish(request.gateway, cut(entry, len(ids) - 1))
            if finish is not None:
                return

    async def _publish(self, gateway: str, entry: TokenEntry) -> None:
        if self.silent:
            return
        frame = TokenFrame(pipeline=self.name, epoch=1, entries=[entry])
        await self.engine.client.publish(self.engine.subjects.tokens(gateway, self.name), encode(frame))

    async def _on_cancel(self, message: Msg) -> None:
        request_id = decode(message.data, type=CancelRequest).request_id
        self.cancelled.append(request_id)
        if request_id in self._tasks:
            self._tasks[request_id].cancel()

    async def _on_resend(self, message: Msg) -> None:
        if self.silent:
            return
        question = decode(message.data, type=ResendRequest)
        self.resends.append(question)
        entry = self._entries.get(question.request_id)
        if entry is not None:
            entry = cut(entry, question.from_index)
        await message.respond(encode(ResendReply(entry=entry)))


class FakeEngine:
    """Pipelines, and the plans that name them."""

    def __init__(self, client: Client, slug: str) -> None:
        self.client = client
        self.slug = slug
        self.subjects = EngineSubjects(slug)
        self._planner = PlannerSubjects(slug)
        self.pipelines: dict[str, FakePipeline] = {}
        self.released: list[tuple[str, ReleaseKv]] = []
        self._epoch = 0
        self._announced: Plan | None = None

    async def start(self) -> None:
        async def on_release(message: Msg) -> None:
            rank = message.subject.split(".")[-2]
            self.released.append((rank, decode(message.data, type=ReleaseKv)))

        await self.client.subscribe(self.subjects.release("*"), cb=on_release)

    async def add(self, name: str, *, step_s: float = 0.005, free_slots: int = 8) -> FakePipeline:
        pipeline = FakePipeline(self, name, step_s=step_s, free_slots=free_slots)
        self.pipelines[name] = pipeline
        await pipeline.start()
        return pipeline

    async def plan(
        self,
        *serving: str,
        inherits: dict[str, list[str]] | None = None,
        retiring: dict[str, bool] | None = None,
        store: bool = False,
    ) -> None:
        """Publish a plan; `retiring` by pipeline: whether it is broken. `store`: in the bucket only."""
        self._epoch += 1
        plan = Plan(
            epoch=self._epoch,
            model=ModelShape(
                name="tiny",
                num_layers=2,
                num_head_groups=1,
                decoder_unit_bytes=1,
                embedding_unit_bytes=1,
                head_unit_bytes=1,
                kv_unit_bytes_per_token=1,
                kv_block_tokens=16,
                max_model_len=MAX_MODEL_LEN,
                hidden_bytes_per_token=1,
                tied_embeddings=True,
            ),
            pipelines=[self._pipeline(name, (inherits or {}).get(name, [])) for name in serving],
            retiring=[
                Retiring(pipeline=self._pipeline(name, []), reason="test", broken=broken)
                for name, broken in (retiring or {}).items()
            ],
            transfers={},
            addresses={},
            explanation=Explanation(
                cause="test",
                cause_at_s=0.0,
                decided_at_s=0.0,
                arrivals_per_s=0.0,
                num_ranks=1,
                chosen=None,
                alternatives=[],
            ),
            next_pipeline_number=0,
        )
        if store:
            bucket = await self.client.jetstream().create_key_value(bucket=self._planner.plan_bucket)
            await bucket.put("current", encode(plan))
        else:
            self._announced = plan
            await self.announce()

    async def announce(self) -> None:
        """Say the newest plan again."""
        if self._announced is not None:
            await self.client.publish(self._planner.plan, encode(self._announced))

    @staticmethod
    def _pipeline(name: str, inherits: list[str]) -> Pipeline:
        shard = Shard(rank=f"{name}-rank", instance=name, first_group=0, last_group=0)
        return Pipeline(
            id=name,
            stages=[Stage(first_layer=0, last_layer=1, shards=[shard])],
            max_batch=8,
            num_kv_blocks=100,
            inherits=inherits,
        )

    async def close(self) -> None:
        for pipeline in self.pipelines.values():
            await pipeline.stop()
        await self.client.close()


class Stack:
    """A gateway that serves HTTP on `port`, and the engine behind it."""

    def __init__(self, engine: FakeEngine, port: int, server: uvicorn.Server, admin_port: int = 0) -> None:
        self.admin_port = admin_port
        self.engine = engine
        self.server = server
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.AsyncClient(base_url=self.url, timeout=30)
        self.sdk = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    async def ready(self) -> None:
        async with asyncio.timeout(10):
            while (await self.http.get("/ready")).status_code != 200:
                # The gateway may not have subscribed when the plan was announced.
                await self.engine.announce()
                await asyncio.sleep(0.02)

    async def counts(self) -> dict[str, object]:
        counts: dict[str, object] = (await self.http.get("/internal/requests")).json()
        return counts

    async def until_counts(self, **wanted: object) -> None:
        async with asyncio.timeout(10):
            while not wanted.items() <= (await self.counts()).items():
                await asyncio.sleep(0.01)

    async def until_ready(self, *pipelines: str) -> None:
        async with asyncio.timeout(10):
            while not set(pipelines) <= set((await self.counts())["ready"]):  # type: ignore[call-overload] # JSON
                await asyncio.sleep(0.01)

    async def close(self) -> None:
        await self.sdk.close()
        await self.http.aclose()


_slugs = (f"test{i}" for i in itertools.count())


@pytest.fixture
async def make_stack(nats_server: NatsServer, model_dir: Path) -> AsyncIterator[Any]:
    """`await make_stack(setting=...)`: a gateway with an engine that has no pipeline yet."""
    async for make in stacks(nats_server, model_dir):
        yield make


async def stacks(nats_server: NatsServer, model_dir: Path) -> AsyncIterator[Any]:
    """Yields `make_stack` once, and closes what it made."""
    made: list[tuple[Stack, asyncio.Task[None]]] = []

    async def make(
        url: str = nats_server.url, tracer: object = None, send_buffer_bytes: int = 0, **values: object
    ) -> Stack:
        slug = next(_slugs)
        settings = msgspec.convert(
            {
                "model_dir": str(model_dir),
                "model": slug,
                "gateway_id": "gw",
                "nats_url": url,
                "drain_s": 1.0,
                **values,
            },
            Settings,
        )
        app = create_app(settings, TextTokenizer(model_dir), tracer or no_tracer())  # type: ignore[arg-type] # any tracer
        listener = socket.create_server(("127.0.0.1", 0))
        if send_buffer_bytes:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
        config = uvicorn.Config(
            app, http=BoundedHttp, lifespan="on", log_config=None, access_log=False, timeout_graceful_shutdown=3
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server._serve([listener]))
        client = await nats.connect(url, max_reconnect_attempts=-1, reconnect_time_wait=0.1)
        engine = FakeEngine(client, slug)
        await engine.start()
        stack = Stack(engine, listener.getsockname()[1], server, app.state.admin.port)
        made.append((stack, task))
        await until(lambda: server.started)
        return stack

    yield make
    for stack, _ in made:
        if not stack.server.should_exit:
            # Whatever a test did: nothing is left open in the gateway.
            await stack.until_counts(running=0, waiting=0)
    for stack, task in made:
        await stack.close()
        stack.server.should_exit = True
        await task
        await stack.engine.close()


@pytest.fixture
async def stack(make_stack: Any) -> Stack:
    """One gateway with one ready pipeline, `p0`."""
    made: Stack = await make_stack()
    await made.engine.add("p0")
    await made.engine.plan("p0")
    await made.ready()
    return made


@pytest.fixture
def expected() -> Callable[[GenerateRequest], list[int]]:
    """The whole log of a request, as an undisturbed engine would produce it."""
    return expected_ids


class _LoopThread:
    """Runs the stack of a synchronous test."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture
def sync_stack(nats_server: NatsServer, model_dir: Path) -> Iterator[tuple[openai.OpenAI, Stack]]:
    """The same for a synchronous test: (client, stack); the stack lives in a thread."""
    yield from _in_thread(nats_server, model_dir)


@pytest.fixture(scope="module")
def module_stack(nats_server: NatsServer, model_dir: Path) -> Iterator[Stack]:
    """One for all synchronous tests of a module."""
    for _, stack in _in_thread(nats_server, model_dir):
        yield stack


def _in_thread(nats_server: NatsServer, model_dir: Path) -> Iterator[tuple[openai.OpenAI, Stack]]:
    thread = _LoopThread()

    async def enter() -> tuple[Any, Stack]:
        maker = stacks(nats_server, model_dir)
        make = await anext(maker)
        stack = await make()
        await stack.engine.add("p0")
        await stack.engine.plan("p0")
        await stack.ready()
        return maker, stack

    async def leave(maker: Any) -> None:
        async for _ in maker:
            pass

    maker, stack = thread.run(enter())
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client, stack
    thread.run(leave(maker))
    thread.close()


@pytest.fixture
def free_port() -> Callable[[], int]:
    return _free_port


@pytest.fixture
def fake_engine_class() -> type[FakeEngine]:
    return FakeEngine
