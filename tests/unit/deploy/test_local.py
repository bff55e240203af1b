"""The supervisor with stand-ins for planner, gateway and engine, a real nats-server, and real signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from deploy.local import STOP_GRACE_S
from deploy.preflight import find_nats_server, free_port
from deploy.state import Running

STUB = Path(__file__).with_name("stub_part.py")
UP = """
import json, os, sys
from pathlib import Path
from deploy.errors import DeployError
from deploy.local import serve
from deploy.parts import Commands
from deploy.settings import UpSettings, restart_delay_s
given = json.loads(sys.argv[1])
paths = {name: Path(given.pop(name)) for name in ("state_dir", "cache_dir")}
part = lambda name: (sys.executable, sys.argv[2], name)
commands = Commands(planner=part("planner"), gateway=part("gateway"), engine=part("engine"))
try:
    settings = UpSettings(**paths, **given, dtype="float32", restart_delay_s=restart_delay_s(os.environ))
    serve(settings, os.environ, lambda line: print(line, flush=True), commands)
except DeployError as error:
    sys.exit(f"error: {error}")
"""


def wait_for(what: Callable[[], object], why: str, timeout_s: float = 60.0) -> None:
    give_up_s = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError, msgspec.DecodeError, psutil.NoSuchProcess, KeyError):
            if what():
                return
        assert time.monotonic() < give_up_s, why
        time.sleep(0.02)


def listens(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port)):
        return True


class Up:
    """A supervisor in a process of its own, and what it left."""

    def __init__(self, state_dir: Path, model_dir: Path, env: dict[str, str], **options: object) -> None:
        self.state_dir = state_dir
        self.port = int(str(options.pop("port", free_port())))
        settings = {"state_dir": str(state_dir), "cache_dir": str(state_dir), "model": str(model_dir)}
        arguments = json.dumps(settings | {"port": self.port} | options)
        self.output = state_dir.with_suffix(f".{free_port()}.out")
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", UP, arguments, str(STUB)],
                stdout=output,
                stderr=output,
                env={**os.environ, **env},
                start_new_session=True,
            )
        self.seen: dict[int, psutil.Process] = {}

    def said(self) -> str:
        return self.output.read_text()

    def running(self) -> Running:
        return msgspec.json.decode((self.state_dir / "up.json").read_bytes(), type=Running)

    def wait_until_ready(self) -> None:
        wait_for(lambda: "Ctrl-C stops everything" in self.said() or self.process.poll() is not None, self.said())
        assert self.process.poll() is None, self.said()
        self.look()

    def look(self) -> None:
        """Remember all processes below the supervisor."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            self.seen[process.pid] = process

    def ranks_of(self, instance: str) -> list[psutil.Process]:
        """Waits until the instance has started its ranks."""
        agent = psutil.Process(self.running().pids[instance])
        wait_for(lambda: agent.children(), f"{instance} has no rank: {self.said()}")
        self.look()
        return list(agent.children())

    def left(self) -> list[psutil.Process]:
        return [one for one in self.seen.values() if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]

    def log(self, part: str) -> str:
        path = self.state_dir / "logs" / f"{part}.log"
        return path.read_text() if path.exists() else ""

    def spotserve(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deploy", *arguments, "--state-dir", str(self.state_dir)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    def states(self) -> dict[str, str]:
        report = json.loads(self.spotserve("status", "--json").stdout)
        return {instance["id"]: instance["state"] for instance in report["instances"]}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """As much of a model as the checks before the start look at."""
    directory = tmp_path / "tiny-model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_text("{}")
    header = b'{"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    return directory


Start = Callable[..., Up]


@pytest.fixture
def start(tmp_path: Path, model_dir: Path) -> Iterator[Start]:
    ups: list[Up] = []

    def start_one(env: dict[str, str] | None = None, state: str = "state", **options: object) -> Up:
        ups.append(Up(tmp_path / state, model_dir, env or {}, **options))
        return ups[-1]

    yield start_one
    for up in ups:
        if up.process.poll() is None:
            up.process.send_signal(signal.SIGTERM)
        up.process.wait(30)
        wait_for(lambda up=up: not up.left(), f"left behind: {up.left()}\n{up.said()}")  # type: ignore[misc]  # mypy cannot infer a lambda with a default


def test_starts_in_order_serves_and_ctrl_c_leaves_nothing(start: Start) -> None:
    up = start()
    up.wait_until_ready()
    said = up.said()
    steps = ["nats-server is ready", "planner is ready", "gateway is ready", "] ready: tiny-model, float32", "curl -N"]
    assert sorted(steps, key=said.index) == steps
    assert set(up.running().pids) == {"nats", "planner", "gateway", "i0", "i1", "i2"}
    assert all(len(up.ranks_of(instance)) == 1 for instance in ("i0", "i1", "i2"))
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(20) == 0, up.said()
    assert up.left() == []
    assert not (up.state_dir / "up.json").exists()


def test_a_second_ctrl_c_does_not_wait_for_a_part_that_stays(start: Start) -> None:
    up = start(num_instances=1, env={"STUB_ENGINE_STAYS": "1"})
    up.wait_until_ready()
    agent = psutil.Process(up.running().pids["i0"])
    wait_for(lambda: "agent ready" in up.log("i0"), "no agent")
    up.process.send_signal(signal.SIGINT)
    wait_for(lambda: "stopping" in up.said(), up.said())
    assert agent.is_running()
    asked_s = time.monotonic()
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(20) == 0
    assert time.monotonic() - asked_s < STOP_GRACE_S
    assert up.left() == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a watcher does it, within a moment")
def test_sigkill_of_the_supervisor_leaves_no_direct_child(start: Start) -> None:
    up = start(num_instances=1)
    up.wait_until_ready()
    direct = set(up.running().pids.values())
    up.process.kill()
    up.process.wait(10)
    wait_for(lambda: not [one for one in up.left() if one.pid in direct], f"left: {up.left()}", 5)
    for orphan in up.left():  # the stand-in's rank does not watch its agent; the engine's does
        orphan.kill()


def test_preempt_kill_and_add_are_carried_out_and_told(start: Start) -> None:
    up = start(num_instances=2)
    up.wait_until_ready()
    assert up.states() == {"i0": "starting", "i1": "starting"}

    ranks = up.ranks_of("i1")
    assert up.spotserve("kill", "i1").returncode == 0
    wait_for(lambda: "reason='killed'" in up.log("planner"), up.said())
    assert ranks
    wait_for(lambda: not any(one.is_running() for one in ranks), "the rank outlived its instance")

    asked_s = time.time()
    done = up.spotserve("preempt", "i0", "--notice", "10")
    assert "taken away in 10 s" in done.stdout
    wait_for(lambda: "PreemptionNotice" in up.log("planner"), up.said())
    assert up.states() == {"i0": "grace", "i1": "lost"}
    assert "i0 is under notice" in up.spotserve("preempt", "i0").stderr
    wait_for(lambda: "reason='preempted'" in up.log("planner"), up.said())
    assert time.time() - asked_s >= 10

    assert "i2 is starting" in up.spotserve("add", "--market", "on_demand").stdout
    wait_for(lambda: "agent ready" in up.log("i2"), up.said())
    assert up.states() == {"i0": "lost", "i1": "lost", "i2": "starting"}
    refused = up.spotserve("kill", "i0")
    assert (refused.returncode, refused.stderr) == (2, "spotserve: no instance 'i0' is running here; running: i2\n")


def test_a_cancelled_notice_lets_the_instance_live(start: Start) -> None:
    up = start(num_instances=1)
    up.wait_until_ready()
    assert "i0 is under no notice" in up.spotserve("preempt", "i0", "--cancel").stderr
    assert up.spotserve("preempt", "i0", "--notice", "8").returncode == 0
    noticed_s = time.monotonic()
    assert up.spotserve("preempt", "i0", "--cancel").stdout == "i0 stays: its notice is cancelled\n"
    wait_for(lambda: "NoticeCancelled" in up.log("planner"), up.said())
    wait_for(lambda: time.monotonic() > noticed_s + 8.5, "the deadline passes")
    assert psutil.Process(up.running().pids["i0"]).is_running()
    assert up.states() == {"i0": "ready"}
    assert up.spotserve("preempt", "i0", "--notice", "0").returncode == 0, "it can be noticed again"
    wait_for(lambda: up.states() == {"i0": "lost"}, up.said())


def test_autoscale_launches_what_is_wanted_and_gives_back_what_is_not(start: Start) -> None:
    wanted = [
        {"spot": 2, "on_demand": 1, "reason": "busy"},
        {"spot": 1, "on_demand": 0, "reason": "idle", "release": ["i2", "i1"]},
    ]
    up = start(
        num_instances=1, autoscale=True, max_instances=4, max_on_demand=1, env={"STUB_DESIRED": json.dumps(wanted)}
    )
    up.wait_until_ready()
    limits = "limits SPOTSERVE_PLANNER_MAX_ON_DEMAND=1 SPOTSERVE_PLANNER_MAX_SPOT=3 SPOTSERVE_PLANNER_MIN_SPOT=1"
    assert limits in up.log("planner")
    wait_for(lambda: "met 2 1" in up.log("planner"), up.said() + up.log("planner"))
    assert "autoscale: 1 more on_demand (busy)" in up.said()
    wait_for(lambda: "met 1 0" in up.log("planner"), up.said() + up.log("planner"))
    assert "autoscale: i2 is given back (idle)" in up.said()
    wait_for(lambda: up.states() == {"i0": "starting", "i1": "lost", "i2": "lost"}, up.said())
    os.kill(up.running().pids["i0"], signal.SIGKILL)
    wait_for(lambda: up.states().get("i3") == "starting", "what is lost is not replaced: " + up.said())
    up.look()


def test_an_instance_that_ends_by_itself_is_reported_lost(start: Start) -> None:
    up = start(num_instances=2)
    up.wait_until_ready()
    up.ranks_of("i0")
    os.kill(up.running().pids["i0"], signal.SIGTERM)
    wait_for(lambda: "i0: lost, the agent exited with code 0" in up.said(), up.said())
    wait_for(lambda: up.states()["i0"] == "lost", up.said())


@pytest.mark.parametrize("part", ["planner", "gateway", "nats"])
def test_a_part_that_is_killed_comes_back(start: Start, part: str) -> None:
    up = start(num_instances=1, env={"SPOTSERVE_UP_RESTART_DELAY_S": "0.3"})
    up.wait_until_ready()
    first = up.running().pids[part]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: up.running().pids[part] != first, up.said())
    assert f"{part} was killed by SIGKILL: started again in 0.3 s" in up.said()
    wait_for(lambda: up.spotserve("status").returncode == 0, up.said())
    up.look()


