"""What is checked before anything is started, so that a mistake costs one clear line and no clean-up."""

from __future__ import annotations

import errno
import shutil
import socket
import sysconfig
from pathlib import Path

import psutil

from deploy.errors import NatsServerMissingError, NotEnoughMemoryError, PortTakenError, SettingError
from deploy.model_source import count_parameters
from deploy.settings import AUTO, DTYPE_BYTES, UpSettings

RANK_OVERHEAD_BYTES = 500_000_000
"""Interpreter, torch and buffers of one rank, beside weights and KV."""


def check_port(host: str, port: int) -> None:
    """Raises PortTakenError, or SettingError for a host that is not an address of this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: a port with connections in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortTakenError(host, port) from error
        if error.errno == errno.EACCES:
            raise SettingError("--port", port, "needs more rights: choose one above 1023") from error
        raise SettingError("--host", host, "is not an address of this machine") from error


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find_nats_server() -> Path:
    """The one installed beside this interpreter, else the one on the path; raises NatsServerMissingError."""
    installed = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(installed) if installed.is_file() else shutil.which("nats-server")
    if found is None:
        raise NatsServerMissingError
    return Path(found)


def choose_dtype(settings: UpSettings, cpu_flags: frozenset[str]) -> str:
    """`auto`: bfloat16 where the device multiplies it in hardware, else float32."""
    if settings.dtype != AUTO:
        if settings.dtype == "float16" and not settings.uses_gpus:
            raise SettingError("--dtype", "float16", "is for --device cuda: on cpu use bfloat16 or float32")
        return settings.dtype
    has_bfloat16 = settings.uses_gpus or bool({"avx512_bf16", "amx_bf16"} & cpu_flags)
    return "bfloat16" if has_bfloat16 else "float32"


def read_cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Of the first core; empty where the system has no such file."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.split())


def check_memory(settings: UpSettings, model_dir: Path, dtype: str, available_bytes: int | None = None) -> None:
    """Raises NotEnoughMemoryError where the instances' weights would not fit: each may have to hold the model."""
    if settings.uses_gpus:
        return
    num_ranks = settings.num_instances * settings.ranks_per_instance
    weight_bytes = count_parameters(model_dir) * DTYPE_BYTES[dtype]
    needed_bytes = settings.num_instances * weight_bytes + num_ranks * RANK_OVERHEAD_BYTES
    available = psutil.virtual_memory().available if available_bytes is None else available_bytes
    if needed_bytes > available:
        raise NotEnoughMemoryError(needed_bytes, available, num_ranks)
