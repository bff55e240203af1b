"""Listening sockets."""

from __future__ import annotations

import socket

from gateway.errors import SettingsError


def listen(host: str, port: int, variable: str, *, shared: bool = False, user_timeout_s: float = 0.0) -> socket.socket:
    """A bound socket.

    `shared`: other processes may listen there too. `user_timeout_s`: the kernel drops a connection whose peer has taken
    nothing for so long, so that one that was cut does not hold its buffer (Linux; 0: after its own, long time).
    Raises SettingsError naming `variable` if the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if user_timeout_s and hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(user_timeout_s * 1000))
        listener.bind((host, port))
    except OSError as error:
        option = "--" + variable.removeprefix("SPOTSERVE_GATEWAY_").lower().replace("_", "-")
        hint = f"choose another port with {option} ({variable})"
        raise SettingsError(f"cannot listen on {host} port {port}", f"{error.strerror}; {hint}") from error
    return listener
