"""`python -m gateway`: serve one model; settings from SPOTSERVE_GATEWAY_*, traces from OTEL_*."""

from __future__ import annotations

import gc
import logging
import os
import secrets
import signal
import socket
import ssl
import sys
import time
from pathlib import Path
from types import FrameType

import uvicorn
from litestar import Litestar

from gateway import telemetry
from gateway.app import create_app
from gateway.errors import GatewayError, SettingsError
from gateway.services.dispatcher import Dispatcher
from gateway.services.front import Front
from gateway.services.http_protocol import BoundedHttp
from gateway.services.listener import listen
from gateway.services.tokenizer import TextTokenizer
from gateway.settings import Settings

_KEEP_ALIVE_S = 75
_BACKLOG = 2048
_CLOSE_S = 3
_GC_THRESHOLDS = (2_000, 10, 100)
"""New objects before a collection, and how many of those before a longer one: each stops all streams, for a millisecond
per thousand objects. An answered request leaves nothing to collect, so that seldom is enough."""


class _Server(uvicorn.Server):
    """Begins to drain at the first signal, and ends when nothing runs any more; a second one ends it at once.

    Until then it listens: whoever asks hears that it is alive and not ready.
    """

    def __init__(self, config: uvicorn.Config, dispatcher: Dispatcher, drain_s: float) -> None:
        super().__init__(config)
        self._dispatcher = dispatcher
        self._drain_s = drain_s
        self._signalled = False
        self._drain_until_s: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled:
            super().handle_exit(sig, frame)
        self._signalled = True

    async def on_tick(self, counter: int) -> bool:
        if self._signalled and self._drain_until_s is None:
            self._dispatcher.drain()
            self._drain_until_s = time.monotonic() + self._drain_s
        over = self._drain_until_s is not None and time.monotonic() >= self._drain_until_s
        self.should_exit = self.should_exit or over or (self._signalled and self._dispatcher.idle)
        return await super().on_tick(counter)


def main() -> int:
    """Run until SIGTERM or SIGINT; 2 if it cannot start."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    provider = telemetry.tracer_provider(os.environ)
    tracer = provider.get_tracer("gateway") if provider is not None else telemetry.no_tracer()
    try:
        settings = Settings.from_env(os.environ, gateway_id=f"gw-{secrets.token_hex(3)}")
        listener = listen(
            settings.host,
            settings.port,
            "SPOTSERVE_GATEWAY_PORT",
            shared=settings.reuse_port,
            # Later than the gateway itself, which says why.
            user_timeout_s=2 * settings.slow_reader_timeout_s,
        )
        app = create_app(settings, TextTokenizer(Path(settings.model_dir)), tracer)
        server = _server(settings, app, listener)
    except GatewayError as error:
        print(f"gateway: {error}", file=sys.stderr)  # noqa: T201 # the user's terminal
        return 2
    # The server raises the signal again when it is done; a clean stop ends with status 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    # What lives from here to the end is never garbage: the collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    try:
        server.run(sockets=[listener])
    finally:
        if provider is not None:
            provider.shutdown()
    return 0


def _server(settings: Settings, app: Litestar, listener: socket.socket) -> uvicorn.Server:
    """Raises SettingsError if the certificate or its key cannot be used."""
    front: Front = app.state.front
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=BoundedHttp,
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        # Only once nothing runs, or drain_s is over: for what then does not end.
        timeout_graceful_shutdown=_CLOSE_S,
        backlog=_BACKLOG,
        ssl_certfile=settings.tls_cert or None,
        ssl_keyfile=settings.tls_key or None,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise SettingsError("SPOTSERVE_GATEWAY_TLS_CERT", f"cannot be used with TLS_KEY: {error}") from error
    host, port = listener.getsockname()[:2]
    log = logging.getLogger("gateway")
    log.info("serving %s on %s://%s:%d/v1", front.model_name, "https" if settings.tls_cert else "http", host, port)
    log.info("metrics and health on http://%s:%d", settings.admin_host, app.state.admin.port)
    return _Server(config, front.dispatcher, settings.drain_s)


if __name__ == "__main__":
    sys.exit(main())
