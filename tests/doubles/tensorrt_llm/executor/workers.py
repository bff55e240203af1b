"""The worker processes of one engine: one a GPU, alive as long as they hold it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def _is_stopped(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in ("T", "t")
