"""Ends every process of an engine: its process group, and what has left that but carries its mark. Linux."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Final

from engine.backends.tensorrt_llm.launch import MARK

_GONE_WAIT_S: Final = 5.0
_POLL_S: Final = 0.01


def marked(mark: str) -> set[int]:
    """Processes of this user whose environment carries a mark that begins with `mark`."""
    wanted = f"{MARK}={mark}".encode()
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(variable.startswith(wanted) for variable in (entry / "environ").read_bytes().split(b"\0")):
                found.add(int(entry.name))
    return found - {os.getpid()}


def pipeline_of(pid: int) -> str | None:
    """The pipeline whose engine a process belongs to; None if it is none of ours, or cannot be seen from here."""
    with contextlib.suppress(OSError):
        for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if variable.startswith(f"{MARK}=".encode()):
                return variable.decode().partition(":")[2]
    return None


def kill_group(pid: int) -> None:
    """SIGKILL to the process group that `pid` leads."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def kill_marked(mark: str) -> None:
    """SIGKILL to every process that carries the mark, and wait until there are none: one may just have been started.

    Given up after `_GONE_WAIT_S`: a process in the driver's hands may take its time.
    """
    deadline_s = time.monotonic() + _GONE_WAIT_S
    killed: set[int] = set()
    while time.monotonic() < deadline_s:
        pids = marked(mark)
        if not pids and not any(map(is_alive, killed)):  # Its environment goes before the process does.
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        killed |= pids
        time.sleep(_POLL_S)


def is_alive(pid: int) -> bool:
    """Whether it runs, and is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
