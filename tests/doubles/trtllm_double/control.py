"""What the double is told to do, and what it did.

Everything lies in one folder (`TRTLLM_DOUBLE_DIR`), so that a test steers engines in other processes:
`switches.json` (any subset of `Switches`; read again whenever it changes), `journal.jsonl` (one event a line) and the
GPUs (`gpus.py`). `TRTLLM_DOUBLE_SWITCHES` (JSON) gives switches to one process alone, over those of the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

Phase = Literal["import", "args", "spawn", "weights", "kv", "warmup"]


@dataclass(frozen=True)
class Switches:
    version: str = "1.2.1"
    num_gpus: int = 4
    gpu_memory_bytes: int = 16 << 30
    # --- start-up: how long each phase takes, and where it fails
    import_s: float = 0.0
    spawn_s: float = 0.0
    weights_s: float = 0.0
    kv_s: float = 0.0
    warmup_s: float = 0.0
    fail_phase: Phase | None = None
    fail_starts: list[int] | None = None
    """Which starts fail, counted from 1 over all processes; None: each."""
    dies_at: Phase | None = None
    """The whole process is gone, without a word (exit code 1)."""
    with_torch: bool = True
    """Off: neither torch nor the loader that was given, which takes torch too; the checkpoint is read to the same
    tokens. The import takes longer than the rest of a start."""
    # --- running
    step_s: float = 0.002
    tokens_per_step: int = 1
    """More: speculation; one response then brings several."""
    step_s_per_prompt_token: float = 0.0
    seed_reproducible: bool = True
    stale_processor_ids: bool = True
    """With the overlap scheduler a logits processor sees the ids without the newest."""
    strip_end_id: bool = False
    min_tokens_honoured: bool = False
    # --- faults while running
    request_error_after: int | None = None
    """RequestError for each request, after so many of its tokens."""
    forward_error_after: int | None = None
    """An exception in the forward pass, after so many steps of an engine: all active requests fail with it."""
    num_forward_errors: int | None = None
    """How many steps fail then; None: all."""
    poison_token: int | None = None
    """A forward pass fails that has a request whose prompt begins with it."""
    engine_error_after: int | None = None
    """Any other exception from the background, after so many steps: the executor shuts down and raises it."""
    silent_after: int | None = None
    """After so many steps no response comes any more."""
    drop_aborts: Literal["none", "waiting", "all"] = "waiting"
    abort_delay_s: float = 0.0
    logprobs_mismatch: bool = False
    fault_starts: list[int] | None = None
    """Which starts (from 1, over all processes) have the faults above; None: each."""
    # --- the end
    shutdown_hangs: bool = False
    """Also without a dead worker."""
    linger_s: float = 0.2
    """Workers whose parent was killed keep their GPU for so long."""
    memory_lingers_s: float = 0.0
    """A GPU's memory is free only so long after the process that held it has ended."""
    nvml_lists_pids: bool = True
    """Off: as in many containers."""
    workers_own_group: bool = True
    """Workers are in process groups of their own, as MPI's launcher starts them."""
    shutdown_wakes_pending: bool = False


class Control:
    def __init__(self) -> None:
        default = Path(tempfile.gettempdir()) / f"trtllm-double-{os.getuid()}"
        self._default = default
        self._read_at: tuple[Path, int] | None = None
        self._switches = Switches()

    @property
    def dir(self) -> Path:
        """Looked up each time: a test may give each of its cases a folder."""
        folder = Path(os.environ.get("TRTLLM_DOUBLE_DIR") or self._default)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def switches(self) -> Switches:
        path = self.dir / "switches.json"
        with contextlib.suppress(FileNotFoundError):
            version = (path, path.stat().st_mtime_ns)
            if version != self._read_at:
                self._read_at = version
                self._switches = self._parse(json.loads(path.read_text()))
            return self._switches
        self._read_at = None
        return self._parse({})

    def _parse(self, given: dict[str, Any]) -> Switches:
        given = given | json.loads(os.environ.get("TRTLLM_DOUBLE_SWITCHES") or "{}")
        unknown = given.keys() - {field.name for field in fields(Switches)}
        if unknown:
            raise ValueError(f"no such switch: {sorted(unknown)}")
        return Switches(**given)

    def set(self, **switches: Any) -> None:
        """For tests: replace what `switches.json` says. Takes effect at once, in all processes."""
        self._parse(switches)
        path = self.dir / "switches.json"
        new = path.with_suffix(f".{os.getpid()}.{time.monotonic_ns()}")
        new.write_text(json.dumps(switches))
        new.replace(path)

    def log(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, "pid": os.getpid(), "at_s": time.time()} | fields, default=repr) + "\n"
        handle = os.open(self.dir / "journal.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def journal(self, event: str | None = None) -> list[dict[str, Any]]:
        """For tests: what happened, in all processes."""
        path = self.dir / "journal.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [entry for entry in map(json.loads, lines) if event in (None, entry["event"])]

    def phase(self, name: Phase, start: int | None = None) -> None:
        """One phase of a start: it takes its time, and fails if it is to."""
        switches = self.switches()
        time.sleep(getattr(switches, f"{name}_s", 0.0))
        is_meant = switches.fail_starts is None or start in switches.fail_starts
        if switches.dies_at == name and is_meant:
            os._exit(1)
        if switches.fail_phase == name and is_meant:
            raise PhaseFailed(name)

    def on_import(self) -> None:
        try:
            self.phase("import")
        except PhaseFailed as error:
            raise ImportError("libmpi.so.40: cannot open shared object file: No such file or directory") from error


class PhaseFailed(RuntimeError):
    def __init__(self, phase: Phase) -> None:
        causes = {
            "args": "bad configuration",
            "spawn": "MPI_Comm_spawn failed",
            "weights": "CUDA out of memory while loading weights",
            "kv": "no room for the KV cache",
            "warmup": "an illegal memory access was encountered",
        }
        super().__init__(causes.get(phase, phase))


control = Control()
