"""`python -m gateway`: serve one model; settings from SPOTSERVE_GATEWAY_*, traces from OTEL_*."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import uvicorn

from gateway import telemetry
from gateway.app import create_app
from gateway.errors import GatewayError, SettingsError
from gateway.services.front import Front
from gateway.services.tokenizer import TextTokenizer
from gateway.settings import Settings

_KEEP_ALIVE_S = 75
_BACKLOG = 2048


class _Server(uvicorn.Server):
    """Tells the application of the shutdown when it begins, not when all connections are closed."""

    def __init__(self, config: uvicorn.Config, on_exit: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_exit = on_exit

    async def main_loop(self) -> None:
        await super().main_loop()
        self._on_exit()


def main() -> int:
    """Run until SIGTERM or SIGINT; 2 if it cannot start."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = Settings.from_env(os.environ, gateway_id=f"gw-{secrets.token_hex(3)}")
        listener = _listen(settings.host, settings.port)
        tokenizer = TextTokenizer(Path(settings.model_dir))
    except GatewayError as error:
        print(f"gateway: {error}", file=sys.stderr)  # noqa: T201 # the user's terminal
        return 2
    _serve(settings, tokenizer, listener)
    return 0


def _serve(settings: Settings, tokenizer: TextTokenizer, listener: socket.socket) -> None:
    provider = telemetry.tracer_provider(os.environ)
    tracer = provider.get_tracer("gateway") if provider is not None else telemetry.no_tracer()
    app = create_app(settings, tokenizer, tracer)
    front: Front = app.state.front
    config = uvicorn.Config(
        app,
        loop="uvloop",
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        # The application ends what still runs after drain_s; this is for what then does not end.
        timeout_graceful_shutdown=int(settings.drain_s) + 3,
        backlog=_BACKLOG,
    )
    # The server raises the signal again when it is done; a clean stop ends with status 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    host, port = listener.getsockname()[:2]
    logging.getLogger("gateway").info("serving %s on http://%s:%d/v1", front.model_name, host, port)
    try:
        _Server(config, front.dispatcher.drain).run(sockets=[listener])
    finally:
        if provider is not None:
            provider.shutdown()


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises SettingsError if the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        hint = "choose another port with --port (SPOTSERVE_GATEWAY_PORT)"
        raise SettingsError(f"cannot listen on {host} port {port}", f"{error.strerror}; {hint}") from error
    return listener


if __name__ == "__main__":
    sys.exit(main())
