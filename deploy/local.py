"""The one-machine supervisor: starts every part in order, keeps them running, plays the cloud, and stops them all."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import time
from collections.abc import Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx
import msgspec
from nats.js.errors import Error as JetStreamError

from deploy.autoscale import Autoscaler
from deploy.bus import FleetBus, connect
from deploy.cloud import LocalCloud
from deploy.default_model import Say
from deploy.errors import NatsUnreachableError, PartFailedError
from deploy.keys import key_file_of
from deploy.model_source import resolve_model
from deploy.parts import Commands, GatewayWorker, engine_program, gateway_program, nats_program, planner_program
from deploy.preflight import check_memory, check_port, choose_dtype, find_nats_server, free_port, read_cpu_flags
from deploy.process import Child, Program
from deploy.service import Service
from deploy.settings import UpSettings
from deploy.state import Running, StateDir
from planner.protocol import Market

PART_READY_TIMEOUT_S: Final = 120.0
STOP_GRACE_S: Final = 5.0
READY_POLL_S: Final = 0.1
STILL_WAITING_S: Final = 10.0
STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """What the checks before the start have found."""

    model_dir: Path
    dtype: str
    nats_binary: Path | None
    """None: an external server."""
    key_file: Path | None = None
    """API keys that the gateway asks for."""


def prepare(settings: UpSettings, say: Say) -> Prepared:
    """All checks that need no running part, cheap ones first; fetches the model. Raises DeployError."""
    dtype = choose_dtype(settings, read_cpu_flags())
    key_file = key_file_of(settings)
    check_port(settings.host, settings.port)
    for port in _given_admin_ports(settings):
        check_port("127.0.0.1", port)
    nats_binary = find_nats_server() if settings.nats_url is None else None
    model_dir = resolve_model(settings.model, settings.cache_dir, say)
    check_memory(settings, model_dir, dtype)
    return Prepared(model_dir=model_dir, dtype=dtype, nats_binary=nats_binary, key_file=key_file)


def _given_admin_ports(settings: UpSettings) -> list[int]:
    first = settings.admin_port
    return [] if first is None else list(range(first, first + settings.gateway_workers))


def serve(settings: UpSettings, environ: Mapping[str, str], say: Say, commands: Commands | None = None) -> None:
    """Check, start, serve until a signal, stop. Raises DeployError; KeyboardInterrupt while it still checks."""
    state = StateDir(settings.state_dir)
    state.claim()
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a download ends with us
        prepared = prepare(settings, say)
        # An external server remembers the instances of earlier fleets: their ids must not come again.
        state.begin(keep_state=settings.keep_state or settings.nats_url is not None)
        asyncio.run(Supervisor(settings, environ, say, commands).run(prepared))
    finally:
        state.release()


class Supervisor:
    """One `up`. `say` gets one line an event."""

    def __init__(
        self, settings: UpSettings, environ: Mapping[str, str], say: Say, commands: Commands | None = None
    ) -> None:
        """`settings.state_dir` must be claimed and begun."""
        self._settings = settings
        self._environ = environ
        self._commands = commands or Commands()
        self._state = StateDir(settings.state_dir)
        self._say = self._with_elapsed(say)
        self._say_plainly = say
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._running: Running | None = None
        self._children: dict[str, Child] = {}
        self._services: list[Service] = []
        self._cloud: LocalCloud | None = None
        self._places: dict[str, int] = {}
        """Of the instances among this machine's GPUs."""
        self._first_instance: Child | None = None
        self._bus: FleetBus | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._nats_url = settings.nats_url or ""
        self._admin_ports = _given_admin_ports(settings) or [free_port() for _ in self._worker_numbers]

    @staticmethod
    def _with_elapsed(say: Say) -> Say:
        started_s = time.monotonic()
        return lambda line: say(f"[{time.monotonic() - started_s:6.1f} s] {line}")

    async def run(self, prepared: Prepared) -> None:
        """Serve until SIGINT, SIGTERM or SIGHUP; nothing is left behind. Raises DeployError if the start fails."""
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        try:
            start = asyncio.create_task(self._start(prepared))
            stop = asyncio.create_task(self._stopping.wait())
            await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
            if start.done():
                start.result()
                await stop
            start.cancel()
            stop.cancel()
            await asyncio.wait({start, stop})
        finally:
            await self._shut_down()
            for number in STOP_SIGNALS:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    # --- Start -------------------------------------------------------------------------------------------------

    async def _start(self, prepared: Prepared) -> None:
        await self._start_nats(prepared.nats_binary)
        self._write_running()
        planner = planner_program(self._commands, self._settings, self._nats_url)
        service, child = await self._launch_service(planner)
        await child.wait_until(lambda: child.has_said("planner ready"), PART_READY_TIMEOUT_S)
        self._keep_running(service)
        gateways = [await self._launch_service(self._gateway_program(prepared, n)) for n in self._worker_numbers]
        await self._start_cloud(prepared)  # the instances load while the gateway starts
        for number, (service, child) in enumerate(gateways):
            await child.wait_until(partial(_accepts, self._admin_endpoints[number]), PART_READY_TIMEOUT_S)
            await child.wait_until(lambda: _accepts(self._endpoint), PART_READY_TIMEOUT_S)
            self._keep_running(service)
        await self._wait_until_ready()
        self._say(f"ready: {self._settings.served_model_name}, {prepared.dtype}")
        self._print_next_commands(prepared.key_file)

    @property
    def _worker_numbers(self) -> range:
        return range(self._settings.gateway_workers)

    def _gateway_program(self, prepared: Prepared, number: int) -> Program:
        worker = GatewayWorker(
            number=number,
            admin_port=self._admin_ports[number],
            metrics_dir=self._state.metrics,
            key_file=prepared.key_file,
        )
        return gateway_program(self._commands, self._settings, self._nats_url, prepared.model_dir, worker)

    async def _start_nats(self, binary: Path | None) -> None:
        if binary is not None:
            port = free_port()
            self._nats_url = f"nats://127.0.0.1:{port}"
            service, child = await self._launch_service(nats_program(binary, port, self._state.nats))
            await child.wait_until(lambda: _accepts(self._nats_url), PART_READY_TIMEOUT_S)
            service.keep_running()
        client = await connect(self._nats_url)
        self._bus = FleetBus(client, self._settings.model_slug)
        try:
            await client.jetstream(timeout=5).account_info()
        except (JetStreamError, TimeoutError) as error:
            raise NatsUnreachableError(
                self._nats_url, "it answers, but JetStream is off (start it with -js)"
            ) from error
        self._say(f"nats-server is ready on {self._nats_url}{'' if binary else ' (external)'}")

    async def _launch_service(self, program: Program) -> tuple[Service, Child]:
        async def start() -> Child:
            return await self._launch(program)

        service = Service(program.name, start, self._settings.restart_delay_s, self._say)
        self._services.append(service)
        return service, await service.start()

    def _keep_running(self, service: Service) -> None:
        service.keep_running()
        self._say(f"{service.name} is ready")

    def _gpus_for(self, instance: str) -> list[str]:
        """The first GPUs of this machine that no other instance has; none with a backend that shares them."""
        if self._settings.backend == "torch":
            return []
        place = next(place for place in itertools.count() if place not in self._places.values())
        self._places[instance] = place
        first, num_gpus = place * self._settings.ranks_per_instance, self._settings.ranks_per_instance
        visible = [name for name in self._environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        return [visible[i] if i < len(visible) else str(i) for i in range(first, first + num_gpus)]

    async def _free_gpus_after(self, instance: str, child: Child) -> None:
        await child.wait()
        self._places.pop(instance, None)

    async def _start_cloud(self, prepared: Prepared) -> None:
        assert self._bus is not None

        async def launch(instance: str, market: Market) -> Child:
            program = engine_program(
                self._commands,
                self._settings,
                self._nats_url,
                prepared.model_dir,
                prepared.dtype,
                instance,
                market,
                self._gpus_for(instance),
            )
            child = await self._launch(program)
            self._spawn(self._free_gpus_after(instance, child))
            self._first_instance = self._first_instance or child
            self._say(f"{instance} is starting ({market}, {self._settings.ranks_per_instance} rank(s))")
            return child

        self._cloud = LocalCloud(
            self._bus,
            launch,
            self._state.take_instance_id,
            self._settings.market,
            self._settings.ranks_per_instance,
            self._say,
        )
        self._spawn(self._bus.send_outbox())
        await self._bus.serve_commands(self._cloud.handle)
        if self._settings.autoscale:
            autoscaler = Autoscaler(self._cloud, self._say)
            await self._bus.follow_desired(autoscaler.follow)
            self._spawn(autoscaler.run())
        for _ in range(self._settings.num_instances):
            await self._cloud.add()

    async def _launch(self, program: Program) -> Child:
        child = await Child.start(program, self._state.log(program.name), self._environ)
        self._children[program.name] = child
        self._spawn(self._forget_when_ended(child))
        if self._running is not None:
            self._write_running()
        return child

    async def _forget_when_ended(self, child: Child) -> None:
        await child.wait()
        if self._children.get(child.name) is child:
            del self._children[child.name]
        if self._running is not None:
            self._write_running()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _wait_until_ready(self) -> None:
        """Until GET /ready is 200; raises PartFailedError when no instance is left that could make it so."""
        assert self._cloud is not None
        give_up_s = time.monotonic() + self._settings.ready_timeout_s
        next_line_s = time.monotonic() + STILL_WAITING_S
        async with httpx.AsyncClient(base_url=self._admin_endpoints[0], timeout=2.0, trust_env=False) as client:
            while self._settings.num_instances > 0 and not await _is_ready(client):
                if not self._cloud.instances:
                    first = self._first_instance
                    assert first is not None
                    raise PartFailedError(first.name, f"ended before it could serve{first.last_words()}", first.log)
                if time.monotonic() > give_up_s:
                    raise PartFailedError("gateway", "found no pipeline in time", self._state.log("gateway"))
                if time.monotonic() > next_line_s:
                    names = ", ".join(self._cloud.instances)
                    self._say(f"waiting for a pipeline ({names} load the model; logs: {self._state.logs})")
                    next_line_s += STILL_WAITING_S
                await asyncio.sleep(READY_POLL_S)

    @property
    def _endpoint(self) -> str:
        assert self._running is not None
        return self._running.endpoint

    @property
    def _admin_endpoints(self) -> list[str]:
        assert self._running is not None
        return self._running.admin_endpoints

    def _write_running(self) -> None:
        self._running = Running(
            pid=os.getpid(),
            host=self._settings.host,
            port=self._settings.port,
            nats_url=self._nats_url,
            admin_ports=self._admin_ports,
            tls_cert=str(self._settings.tls_cert) if self._settings.tls_cert else None,
            model=self._settings.model_slug,
            served_model_name=self._settings.served_model_name,
            started_at_s=self._running.started_at_s if self._running else time.time(),
            pids={name: child.pid for name, child in self._children.items()},
        )
        self._state.write_running(self._running)

    def _print_next_commands(self, key_file: Path | None) -> None:
        assert self._cloud is not None
        first = next(iter(self._cloud.instances), "i0")
        key = " -H 'Authorization: Bearer KEY'" if key_file else ""
        keys = f"API keys  {key_file} (spotserve keys)\n" if key_file else ""
        admin = " ".join(f"{one}/metrics" for one in self._admin_endpoints)
        body = (
            f'{{"model": "{self._settings.served_model_name}", "stream": true, '
            '"messages": [{"role": "user", "content": "Tell me a story"}]}'
        )
        self._say_plainly(
            f"\nendpoint  {self._endpoint}/v1   (logs: {self._state.logs})\nmetrics   {admin}\n{keys}\n"
            f"  curl -N {self._endpoint}/v1/chat/completions{key} -H 'Content-Type: application/json' \\\n"
            f"    -d '{body}'\n\n"
            "in another terminal:\n"
            '  spotserve chat "Tell me a story"   stream an answer\n'
            "  spotserve status                   the fleet and its pipelines\n"
            f"  spotserve preempt {first:<3}              take an instance away in 30 s; the stream goes on\n\n"
            "Ctrl-C stops everything."
        )

    # --- Stop --------------------------------------------------------------------------------------------------

    async def _shut_down(self) -> None:
        self._say("stopping (Ctrl-C again: at once)")
        for task in self._tasks:
            task.cancel()
        if self._bus is not None:
            await self._bus.close()
        await asyncio.gather(*(service.let_go() for service in self._services))
        hurry = asyncio.create_task(self._kill_all_when_hurried())
        nats = [service for service in self._services if service.name == "nats"]
        others = [service for service in self._services if service.name != "nats"]
        stops = [service.stop(STOP_GRACE_S) for service in others]
        await asyncio.gather(*stops, *([self._cloud.stop(STOP_GRACE_S)] if self._cloud else []))
        await asyncio.gather(*(service.stop(STOP_GRACE_S) for service in nats))
        hurry.cancel()
        self._say("stopped")

    async def _kill_all_when_hurried(self) -> None:
        await self._hurry.wait()
        for child in self._children.values():
            child.signal_kill()


def _accepts(url: str) -> bool:
    """Whether something listens there."""
    address = urlsplit(url)
    with contextlib.suppress(OSError), socket.create_connection((address.hostname, address.port), timeout=0.2):
        return True
    return False


async def _is_ready(client: httpx.AsyncClient) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return (await client.get("/ready")).status_code == httpx.codes.OK
    return False
