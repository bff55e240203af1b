"""A local stack for a benchmark: `spotserve up` in its own state directory and on a free port."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Final

import httpx
import psutil

from deploy.preflight import free_port
from deploy.process import LAUNCHER
from deploy.state import Running, StateDir
from loadtest.errors import StackError

START_TIMEOUT_S: Final = 180.0
STOP_TIMEOUT_S: Final = 40.0
POLL_S: Final = 0.05


class LocalStack:
    """`with LocalStack(options):` starts it, waits until it is ready, and stops it with all its processes."""

    def __init__(self, options: list[str]) -> None:
        self._options = options
        self._port = free_port()
        self._scratch = tempfile.TemporaryDirectory(prefix="spotserve-bench-")
        self.directory = Path(self._scratch.name)
        self._state = StateDir(self.directory / "state")
        self._log = self.directory / "up.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self.started_at_s = 0.0
        """Unix time of the command."""
        self.ready_s = 0.0
        """From the command to the first `GET /ready` that says yes."""

    def __enter__(self) -> LocalStack:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def running(self) -> Running:
        return self._state.read_running()

    def output(self) -> str:
        """What `up` has printed so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _start(self) -> None:
        # It dies with this process, whatever ends this one. A session of its own: Ctrl-C is for the benchmark,
        # which then stops the stack.
        launcher = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid())]
        up = [sys.executable, "-m", "deploy", "up", "--port", str(self._port), "--state-dir", str(self._state.path)]
        environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.started_at_s = time.time()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*launcher, *up, *self._options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ,
                start_new_session=True,
            )
        self._wait_until_ready(self._process)
        self.ready_s = time.time() - self.started_at_s

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        give_up_s = time.monotonic() + START_TIMEOUT_S
        with httpx.Client(base_url=self.endpoint, timeout=2.0, trust_env=False) as client:
            while not _is_ready(client):
                if process.poll() is not None:
                    raise StackError(f"`spotserve up` ended with code {process.returncode}", self.directory)
                if time.monotonic() > give_up_s:
                    raise StackError(f"`spotserve up` was not ready in {START_TIMEOUT_S:.0f} s", self.directory)
                time.sleep(POLL_S)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for whatever is left of its processes."""
        process = self._process
        if process is not None:
            processes = _tree(process.pid)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_TIMEOUT_S)
            for left in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
            process.wait()
            self._process = None
        self._scratch.cleanup()


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _tree(pid: int) -> list[psutil.Process]:
    """The process and everything below it."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
