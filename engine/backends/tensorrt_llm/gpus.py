"""What NVML says of this machine's GPUs; nothing where its Python package is not installed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

logger = logging.getLogger(__name__)

_POLL_S: Final = 0.1
FREE_BELOW: Final = 0.1
"""Of a GPU's memory: what drivers and displays keep."""


class GpuState(NamedTuple):
    total_bytes: int
    used_bytes: int
    pids: frozenset[int]
    """Of processes that compute on it; in a container they may be those of the host, or not be told."""


@contextlib.contextmanager
def _nvml() -> Iterator[Any | None]:
    """The NVML module, initialised; None where it cannot be used."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        logger.debug("no NVML: %s", error)
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def count() -> int | None:
    """How many GPUs there are; None: not known."""
    with _nvml() as nvml:
        return None if nvml is None else int(nvml.nvmlDeviceGetCount())


def names(indexes: Sequence[int], environ: Mapping[str, str]) -> list[str]:
    """What NVML knows this process's GPUs by (number or UUID): CUDA_VISIBLE_DEVICES means nothing to it."""
    visible = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return [visible[index] if index < len(visible) else str(index) for index in indexes]


def _handle(nvml: Any, name: str) -> Any:
    return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else nvml.nvmlDeviceGetHandleByUUID(name)


def states(devices: Sequence[str]) -> list[GpuState] | None:
    """Of the GPUs with these names; None if it is not known."""
    with _nvml() as nvml:
        if nvml is None:
            return None
        found = []
        for name in devices:
            try:
                handle = _handle(nvml, name)
            except nvml.NVMLError as error:
                logger.warning("gpu=%s event=not_known cause=%s", name, error)
                return None
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            pids = frozenset(int(p.pid) for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle))
            found.append(GpuState(int(memory.total), int(memory.used), pids))
        return found


async def wait_until_free(
    devices: Sequence[str], timeout_s: float, counts: Callable[[int], bool] = lambda _: True
) -> str | None:
    """Wait until nothing of note is left on these GPUs. What is after `timeout_s`, in words; None if they are free.

    What counts is much memory in use, by whomever, and processes that `counts` names: others may have a small context
    there, such as a monitor, or an engine's process that has only imported its package.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        known = await asyncio.to_thread(states, devices)
        busy = [
            f"GPU {name}: {gpu.used_bytes >> 20} MiB of {gpu.total_bytes >> 20} in use, by {sorted(gpu.pids) or '?'}"
            for name, gpu in zip(devices, known or [], strict=False)
            if gpu.used_bytes > FREE_BELOW * gpu.total_bytes or any(map(counts, gpu.pids))
        ]
        if not busy:
            return None
        if time.monotonic() >= deadline_s:
            return "; ".join(busy)
        await asyncio.sleep(_POLL_S)
