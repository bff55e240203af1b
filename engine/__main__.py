"""`python -m engine`: the agent of an instance. It starts the same program once a rank."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from typing import Any

from engine import telemetry
from engine.backends.base import Backend
from engine.errors import EngineError, SettingError
from engine.services.agent import RANK_VARIABLE, Agent
from engine.services.bus import Bus
from engine.settings import EngineSettings


def _end_with_standard_input() -> None:
    """End the process when its parent is gone: then standard input ends."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


async def _serve(service: Any, bus: Bus) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.stop)
    try:
        await service.run()
    finally:
        await bus.close()


async def _run_agent(settings: EngineSettings) -> None:
    bus = Bus(settings.model)
    await bus.connect(settings.nats_url, f"agent {settings.instance}")
    await _serve(Agent(settings, bus), bus)


def _backend(settings: EngineSettings, rank: str) -> Backend:
    if settings.backend == "tensorrt_llm":
        from engine.backends.tensorrt_llm.backend import TensorrtBackend

        return TensorrtBackend(settings, rank)
    from engine.backends.torch.backend import TorchBackend

    return TorchBackend(settings, rank)


async def _run_rank(settings: EngineSettings, index: int) -> None:
    from engine.services.rank import RankService

    rank = settings.rank_id(index)
    backend = await asyncio.to_thread(_backend, settings, rank)
    bus = Bus(settings.model)
    await bus.connect(settings.nats_url, f"rank {rank}")
    await _serve(RankService(settings, index, bus, backend), bus)


def main() -> int:
    """Run until SIGTERM; 0 after a clean stop, 1 after a failure, 2 for wrong settings."""
    try:
        settings = EngineSettings.from_env(os.environ)
        logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
        index = os.environ.get(RANK_VARIABLE)
        telemetry.configure("spotserve-engine", os.environ)
        if index is None:
            asyncio.run(_run_agent(settings))
        else:
            # Many small operators release the GIL; hand it over fast to the thread that computes.
            sys.setswitchinterval(0.0005)
            _end_with_standard_input()
            asyncio.run(_run_rank(settings, int(index)))
    except EngineError as error:
        print(f"engine: {error}", file=sys.stderr)  # noqa: T201 - the one line that the operator needs
        return 2 if isinstance(error, SettingError) else 1
    finally:
        telemetry.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
