"""A double of NVML's Python module over the GPUs of the double of TensorRT-LLM."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from trtllm_double import gpus
from trtllm_double.control import control

NVML_ERROR_UNINITIALIZED = 1
NVML_ERROR_INVALID_ARGUMENT = 2
NVML_ERROR_DRIVER_NOT_LOADED = 9


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        names = {1: "Uninitialized", 2: "Invalid Argument", 9: "Driver Not Loaded"}
        return names.get(self.value, f"NVML error {self.value}")


@dataclass(frozen=True)
class _Memory:
    total: int
    used: int

    @property
    def free(self) -> int:
        return self.total - self.used


@dataclass(frozen=True)
class _Process:
    pid: int
    usedGpuMemory: int


_num_users = 0
_lock = threading.Lock()
_RESERVED_BYTES = 300 << 20
"""What a driver keeps of an idle GPU."""


def nvmlInit() -> None:
    """Counted, as there: as many calls of nvmlShutdown undo it."""
    global _num_users
    if control.switches().num_gpus == 0:
        raise NVMLError(NVML_ERROR_DRIVER_NOT_LOADED)
    with _lock:
        _num_users += 1


def nvmlShutdown() -> None:
    global _num_users
    with _lock:
        _check()
        _num_users -= 1


def _check() -> None:
    if not _num_users:
        raise NVMLError(NVML_ERROR_UNINITIALIZED)


def nvmlSystemGetDriverVersion() -> str:
    _check()
    return "580.95.05"


def nvmlSystemGetCudaDriverVersion() -> int:
    _check()
    return 13000


def nvmlDeviceGetCount() -> int:
    _check()
    return control.switches().num_gpus


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    _check()
    if not 0 <= index < control.switches().num_gpus:
        raise NVMLError(NVML_ERROR_INVALID_ARGUMENT)
    return index


def nvmlDeviceGetHandleByUUID(uuid: str) -> int:
    _check()
    return nvmlDeviceGetHandleByIndex(int(uuid.removeprefix("GPU-double-")))


def nvmlDeviceGetName(handle: int) -> str:
    _check()
    return f"Double GPU {handle}"


def nvmlDeviceGetUUID(handle: int) -> str:
    _check()
    return f"GPU-double-{handle}"


def nvmlDeviceGetCudaComputeCapability(handle: int) -> tuple[int, int]:
    _check()
    return (9, 0)


def nvmlDeviceGetMemoryInfo(handle: int) -> _Memory:
    _check()
    use = gpus.use_of(handle)
    used = _RESERVED_BYTES + (use.used_bytes if use is not None else 0)
    return _Memory(control.switches().gpu_memory_bytes, used)


def nvmlDeviceGetComputeRunningProcesses(handle: int) -> list[_Process]:
    _check()
    use = gpus.use_of(handle)
    return [_Process(use.pid, use.used_bytes)] if use is not None and control.switches().nvml_lists_pids else []
