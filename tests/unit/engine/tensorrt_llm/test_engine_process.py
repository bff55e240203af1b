"""An engine's process is ended with everything that it started, however it behaves; stand-ins play the child."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest

from engine.backends.tensorrt_llm import launch
from engine.backends.tensorrt_llm.engine_process import EngineProcess
from engine.backends.tensorrt_llm.processes import is_alive
from engine.backends.tensorrt_llm.wire import Batch, Build, EngineSpec, Failed
from engine.errors import EngineUnavailable

HEAD = """
import asyncio, os, subprocess, sys, time
from engine.backends.tensorrt_llm.wire import *
async def main():
    reader, writer = await asyncio.open_unix_connection(sys.argv[1])
    def say(message):
        writer.write(encode(message))
    say(Imported(version="1.2.1", num_gpus=1, import_s=0.0))
"""
TAIL = "\nasyncio.run(main())\n"
SPEC = EngineSpec(
    model_dir="", dtype="", tensor=1, layers=[1], gpus_per_node=1, max_batch=1, max_model_len=1, max_num_tokens=1,
    block_tokens=1, num_kv_blocks=1,
)  # fmt: skip


class StandIn:
    """An engine process whose child is a script."""

    def __init__(self, tmp_path: Path, name: str, script: str) -> None:
        self.path = tmp_path / "child.py"
        self.path.write_text(script)
        self.mark = launch.mark_of(str(tmp_path), name)
        self.process = EngineProcess(self.mark)

    async def start(self) -> EngineProcess:
        root = str(Path(__file__).parents[4])
        environment = os.environ | {"PYTHONPATH": root, launch.MARK: self.mark}
        await self.process.start([sys.executable, str(self.path), self.process.socket_path], environment, 60.0)
        return self.process


async def test_a_child_that_shuts_down_is_not_killed(tmp_path: Path) -> None:
    body = "    assert isinstance(await receive(reader), Shutdown)\n    say(Closed())\n    await writer.drain()"
    process = await StandIn(tmp_path, "clean", HEAD + body + TAIL).start()
    assert await process.stop(10.0)


async def test_a_child_that_hangs_in_its_shutdown_is_killed(tmp_path: Path) -> None:
    process = await StandIn(tmp_path, "hangs", HEAD + "    time.sleep(1000)" + TAIL).start()
    pid = process.pid
    assert pid is not None
    started_s = time.monotonic()
    assert not await process.stop(0.1)
    assert time.monotonic() - started_s < 5
    assert not is_alive(pid)


async def test_workers_that_left_the_process_group_are_killed_too(tmp_path: Path) -> None:
    body = """
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    say(Built(phases_s={"pid": float(worker.pid)}))
    await writer.drain()
    time.sleep(1000)"""
    process = await StandIn(tmp_path, "workers", HEAD + body + TAIL).start()
    await process.build(Build(spec=SPEC), 60.0)
    worker = int(process.phases_s["pid"])
    assert is_alive(worker)
    await process.kill()
    assert not is_alive(worker)


async def test_a_child_that_dies_at_its_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    stand_in = StandIn(tmp_path, "dies", "import sys\nprint('warning', file=sys.stderr)\nsys.exit('no driver')\n")
    with pytest.raises(EngineUnavailable, match=r"ended with 1: no driver"):
        await stand_in.start()
    await stand_in.process.kill()


async def test_a_build_that_fails_says_why(tmp_path: Path) -> None:
    body = "    await receive(reader)\n    say(Failed(cause='CUDA out of memory'))\n    await writer.drain()"
    process = await StandIn(tmp_path, "fails", HEAD + body + TAIL).start()
    with pytest.raises(EngineUnavailable, match="CUDA out of memory"):
        await process.build(Build(spec=SPEC), 60.0)
    await process.kill()


async def test_a_build_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    process = await StandIn(tmp_path, "slow", HEAD + "    time.sleep(1000)" + TAIL).start()
    with pytest.raises(EngineUnavailable, match=r"did not build the engine within 0\.1 s"):
        await process.build(Build(spec=SPEC), 0.1)
    await process.kill()


async def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    process = EngineProcess(launch.mark_of(str(tmp_path), "none"))
    with pytest.raises(EngineUnavailable, match=r"mpirun-that-is-not-there cannot be started: No such file"):
        await process.start(["mpirun-that-is-not-there"], os.environ, 5.0)
    await process.kill()


@pytest.mark.parametrize(
    "body", ["    os.write(1, b'')", "    writer.write(b'\\x03\\0\\0\\0xyz')\n    await writer.drain()"]
)
async def test_a_child_that_dies_or_talks_nonsense_is_heard_as_failed(tmp_path: Path, body: str) -> None:
    process = await StandIn(tmp_path, "gone", HEAD + body + TAIL).start()
    async with asyncio.timeout(60.0):
        assert isinstance(await process.hear(), Failed)
    await process.kill()


async def test_half_a_message_is_not_lost_by_who_stops_waiting_for_it(tmp_path: Path) -> None:
    body = """
    frame = encode(Batch(tokens=[Tokens(id=1, ids=[7])]))
    writer.write(frame[:6])
    await writer.drain()
    await receive(reader)
    writer.write(frame[6:])
    await writer.drain()
    await receive(reader)"""
    process = await StandIn(tmp_path, "half", HEAD + body + TAIL).start()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await process.hear()
    process.send(Build(spec=SPEC))
    async with asyncio.timeout(60.0):
        message = await process.hear()
    assert isinstance(message, Batch)
    assert message.tokens[0].ids == [7]
    await process.kill()
