"""The worker processes of one engine: one a GPU, alive as long as they hold it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

from trtllm_double import gpus
from trtllm_double.control import control

_WORKER = Path(gpus.__file__).with_name("worker.py")


class Workers:
    """Raises RuntimeError if a GPU is held by somebody else."""

    def __init__(self, indices: list[int], used_bytes: int) -> None:
        switches = control.switches()
        self._processes: list[subprocess.Popen[str]] = []
        for index in indices:
            command = [sys.executable, "-I", "-S", str(_WORKER), str(gpus.lock_path(index)), str(used_bytes)]
            self._processes.append(
                subprocess.Popen(
                    [*command, str(switches.linger_s)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    process_group=0 if switches.workers_own_group else None,
                )
            )
        for process in self._processes:
            assert process.stdout is not None
            word = process.stdout.readline().strip()
            if word != "ready":
                self.stop()
                raise RuntimeError(word or "a worker died during its start")

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def all_alive(self) -> bool:
        return all(process.poll() is None for process in self._processes)

    def can_step(self) -> bool:
        """All alive and none stopped: the others wait for it in their next collective."""
        return self.all_alive() and not any(_is_stopped(pid) for pid in self.pids)

    def stop(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            if process.poll() is None:
                try:
                    process.stdin.write("stop\n")
                    process.stdin.flush()
                except BrokenPipeError:
                    pass
            process.wait()
            process.stdin.close()
            process.stdout.close()


class JobWorkers:
    """Ranks that a launcher has started (`TLLM_SPAWN_PROXY_PROCESS`): the world is what the job is.

    Rank r has GPU r: what stands for several nodes is one machine.
    """

    def __init__(self, num_ranks: int, used_bytes: int) -> None:
        folder = Path(os.environ["TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR"])
        self._streams: list[TextIO] = []
        self.pids: list[int] = []
        for rank in range(num_ranks):
            self._streams.append(_connected(folder / str(rank)))
            self._say(rank, json.dumps([str(gpus.lock_path(rank)), used_bytes]))
            word, _, pid = self._streams[rank].readline().strip().partition(" ")
            if word != "ready":
                raise RuntimeError(f"{word} {pid}" if word else "a rank of the job has died")
            self.pids.append(int(pid))

    def all_alive(self) -> bool:
        return not any(_state_of(pid) in ("", "Z", "X") for pid in self.pids)

    def can_step(self) -> bool:
        return self.all_alive() and not any(map(_is_stopped, self.pids))

    def stop(self) -> None:
        for rank, stream in enumerate(self._streams):
            self._say(rank, "stop")
            stream.readline()
            stream.close()

    def _say(self, rank: int, words: str) -> None:
        with contextlib.suppress(OSError):
            self._streams[rank].write(words + "\n")
            self._streams[rank].flush()


def _connected(path: Path) -> TextIO:
    """Ranks start side by side: one may not be there yet."""
    deadline_s = time.monotonic() + 20.0
    with socket.socket(socket.AF_UNIX) as one:
        while True:
            try:
                one.connect(str(path))
                return one.makefile("rw")
            except OSError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.02)


def _is_stopped(pid: int) -> bool:
    return _state_of(pid) in ("", "T", "t")


def _state_of(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[0]
