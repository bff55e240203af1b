"""The state directory of an `up`: its lock, its logs, its JetStream store, and where clients find it.

up.lock          held for as long as the supervisor lives, with its pid
up.json          `Running`
logs/            one file a part; logs.previous/ are those of the last `up`
metrics/         what several gateway processes add up
nats/            the JetStream store of the embedded server
next_instance    the number of the next instance
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import IO

import msgspec
import psutil

from deploy.errors import AlreadyRunningError, NotRunningError, SettingError


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """`up.json`: the running supervisor, as its clients find it."""

    pid: int
    host: str
    port: int
    nats_url: str
    model: str
    """The slug in the NATS subjects."""
    served_model_name: str
    started_at_s: float
    admin_ports: list[int] = []
    """Of the gateway processes, on 127.0.0.1: metrics, health, counts."""
    tls_cert: str | None = None
    pids: dict[str, int] = {}
    """Of the running parts, by name; a part that was started again has another."""

    @property
    def endpoint(self) -> str:
        """Base address of the gateway, as it is reached from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"{'https' if self.tls_cert else 'http'}://{host}:{self.port}"

    @property
    def admin_endpoints(self) -> list[str]:
        """Base addresses for the operator, one a gateway process."""
        return [f"http://127.0.0.1:{port}" for port in self.admin_ports]


class StateDir:
    """Paths and small files below one directory; see the module's docstring."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nats = path / "nats"
        self.logs = path / "logs"
        self.metrics = path / "metrics"
        self._running = path / "up.json"
        self._lock: IO[str] | None = None

    def claim(self) -> None:
        """Take the lock until `release` or the end of this process; a dead owner's lock is free.

        Raises AlreadyRunningError, and SettingError where the directory cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "up.lock").open("a+")
        except OSError as error:
            raise SettingError("--state-dir", str(self.path), f"cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise AlreadyRunningError(owner, self.path) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._lock = file

    def release(self) -> None:
        self._running.unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()

    def begin(self, *, keep_state: bool) -> None:
        """Put away the last run's logs, and its JetStream store unless it is kept."""
        self._running.unlink(missing_ok=True)
        previous = self.path / "logs.previous"
        shutil.rmtree(previous, ignore_errors=True)
        if self.logs.exists():
            self.logs.rename(previous)
        if not keep_state:
            shutil.rmtree(self.nats, ignore_errors=True)
            (self.path / "next_instance").unlink(missing_ok=True)
        shutil.rmtree(self.metrics, ignore_errors=True)
        self.metrics.mkdir()
        self.logs.mkdir()
        self.nats.mkdir(exist_ok=True)

    def log(self, part: str) -> Path:
        return self.logs / f"{part}.log"

    def take_instance_id(self) -> str:
        """`i0`, `i1`, ...: never one twice for as long as the JetStream store is kept, which remembers them."""
        counter = self.path / "next_instance"
        number = int(counter.read_text()) if counter.exists() else 0
        _replace(counter, str(number + 1).encode())
        return f"i{number}"

    def write_running(self, running: Running) -> None:
        _replace(self._running, msgspec.json.encode(running))

    def read_running(self) -> Running:
        """Raises NotRunningError where there is none, or where its process is gone."""
        try:
            running = msgspec.json.decode(self._running.read_bytes(), type=Running)
        except (OSError, msgspec.DecodeError):
            raise NotRunningError(self.path) from None
        if not psutil.pid_exists(running.pid):
            raise NotRunningError(self.path)
        return running


def _replace(path: Path, content: bytes) -> None:
    """Write so that a reader sees the old content or the new one."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.replace(path)
