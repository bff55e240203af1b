"""Processes of a benchmark: each dies with it, logs to a file, and is measured by its CPU seconds and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

import httpx
import psutil

from deploy.process import LAUNCHER
from loadtest.errors import StackError

START_TIMEOUT_S: Final = 120.0
STOP_TIMEOUT_S: Final = 15.0
POLL_S: Final = 0.05


class Process:
    """`with Process(...) as process:` starts it and stops it again."""

    def __init__(
        self, name: str, command: list[str], directory: Path, environ: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._command = command
        self._logs = directory
        self._environ = {**os.environ, "PYTHONUNBUFFERED": "1", **(environ or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Process:
        launcher = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid())]
        with (self._logs / f"{self.name}.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*launcher, *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environ,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def _running(self) -> psutil.Process:
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def cpu_s(self) -> float:
        """User and system seconds so far, of its threads and of the processes below it."""
        processes = [self._running, *self._running.children(recursive=True)]
        times = [process.cpu_times() for process in processes]
        return float(sum(one.user + one.system for one in times))

    def resident_bytes(self) -> int:
        return int(self._running.memory_info().rss)

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        """Raises StackError, with the ends of all logs, if it ends first or takes too long."""
        assert self._process is not None
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while not is_ready():
            if self._process.poll() is not None:
                raise StackError(f"{self.name} has ended with code {self._process.returncode}", self._logs)
            if time.monotonic() > give_up_s:
                raise StackError(f"{self.name} was not ready in {START_TIMEOUT_S:.0f} s", self._logs)
            time.sleep(POLL_S)

    def wait_until_ok(self, url: str) -> None:
        """Until GET `url` answers with 200."""

        def is_ok() -> bool:
            try:
                return httpx.get(url, timeout=2.0, trust_env=False).status_code == httpx.codes.OK
            except httpx.HTTPError:
                return False

        self.wait_until(is_ok)
