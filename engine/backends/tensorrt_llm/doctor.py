"""Would the TensorRT-LLM backend work here, and as it takes it to? `python -m engine.backends.tensorrt_llm.doctor`.

First what must be there; then, with GPUs and a model, probes: engines in processes of their own (`doctor_probes`),
which are killed when they hang, since that some calls hang is among the questions.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Final

from engine.backends.findings import Finding, Findings, Outcome, run_doctor
from engine.backends.tensorrt_llm import gpus
from engine.backends.tensorrt_llm.launch import MARK
from engine.backends.tensorrt_llm.processes import kill_group, kill_marked
from engine.backends.tensorrt_llm.versions import INSTALL, check_version
from engine.errors import EngineUnavailable

LINE: Final = "spotserve-finding "
"""What a probe's findings begin with: TensorRT-LLM writes to standard output too."""
TOTAL_S: Final = 570.0
PROBES: Final = {"basics": 200.0, "restart": 120.0, "connector": 100.0, "tensor": 100.0, "pipeline": 100.0}
"""Each an engine of its own, and its share of the time."""
FREE_WITHIN_S: Final = 30.0


# --- what must be there ----------------------------------------------------------------------------------------


def check_driver(findings: Findings) -> int:
    """The driver and its GPUs, by NVML. Returns how many."""
    try:
        import pynvml
    except ImportError:
        findings.add(Finding("nvml", Outcome.MISSING, "the package nvidia-ml-py is not installed: " + INSTALL))
        return 0
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        findings.add(Finding("driver", Outcome.MISSING, f"no NVIDIA driver answers ({error}): see nvidia-smi"))
        return 0
    try:
        findings.add(Finding("driver", Outcome.OK, _text(pynvml.nvmlSystemGetDriverVersion())))
        cuda = int(pynvml.nvmlSystemGetCudaDriverVersion())
        is_new = cuda >= 13000
        findings.add(
            Finding(
                "driver.cuda",
                Outcome.OK if is_new else Outcome.DIFFERS,
                f"{cuda // 1000}.{cuda % 1000 // 10}",
                "13.0 or newer, of which TensorRT-LLM 1.2.1 was built",
            )
        )
        count = int(pynvml.nvmlDeviceGetCount())
        for index in range(count):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            capability = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            seen = f"{_text(pynvml.nvmlDeviceGetName(handle))}, {memory.free >> 20} of {memory.total >> 20} MiB free"
            is_good = tuple(capability) >= (8, 0) and memory.used < gpus.FREE_BELOW * memory.total
            seen += f", compute capability {capability[0]}.{capability[1]}"
            outcome = Outcome.OK if is_good else Outcome.DIFFERS
            findings.add(Finding(f"gpu.{index}", outcome, seen, "8.0 or newer (for bfloat16), used by nobody else"))
    finally:
        pynvml.nvmlShutdown()
    if not count:
        findings.add(Finding("gpu", Outcome.MISSING, "there is none"))
    return count


def check_package(findings: Findings) -> bool:
    """TensorRT-LLM's version, without importing it: that needs a GPU, and may hang."""
    name = "tensorrt_llm"
    if importlib.util.find_spec(name) is None:
        findings.add(Finding(name, Outcome.MISSING, f"is not installed: {INSTALL}"))
        return False
    try:
        version = importlib.metadata.version("tensorrt-llm")
    except importlib.metadata.PackageNotFoundError:
        findings.add(Finding(name, Outcome.SKIPPED, "no installed distribution; the first probe asks the package"))
        return True
    try:
        check_version(version)
    except EngineUnavailable as error:
        findings.add(Finding(name, Outcome.FAILED, str(error)))
        return False
    findings.add(Finding(name, Outcome.OK, version))
    return True


def check_surroundings(findings: Findings, model_dir: Path | None) -> None:
    """MPI for several nodes, and shared memory for the weights."""
    launcher = shutil.which("mpirun")
    outcome = Outcome.OK if launcher else Outcome.SKIPPED
    findings.add(Finding("mpirun", outcome, launcher or "is not there: only for engines over several instances"))
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0  # noqa: S108 - the weight store
    model = sum(f.stat().st_size for f in model_dir.glob("*.safetensors")) if model_dir is not None else 0
    seen = f"{free >> 20} MiB free in /dev/shm" + (f", the model has {model >> 20}" if model else "")
    outcome = Outcome.OK if free > 1.1 * model else Outcome.DIFFERS
    findings.add(Finding("shared_memory", outcome, seen, "room for the model (docker: --ipc=host or --shm-size)"))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