def test_loss_while_nats_is_away_is_told_when_it_is_back(start: Start) -> None:
    up = start(num_instances=2, env={"SPOTSERVE_UP_RESTART_DELAY_S": "15"})
    up.wait_until_ready()
    assert up.spotserve("preempt", "i0", "--notice", "2").returncode == 0
    os.kill(up.running().pids["nats"], signal.SIGKILL)
    wait_for(lambda: "i0: lost, preempted" in up.said(), up.said())
    assert "nats" not in up.running().pids
    refused = up.spotserve("kill", "i1")
    assert refused.returncode == 2
    assert "cannot reach NATS" in refused.stderr
    wait_for(lambda: "InstanceLost" in up.log("planner"), up.said() + up.log("planner"))
    up.look()


def test_errors_before_the_start_are_one_line_and_start_nothing(start: Start, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        up = start(port=taken.getsockname()[1])
        assert up.process.wait(20) == 1
    assert up.said().splitlines() == [
        f"error: port {up.port} on 127.0.0.1 is taken: stop what listens there, or choose another with --port"
    ]
    assert not (up.state_dir / "logs").exists()
    no_nats = start(nats_url=f"nats://127.0.0.1:{free_port()}")
    assert no_nats.process.wait(20) == 1
    assert "error: cannot reach NATS" in no_nats.said()


def test_a_second_up_is_refused_and_a_stale_lock_is_taken_over(start: Start) -> None:
    first = start(num_instances=1)
    first.wait_until_ready()
    second = start(num_instances=1)
    assert second.process.wait(20) == 1
    assert f"another `spotserve up` (pid {first.process.pid}) uses" in second.said()
    assert first.spotserve("status").returncode == 0
    first.process.kill()
    first.process.wait(10)
    for rank in [one for one in first.left() if one.pid not in first.running().pids.values()]:
        rank.kill()
    refused = first.spotserve("status")
    assert (refused.returncode, "no `spotserve up` is running" in refused.stderr) == (2, True)
    third = start(num_instances=1)
    third.wait_until_ready()


@pytest.fixture
def external_nats(tmp_path: Path) -> Iterator[Callable[..., tuple[str, subprocess.Popen[bytes]]]]:
    servers: list[subprocess.Popen[bytes]] = []

    def start_server(*options: str) -> tuple[str, subprocess.Popen[bytes]]:
        port = free_port()
        command = [
            str(find_nats_server()),
            "-a",
            "127.0.0.1",
            "-p",
            str(port),
            "-l",
            str(tmp_path / "nats.log"),
            *options,
        ]
        servers.append(subprocess.Popen(command))
        wait_for(lambda: listens(port), "nats-server does not listen")
        return f"nats://127.0.0.1:{port}", servers[-1]

    yield start_server
    for server in servers:
        server.kill()
        server.wait()


def test_an_external_nats_is_used_left_alone_and_ids_go_on(
    start: Start, tmp_path: Path, external_nats: Callable[..., tuple[str, subprocess.Popen[bytes]]]
) -> None:
    url, server = external_nats("-js", "-sd", str(tmp_path / "store"))
    for instance in ("i0", "i1"):
        up = start(num_instances=1, nats_url=url)
        up.wait_until_ready()
        assert set(up.running().pids) == {"planner", "gateway", instance}
        assert up.spotserve("status").returncode == 0
        up.process.send_signal(signal.SIGTERM)
        assert up.process.wait(20) == 0
        assert server.poll() is None


def test_an_external_nats_without_jetstream_is_refused(
    start: Start, external_nats: Callable[..., tuple[str, subprocess.Popen[bytes]]]
) -> None:
    url, _ = external_nats()
    up = start(nats_url=url)
    assert up.process.wait(20) == 1
    assert f"error: cannot reach NATS at {url}: it answers, but JetStream is off (start it with -js)" in up.said()


def test_an_engine_that_cannot_start_ends_the_start_with_its_last_words(start: Start) -> None:
    up = start(env={"STUB_ENGINE_FAILS": "1"})
    assert up.process.wait(30) == 1
    assert "i0: lost, the agent exited with code 1 (cannot load the model: no such tensor); its log:" in up.said()


def test_logs_of_the_last_run_are_kept_and_ids_go_on_with_the_state(start: Start) -> None:
    first = start(num_instances=2)
    first.wait_until_ready()
    wait_for(lambda: "agent ready" in first.log("i0"), "the agent has said something")
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(20) == 0
    second = start(num_instances=1, keep_state=True)
    second.wait_until_ready()
    assert "agent ready" in (second.state_dir / "logs.previous" / "i0.log").read_text()
    assert set(second.running().pids) == {"nats", "planner", "gateway", "i2"}


def test_status_and_chat_of_a_running_up(start: Start) -> None:
    up = start(num_instances=1)
    up.wait_until_ready()
    report = json.loads(up.spotserve("status", "--json").stdout)
    assert set(report) == {"epoch", "instances", "pipelines", "requests", "planner"}
    assert report["requests"] == {"running": 2, "waiting": 1}
    assert report["instances"] == [
        {"id": "i0", "market": "spot", "state": "starting", "deadline_s": None, "ranks": ["i0-0"]}
    ]
    assert up.spotserve("chat", "Tell me a story").stdout == "Once upon\n"
    assert "no plan yet" in up.spotserve("plan").stdout


def test_gateway_workers_come_back_and_are_counted_together(start: Start) -> None:
    up = start(num_instances=1, gateway_workers=2, env={"SPOTSERVE_UP_RESTART_DELAY_S": "0.3"})
    up.wait_until_ready()
    running = up.running()
    assert {"gateway", "gateway-1"} <= set(running.pids)
    assert len(running.admin_ports) == 2
    assert f"metrics   http://127.0.0.1:{running.admin_ports[0]}/metrics" in up.said()
    assert json.loads(up.spotserve("status", "--json").stdout)["requests"] == {"running": 4, "waiting": 2}
    os.kill(running.pids["gateway-1"], signal.SIGKILL)
    wait_for(lambda: up.running().pids.get("gateway-1", 0) not in (0, running.pids["gateway-1"]), up.said())
    wait_for(lambda: up.spotserve("status").returncode == 0, up.said())
    assert up.running().pids["gateway"] == running.pids["gateway"]
    up.look()


def test_an_address_that_others_can_reach_needs_keys(start: Start) -> None:
    up = start(host="0.0.0.0")
    assert up.process.wait(20) == 1
    (line,) = up.said().splitlines()
    assert line.startswith("error: --host '0.0.0.0'")
    assert "spotserve keys create NAME" in line
    assert "--no-auth" in line
