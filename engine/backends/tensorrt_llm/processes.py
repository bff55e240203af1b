"""Ends every process of an engine: its process group, and what has left that but carries its mark. Linux."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from engine.backends.tensorrt_llm.launch import MARK


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
    """SIGKILL to every process that carries the mark, until there are none: one may just have been started."""
    for _ in range(8):
        pids = marked(mark)
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether it runs, and is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
