"""Runs a command that must not outlive the process that started it, even if that one is killed.

    python -I -S die_with_parent.py PARENT_PID COMMAND [ARGUMENT ...]

A script of the standard library alone, so that it starts in some milliseconds. On Linux it asks the kernel for
SIGKILL on the parent's death and becomes the command. Elsewhere it stays as a watcher of the parent and kills its
own process group.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
WATCH_INTERVAL_S = 0.2
EXIT_PARENT_GONE = 75


def main(arguments: list[str]) -> None:
    """Become the command (Linux), or watch over it (elsewhere); does not return."""
    parent, command = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the request took effect
            sys.exit(EXIT_PARENT_GONE)
        os.execvp(command[0], command)  # noqa: S606  the command is our caller's own
    sys.exit(watch(parent, command))


def watch(parent: int, command: list[str]) -> int:
    """Run `command` until it ends; SIGKILL the whole process group when `parent` is gone."""
    child = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    while child.poll() is None:
        if os.getppid() != parent:
            os.killpg(0, signal.SIGKILL)
        time.sleep(WATCH_INTERVAL_S)
    return child.returncode


if __name__ == "__main__":
    main(sys.argv[1:])
