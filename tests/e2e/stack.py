"""The real stack, started as a user starts it: `spotserve up` with real processes, sockets and a NATS server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import nats
import psutil
from nats.aio.client import Client

from deploy.protocol import (
    AddCommand,
    CancelNoticeCommand,
    CommandReply,
    KillCommand,
    PreemptCommand,
    supervisor_subject,
)
from deploy.state import Running, StateDir
from engine.protocol import EngineSubjects, PipelineState, ResumeStats, TokenFrame
from planner.protocol import InstanceState, Message, Phase, Plan, PlannerSubjects, RankProgress, Status, StatusRequest

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 40.0
SETTLE_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 180.0

M = TypeVar("M", bound=Message)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Stack:
    """One `spotserve up`. `start`, then `stop`; `stop` asserts that nothing is left behind."""

    def __init__(self, state_dir: Path, model_dir: Path, *options: str, environ: dict[str, str] | None = None) -> None:
        self.port = free_port()
        self.state = StateDir(state_dir)
        self._environ = environ or {}
        self._command = [
            *(sys.executable, "-m", "deploy", "up", "--model", str(model_dir), "--port", str(self.port)),
            *("--state-dir", str(state_dir), *options),
        ]
        self._log = state_dir.parent / f"{state_dir.name}.out"
        self._process: subprocess.Popen[bytes] | None = None
        self.base_url = f"http://127.0.0.1:{self.port}"

    def start(self) -> Stack:
        self.state.path.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env={**os.environ, **self._environ}, start_new_session=True
            )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            assert self._process.poll() is None, f"`up` ended:\n{self._log.read_text()}"
            assert time.monotonic() < deadline_s, f"`up` is not ready:\n{self._log.read_text()}\n{self.logs()}"
            time.sleep(0.1)
        return self

    def _is_ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            response: httpx.Response = httpx.get(self.base_url + "/ready", timeout=2)
            return response.status_code == 200
        return False

    @property
    def running(self) -> Running:
        return self.state.read_running()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "not started"
        return self._process

    def pids(self) -> list[int]:
        """The supervisor and everything below it."""
        try:
            parent = psutil.Process(self.process.pid)
            return [parent.pid, *(child.pid for child in parent.children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    def stop(self, number: int = signal.SIGINT) -> None:
        pids = self.pids()
        if self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(STOP_TIMEOUT_S)
        deadline_s = time.monotonic() + 10
        while left := [pid for pid in pids if _is_alive(pid)]:
            assert time.monotonic() < deadline_s, f"left behind: {[psutil.Process(pid).cmdline() for pid in left]}"
            time.sleep(0.05)

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text()[-4000:]}" for path in sorted(self.state.logs.glob("*.log"))
        )

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `spotserve <arguments>` against this stack."""
        return subprocess.run(
            [sys.executable, "-m", "deploy", *arguments, "--state-dir", str(self.state.path)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def status(self) -> dict[str, Any]:
        result = self.command("status", "--json")
        assert result.returncode == 0, result.stderr
        return dict(json.loads(result.stdout))


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@dataclass
class Answer:
    """One stream, finished or not."""

    id: str = ""
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0


class Session:
    """Everything that a test does to a running stack, on one event loop."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        running = stack.running
        self._slug = running.model
        self._served = running.served_model_name
        self._nats_url = running.nats_url
        self.client = Client()
        self.http = httpx.AsyncClient(base_url=stack.base_url, timeout=REQUEST_TIMEOUT_S)
        self.states: dict[str, PipelineState] = {}
        self.plans: list[Plan] = []
        self.started: list[RankProgress] = []
        self.resumes: list[ResumeStats] = []
        self.seams: dict[str, int] = {}
        """By request on the wire (the answer's id, with -INDEX if there are several choices): where it went on."""

    async def __aenter__(self) -> Session:
        self.client = await nats.connect(
            self._nats_url, max_reconnect_attempts=-1, reconnect_time_wait=1, error_cb=_ignore
        )
        planner = PlannerSubjects(self._slug)
        await self._watch(EngineSubjects(self._slug).all_states, PipelineState, self._keep_state)
        await self._watch(planner.all_progress, RankProgress, self._keep_started)
        await self._watch(planner.plan, Plan, self.plans.append)
        await self._watch(EngineSubjects(self._slug).all_tokens, TokenFrame, self._keep_resumes)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()
        await self.client.close()

    def _keep_state(self, state: PipelineState) -> None:
        self.states[state.pipeline] = state

    def _keep_started(self, progress: RankProgress) -> None:
        if progress.phase is Phase.STARTED:
            self.started.append(progress)

    def _keep_resumes(self, frame: TokenFrame) -> None:
        resumed = [entry for entry in frame.entries if entry.resume is not None]
        self.resumes += [entry.resume for entry in resumed if entry.resume is not None]
        self.seams |= {entry.request_id: entry.index for entry in resumed}

    async def _watch(self, subject: str, kind: type[M], handle: Callable[[M], None]) -> None:
        async def received(msg: Any) -> None:
            handle(msgspec.msgpack.decode(msg.data, type=kind))

        await self.client.subscribe(subject, cb=received)

    # --- the cloud --------------------------------------------------------------------------------------------

    async def _command(self, command: Message) -> str:
        reply = await self.client.request(supervisor_subject(self._slug), msgspec.msgpack.encode(command), timeout=15)
        answer: CommandReply = msgspec.msgpack.decode(reply.data, type=CommandReply)
        assert answer.ok, answer.message
        message: str = answer.message
        return message

    async def preempt(self, instance: str, notice_s: float) -> None:
        await self._command(PreemptCommand(instance=instance, notice_s=notice_s))

    async def cancel_notice(self, instance: str) -> None:
        await self._command(CancelNoticeCommand(instance=instance))

    async def kill(self, instance: str) -> None:
        await self._command(KillCommand(instance=instance))

    async def serving_instance(self) -> str:
        """One that leads a pipeline with running requests."""
        counts = (await self.http.get("/internal/requests")).json()["pipelines"]
        plan = (await self.status()).plan
        assert plan is not None
        return next(p.stages[0].shards[0].instance for p in plan.pipelines if counts.get(p.id))

    async def take_until_resumed(self, notice_s: float | None, num_instances: int = 3) -> None:
        """Preempt (None: kill) an instance under traffic; another one if its streams all ended before it went."""
        for _ in range(5):
            victim = await self.serving_instance()
            if notice_s is None:
                await self.kill(victim)
            else:
                await self.preempt(victim, notice_s)
            await self.until_gone(victim)
            if self.resumes:
                return
            await self.add()
            await self.until(lambda: self.has_instances(num_instances), f"{num_instances} instances again")

    async def add(self) -> str:
        before = {i.id for i in (await self.status()).instances}
        message = await self._command(AddCommand())
        named: list[str] = [word for word in re.findall(r"\bi\d+\b", message) if word not in before]
        assert named, f"no new instance in {message!r}"
        return named[0]

    async def status(self) -> Status:
        subject = PlannerSubjects(self._slug).status
        for _ in range(50):
            with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError):
                reply = await self.client.request(subject, msgspec.msgpack.encode(StatusRequest()), timeout=2)
                return msgspec.msgpack.decode(reply.data, type=Status)
            await asyncio.sleep(0.2)
        raise AssertionError("the planner does not answer")

    async def ready_instances(self) -> list[str]:
        return [i.id for i in (await self.status()).instances if i.state is InstanceState.READY]

    async def has_instances(self, num_instances: int) -> bool:
        """Exactly so many instances are there, all ready."""
        states = [i.state for i in (await self.status()).instances if i.state is not InstanceState.LOST]
        return states == [InstanceState.READY] * num_instances

    async def num_alive(self) -> int:
        return sum(i.state is not InstanceState.LOST for i in (await self.status()).instances)

    async def until_gone(self, instance: str) -> None:
        """Wait until the instance is lost and every pipeline of the plan serves without it."""

        async def is_gone() -> bool:
            alive = {i.id for i in (await self.status()).instances if i.state is not InstanceState.LOST}
            return instance not in alive and bool(await self.shape()) and not await self.is_used(instance)

        await self.until(is_gone, f"{instance} is gone and the rest serves")

    async def is_used(self, instance: str) -> bool:
        """The instance has a position in a pipeline that serves."""
        plan = (await self.status()).plan
        return plan is not None and any(
            shard.instance == instance and self.is_serving(pipeline.id)
            for pipeline in plan.pipelines
            for stage in pipeline.stages
            for shard in stage.shards
        )

    async def shape(self) -> tuple[tuple[int, int], ...]:
        """(stages, shards) of each pipeline that takes requests."""
        plan = (await self.status()).plan
        if plan is None or not all(self.is_serving(p.id) for p in plan.pipelines):
            return ()
        return tuple(sorted((len(p.stages), p.tensor) for p in plan.pipelines))

    def is_serving(self, pipeline: str) -> bool:
        state = self.states.get(pipeline)
        return state is not None and state.ready and not state.draining

    async def restore(self, num_instances: int) -> None:
        """Bring the fleet to `num_instances` ready instances, none under notice, and wait until all is quiet."""
        alive = [i for i in (await self.status()).instances if i.state is not InstanceState.LOST]
        staying = [i for i in alive if i.state is not InstanceState.GRACE]
        for _ in range(num_instances - len(staying)):
            await self.add()
        for extra in staying[num_instances:]:
            await self.kill(extra.id)
        await self.quiet(num_instances)

    async def quiet(self, num_instances: int) -> None:
        """Wait until exactly `num_instances` instances are there, ready, and nothing is under way."""

        await self.until(lambda: self.has_instances(num_instances), f"{num_instances} ready instances")
        await self.settled()

    async def until(self, condition: Callable[[], Any], what: str, timeout_s: float = SETTLE_TIMEOUT_S) -> None:
        """Wait for a condition (plain or async).

        Raises:
            AssertionError: it did not come true in time; with the end of every log.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            result = condition()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return
            assert time.monotonic() < deadline_s, f"not in {timeout_s} s: {what}\n{self.stack.logs()}"
            await asyncio.sleep(0.05)

    async def settled(self) -> None:
        """Every planned pipeline serves, no request is open, no KV block is held; and it stays so for a second."""
        clean_since: dict[int, float] = {}

        async def clean() -> bool:
            status = await self.status()
            counts = (await self.http.get("/internal/requests")).json()
            live = [self.states.get(p.id) for p in status.plan.pipelines] if status.plan else []
            is_clean = (
                counts["running"] == counts["waiting"] == 0
                and bool(live)
                and all(s is not None and s.ready and not s.draining for s in live)
                and all(s is not None and s.free_kv_blocks == s.total_kv_blocks for s in live)
                and all(s is not None and s.running == s.waiting == s.parked == 0 for s in live)
            )
            if not is_clean:
                clean_since.clear()
                return False
            now_s = time.monotonic()
            return now_s - clean_since.setdefault(status.epoch, now_s) > 1.0

        await self.until(clean, "no open request and no leaked KV block")

    # --- clients ----------------------------------------------------------------------------------------------

    async def stream(self, prompt: Prompt, answer: Answer | None = None) -> Answer:
        """Stream a completion; the answer fills while it comes."""
        answer = answer if answer is not None else Answer()
        body = {
            "model": self._served,
            "prompt": list(prompt.ids),
            "max_tokens": prompt.max_tokens,
            "temperature": prompt.temperature,
            "seed": prompt.seed,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        async for chunk in self._chunks(body):
            if "error" in chunk:
                answer.error = chunk["error"]["message"]
                break
            answer.id = chunk["id"]
            for choice in chunk["choices"]:
                if choice.get("token_ids"):
                    answer.ids += choice["token_ids"]
                answer.text += choice.get("text") or ""
                answer.finish_reason = choice["finish_reason"] or answer.finish_reason
            answer.usage = chunk.get("usage") or answer.usage
        return answer

    async def _chunks(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                yield {"error": {"message": f"{response.status_code}: {await response.aread()!r}"}}
                return
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data: "))


class Traffic:
    """Streams that go on all the time: each prompt again and again, every answer checked against its oracle.

    `async with`: enters when every stream decodes, leaves when each has brought one more whole answer.
    """

    def __init__(self, session: Session, prompts: list[Prompt], expected: list[list[int]]) -> None:
        self._session = session
        self._prompts = prompts
        self._expected = expected
        self._open = [Answer() for _ in prompts]
        self.answers: list[Answer] = []
        self._workers: list[asyncio.Task[None]] = []
        self._stopping = False

    async def __aenter__(self) -> Traffic:
        self._workers = [asyncio.create_task(self._work(i)) for i in range(len(self._prompts))]
        await self.goes_on()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for worker in self._workers:
                worker.cancel()
        self._stopping = True
        await asyncio.gather(*self._workers, return_exceptions=kind is not None)

    async def _work(self, index: int) -> None:
        is_last = False
        while not is_last:
            is_last = self._stopping
            self._open[index] = Answer()
            answer = await self._session.stream(self._prompts[index], self._open[index])
            assert answer.error is None, answer.error
            assert answer.ids == self._expected[index]
            assert answer.finish_reason == "length"
            assert answer.usage["completion_tokens"] == len(answer.ids)
            self.answers.append(answer)

    async def goes_on(self, num_tokens: int = 3) -> None:
        """Wait until every stream has brought some more tokens."""
        before = [(id(answer), len(answer.ids)) for answer in self._open]

        def has_moved(index: int) -> bool:
            answer, (old, num_ids) = self._open[index], before[index]
            return id(answer) != old or len(answer.ids) >= num_ids + num_tokens

        def all_have_moved() -> bool:
            for worker in self._workers:
                if worker.done():
                    worker.result()
            return all(has_moved(index) for index in range(len(self._open)))

        await self._session.until(all_have_moved, f"{num_tokens} more tokens on every stream")


async def _ignore(_error: Exception) -> None:
    """NATS comes and goes in these tests."""
