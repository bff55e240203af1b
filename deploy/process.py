"""A child process in a process group of its own, whose output goes to a log file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from deploy.errors import PartFailedError

LAUNCHER: Final = Path(__file__).with_name("die_with_parent.py")
POLL_S: Final = 0.02


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """What to run: a command line, and what its environment has beside the inherited one."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = {}


class Child:
    """A started `Program`. It dies with this process, whatever ends this one."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path, log_start: int) -> None:
        self.name = name
        self.log = log
        self._process = process
        self._log_start = log_start

    @classmethod
    async def start(cls, program: Program, log: Path, environ: Mapping[str, str]) -> Child:
        """Start in a new session, appending to `log`."""
        launcher = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid())]
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *launcher,
                *program.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**environ, "PYTHONUNBUFFERED": "1", **program.environment},
                start_new_session=True,
            )
            return cls(program.name, process, log, output.tell())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.returncode

    async def wait(self) -> int:
        return await self._process.wait()

    async def wait_until(self, is_ready: Callable[[], bool], timeout_s: float) -> None:
        """Poll `is_ready`; raises PartFailedError if the process ends first, or after `timeout_s`."""
        give_up_s = time.monotonic() + timeout_s
        while not is_ready():
            if self.returncode is not None:
                raise PartFailedError(self.name, f"{describe_exit(self.returncode)}{self.last_words()}", self.log)
            if time.monotonic() > give_up_s:
                raise PartFailedError(self.name, f"was not ready after {timeout_s:.0f} s", self.log)
            await asyncio.sleep(POLL_S)

    def has_said(self, words: str) -> bool:
        """Whether the log of this start holds `words`."""
        with self.log.open("rb") as content:
            content.seek(self._log_start)
            return words.encode() in content.read()

    def last_words(self) -> str:
        """` (its last line)`, or nothing where it said nothing."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f" ({lines[-1].strip()})" if lines else ""

    def signal_kill(self) -> None:
        """SIGKILL every process of the group that is left."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS denies it for a zombie
            os.killpg(self.pid, signal.SIGKILL)

    async def kill(self) -> None:
        """SIGKILL the whole group and reap the child."""
        self.signal_kill()
        await self.wait()

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL for whatever of the group is left after `grace_s`, or when the child has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.wait(), grace_s)
        await self.kill()


def describe_exit(returncode: int) -> str:
    """`exited with code 3`, or `was killed by SIGKILL`."""
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"
