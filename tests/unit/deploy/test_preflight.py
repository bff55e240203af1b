"""Settings, checks before the start, the programs' environments, and the small parts of the supervisor."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.errors import NotEnoughMemoryError, NotRunningError, PartFailedError, SettingError
from deploy.parts import Commands, GatewayWorker, engine_program, gateway_program, planner_program
from deploy.preflight import check_memory, check_port, choose_dtype, read_cpu_flags
from deploy.process import LAUNCHER, Child, Program, describe_exit
from deploy.settings import UpSettings, default_state_dir, restart_delay_s
from deploy.state import Running, StateDir
from planner.protocol import Market


def settings(**given: Any) -> UpSettings:
    return UpSettings(state_dir=Path("state"), cache_dir=Path("cache"), **given)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"dtype": "int8"}, "--dtype 'int8': must be one of auto, float32, bfloat16, float16"),
        ({"num_instances": -1}, "--instances -1: must be 0 or more"),
        ({"ranks_per_instance": 0}, "--ranks-per-instance 0"),
        ({"max_model_len": 0}, "--max-model-len 0"),
        ({"port": 70000}, "--port 70000"),
        ({"reduction": "slow"}, "--reduction 'slow': must be one of fast, fixed"),
        ({"objective": "cost"}, "--objective 'cost'"),
        ({"device": "tpu"}, "--device 'tpu'"),
        ({"stages": 0}, "--stages 0"),
    ],
)
def test_a_bad_setting_is_named(given: Mapping[str, Any], named: str) -> None:
    with pytest.raises(SettingError, match="^" + named):
        settings(**given)


def test_names_of_the_model(tmp_path: Path) -> None:
    hub = settings(model="Qwen/Qwen2.5-0.5B-Instruct")
    assert (hub.served_model_name, hub.model_slug) == ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen-Qwen2-5-0-5B-Instruct")
    directory = tmp_path / "my model.v2"
    directory.mkdir()
    local = settings(model=str(directory))
    assert (local.served_model_name, local.model_slug) == ("my model.v2", "my-model-v2")


def test_environment_settings() -> None:
    assert default_state_dir({"XDG_STATE_HOME": "/x"}) == Path("/x/spotserve")
    assert default_state_dir({}) == Path.home() / ".local" / "state" / "spotserve"
    assert restart_delay_s({"SPOTSERVE_UP_RESTART_DELAY_S": "5"}) == 5.0
    for bad in ("soon", "-1", "nan"):
        with pytest.raises(SettingError, match="SPOTSERVE_UP_RESTART_DELAY_S"):
            restart_delay_s({"SPOTSERVE_UP_RESTART_DELAY_S": bad})


@pytest.mark.parametrize(
    ("given", "flags", "dtype"),
    [
        ({}, {"avx512_bf16"}, "bfloat16"),
        ({}, {"amx_bf16"}, "bfloat16"),
        ({}, {"avx2"}, "float32"),
        ({"device": "cuda"}, set(), "bfloat16"),
        ({"dtype": "float32"}, {"avx512_bf16"}, "float32"),
        ({"dtype": "float16", "device": "cuda"}, set(), "float16"),
    ],
)
def test_dtype_is_chosen_by_hardware(given: Mapping[str, Any], flags: set[str], dtype: str) -> None:
    assert choose_dtype(settings(**given), frozenset(flags)) == dtype


def test_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(SettingError, match="--dtype 'float16'"):
        choose_dtype(settings(dtype="float16"), frozenset())


def test_cpu_flags(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nflags\t\t: fpu avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert read_cpu_flags(file) == {"fpu", "avx512_bf16"}
    assert read_cpu_flags(tmp_path / "none") == frozenset()


def test_memory_is_estimated_for_all_instances(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"BF16","shape":[1000000000],"data_offsets":[0,2000000000]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    given = settings(num_instances=2, ranks_per_instance=2)
    check_memory(given, tmp_path, "float32", available_bytes=10_000_000_000)
    with pytest.raises(NotEnoughMemoryError, match=r"4 rank\(s\) .* need about 10\.0 GB, 9\.9 GB are available"):
        check_memory(given, tmp_path, "float32", available_bytes=9_900_000_000)
    check_memory(given, tmp_path, "bfloat16", available_bytes=9_900_000_000)


def test_a_host_of_another_machine_is_named() -> None:
    with pytest.raises(SettingError, match=r"--host '192\.0\.2\.1'"):
        check_port("192.0.2.1", 8000)


def test_options_that_are_not_given_stay_out_of_the_environment() -> None:
    commands, bare = Commands(), settings()
    assert planner_program(commands, bare, "nats://n").environment == {
        "SPOTSERVE_PLANNER_NATS_URL": "nats://n",
        "SPOTSERVE_PLANNER_MODEL": "SmolLM2-135M-Instruct",
    }
    worker = GatewayWorker(number=1, admin_port=9, metrics_dir=Path("d"), key_file=None)
    given = (
        "HOST",
        "PORT",
        "NATS_URL",
        "MODEL",
        "MODEL_DIR",
        "SERVED_MODEL_NAME",
        "DRAIN_S",
        "GATEWAY_ID",
        "ADMIN_PORT",
    )
    alone = gateway_program(commands, bare, "nats://n", Path("m"), worker)
    assert set(alone.environment) == {f"SPOTSERVE_GATEWAY_{name}" for name in given}
    one_of_two = gateway_program(commands, settings(gateway_workers=2), "nats://n", Path("m"), worker)
    assert one_of_two.name == "gateway-1"
    assert one_of_two.environment["SPOTSERVE_GATEWAY_REUSE_PORT"] == "True"
    assert one_of_two.environment["PROMETHEUS_MULTIPROC_DIR"] == "d"
    full = settings(max_model_len=512, reduction="fixed", rank_memory_mb=3, stages=2, objective="latency")
    assert planner_program(commands, full, "nats://n").environment["SPOTSERVE_PLANNER_PIPELINE"] == "2"
    environment = engine_program(commands, full, "u", Path("m"), "float32", "i7", Market.ON_DEMAND).environment
    assert environment == {
        "SPOTSERVE_ENGINE_NATS_URL": "u",
        "SPOTSERVE_ENGINE_MODEL": "SmolLM2-135M-Instruct",
        "SPOTSERVE_ENGINE_MODEL_DIR": "m",
        "SPOTSERVE_ENGINE_INSTANCE": "i7",
        "SPOTSERVE_ENGINE_MARKET": "on_demand",
        "SPOTSERVE_ENGINE_NUM_RANKS": "1",
        "SPOTSERVE_ENGINE_DTYPE": "float32",
        "SPOTSERVE_ENGINE_DEVICE": "cpu",
        "SPOTSERVE_ENGINE_MAX_MODEL_LEN": "512",
        "SPOTSERVE_ENGINE_REDUCTION": "fixed",
        "SPOTSERVE_ENGINE_RANK_MEMORY_BYTES": str(3 * 2**20),
        "SPOTSERVE_ENGINE_CACHE_DIR": "cache",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def test_up_json_of_a_dead_process_is_not_running(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    state = StateDir(tmp_path)
    with pytest.raises(NotRunningError, match="no `spotserve up` is running"):
        state.read_running()
    running = Running(
        pid=gone.pid, host="0.0.0.0", port=1, nats_url="n", model="m", served_model_name="m", started_at_s=0.0
    )
    state.write_running(running)
    with pytest.raises(NotRunningError):
        state.read_running()
    assert running.endpoint == "http://127.0.0.1:1"


async def test_a_part_that_ends_before_it_is_ready_is_said_with_its_last_words(tmp_path: Path) -> None:
    program = Program(name="planner", command=(sys.executable, "-c", "import sys; sys.exit('no such model')"))
    child = await Child.start(program, tmp_path / "planner.log", os.environ)
    with pytest.raises(PartFailedError, match=r"planner exited with code 1 \(no such model\); its log: .*planner\.log"):
        await child.wait_until(lambda: False, 20.0)


async def test_a_part_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    script = (
        "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('ready', subprocess.Popen(['sleep', '100']).pid, flush=True); time.sleep(100)"
    )
    log = tmp_path / "part.log"
    child = await Child.start(Program(name="part", command=(sys.executable, "-c", script)), log, os.environ)
    await child.wait_until(lambda: child.has_said("ready"), 20.0)
    grandchild = psutil.Process(int(log.read_text().split()[1]))
    await child.stop(0.1)
    assert child.returncode == -signal.SIGKILL
    gone, _ = await asyncio.to_thread(psutil.wait_procs, [grandchild], timeout=5)
    assert gone or grandchild.status() == psutil.STATUS_ZOMBIE


async def test_only_what_was_said_since_the_start_counts(tmp_path: Path) -> None:
    log = tmp_path / "part.log"
    log.write_text("part ready\n")
    child = await Child.start(Program(name="part", command=("sleep", "0")), log, os.environ)
    assert not child.has_said("part ready")
    await child.wait()


def test_the_watcher_for_other_systems_dies_with_its_parent() -> None:
    script = (
        "import runpy, sys; sys.platform = 'elsewhere';"
        f"sys.argv[1:] = sys.argv[1:]; runpy.run_path({str(LAUNCHER)!r}, run_name='__main__')"
    )
    code = (
        "import os, subprocess, sys;"
        f"child = subprocess.Popen([sys.executable, '-c', {script!r}, str(os.getpid()), 'sleep', '100'],"
        " start_new_session=True); print(child.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin is not None
    assert parent.stdout is not None
    watcher = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    psutil.wait_procs([watcher], timeout=10)
    assert not watcher.is_running() or watcher.status() == psutil.STATUS_ZOMBIE
    parent.stdin.close()
    parent.stdout.close()


@pytest.mark.parametrize(
    ("returncode", "text"),
    [(3, "exited with code 3"), (-9, "was killed by SIGKILL"), (-200, "was killed by signal 200")],
)
def test_exits_are_described(returncode: int, text: str) -> None:
    assert describe_exit(returncode) == text
