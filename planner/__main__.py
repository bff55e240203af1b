"""`python -m planner`: the planner service, set up by SPOTSERVE_PLANNER_* variables."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

from planner.errors import SettingsError
from planner.services.controller import Controller
from planner.settings import PREFIX, Settings
from planner.telemetry import Tracing, line, set_up_logging


def main() -> int:
    """Exit status: 0 after a signal, 2 for settings that do not work."""
    try:
        settings = Settings.from_env(os.environ)
    except SettingsError as error:
        print(f"planner: {PREFIX}{error.field.upper()}: {error.reason}", file=sys.stderr)  # noqa: T201 - no log yet
        return 2
    set_up_logging(settings.log_level)
    logging.getLogger("nats").setLevel(logging.ERROR)  # the bus reports its own connection
    tracing = Tracing(os.environ)
    try:
        asyncio.run(_run(Controller(settings, tracing)))
    finally:
        tracing.close()
    logging.getLogger("planner").info(line("planner stopped"))
    return 0


async def _run(controller: Controller) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    await controller.run(stop)


if __name__ == "__main__":
    sys.exit(main())