# --- probes ----------------------------------------------------------------------------------------------------


def run_probe(findings: Findings, name: str, model_dir: Path, timeout_s: float) -> None:
    """Run one in a process of its own, with all that it starts, until it ends or its time has passed."""
    mark = f"doctor:{os.getpid()}:{name};"
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "engine.backends.tensorrt_llm.doctor_probes", name, str(model_dir)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, MARK: mark},
            start_new_session=True,
        )
        is_late = threading.Event()

        def kill() -> None:
            is_late.set()
            _kill(process.pid, mark)

        timer = threading.Timer(timeout_s, kill)
        timer.start()
        num_before = len(findings.found)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(LINE):
                    findings.add(_finding(line))
            process.wait()
        finally:
            timer.cancel()
            killed_s = time.monotonic()
            _kill(process.pid, mark)
            process.wait()
        if is_late.is_set():
            findings.add(Finding(f"{name}.ends", Outcome.FAILED, f"nothing more was heard for {timeout_s:.0f} s"))
        elif len(findings.found) == num_before or process.returncode not in (0, -signal.SIGKILL):
            errors.seek(0)
            last = ([line.strip() for line in errors.read().splitlines() if line.strip()] or ["it said nothing"])[-1]
            findings.add(Finding(f"{name}.ends", Outcome.FAILED, f"ended with {process.returncode}: {last}"))
    _check_freed(findings, name, killed_s)


def _finding(line: str) -> Finding:
    fields = json.loads(line.removeprefix(LINE))
    return Finding(fields["name"], Outcome(fields["outcome"]), fields["seen"], fields["expected"])


def _kill(pid: int, mark: str) -> None:
    kill_group(pid)
    kill_marked(mark)


def _check_freed(findings: Findings, name: str, killed_s: float) -> None:
    """How long after the end of its processes the GPUs' memory is back."""
    devices = gpus.names(range(gpus.count() or 0), os.environ)
    busy = asyncio.run(gpus.wait_until_free(devices, FREE_WITHIN_S))
    took_s = time.monotonic() - killed_s
    outcome = Outcome.OK if busy is None else Outcome.FAILED
    findings.add(Finding(f"{name}.memory_freed", outcome, busy or f"{took_s:.1f} s after the kill", "within 30 s"))


def examine(findings: Findings, model_dir: Path | None) -> None:
    """Everything, in order; stops where going on makes no sense."""
    num_gpus = check_driver(findings)
    has_package = check_package(findings)
    check_surroundings(findings, model_dir)
    if not num_gpus or not has_package:
        return
    if model_dir is None:
        findings.add(Finding("probes", Outcome.SKIPPED, "no engine was started: give --model"))
        return
    deadline_s = time.monotonic() + TOTAL_S
    for name, timeout_s in PROBES.items():
        left_s = deadline_s - time.monotonic()
        if name in ("tensor", "pipeline") and num_gpus < 2:
            findings.add(Finding(name, Outcome.SKIPPED, "needs two GPUs"))
        elif left_s < 20:
            findings.add(Finding(name, Outcome.SKIPPED, "no time was left: try a smaller model"))
        else:
            run_probe(findings, name, model_dir, min(timeout_s, left_s))
        if name == "basics" and any(f.name == "basics.start" and f.outcome is Outcome.FAILED for f in findings.found):
            return
    has_ray = importlib.util.find_spec("ray") is not None
    words = "not probed: start a fleet with SPOTSERVE_ENGINE_MULTI_NODE=ray and kill an actor"
    findings.add(Finding("ray.actor_death", Outcome.SKIPPED, words if has_ray else "Ray is not installed"))


def main(arguments: list[str] | None = None) -> int:
    """Examine and report; the exit code."""
    return run_doctor("tensorrt_llm", "a small model's directory, for the probes", examine, arguments)


if __name__ == "__main__":
    sys.exit(main())
