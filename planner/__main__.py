"""`python -m planner`: the planner service, set up by SPOTSERVE_PLANNER_* variables."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
from typing import Final

from planner.errors import SettingsError
from planner.services.controller import Controller
from planner.settings import PREFIX, Settings
from planner.telemetry import Tracing, line, set_up_logging

PR_SET_PDEATHSIG: Final = 1
PARENT_CHECK_S: Final = 0.5


def main() -> int:
    """Exit status: 0 after a signal, 2 for settings that do not work."""
    parent = os.getppid()
    try:
        settings = Settings.from_env(os.environ)
    except SettingsError as error:
        print(f"planner: {PREFIX}{error.field.upper()}: {error.reason}", file=sys.stderr)  # noqa: T201 - no log yet
        return 2
    set_up_logging(settings.log_level)
    logging.getLogger("nats").setLevel(logging.ERROR)  # the bus reports its own connection
    tracing = Tracing(os.environ)
    die_with = parent if os.environ.get("SPOTSERVE_DIE_WITH_PARENT") == "1" else None
    try:
        asyncio.run(_run(Controller(settings, tracing), die_with))
    finally:
        tracing.close()
    logging.getLogger("planner").info(line("planner stopped"))
    return 0


async def _run(controller: Controller, die_with: int | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    watch = asyncio.create_task(_stop_without(die_with, stop)) if die_with is not None else None
    try:
        await controller.run(stop)
    finally:
        if watch is not None:
            watch.cancel()


async def _stop_without(parent: int, stop: asyncio.Event) -> None:
    """Ask the kernel for SIGTERM when the parent dies; look for ourselves where the kernel does not offer that."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # The parent may have died before the kernel was asked; nobody can set an event for us then.
    while os.getppid() == parent:  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(PARENT_CHECK_S)
    stop.set()


if __name__ == "__main__":
    sys.exit(main())
