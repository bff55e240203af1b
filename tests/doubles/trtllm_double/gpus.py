"""GPUs of the double: a lock file each, that a worker process holds as long as it lives, and `used.json` beside it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_double.control import control


def visible() -> list[int]:
    """Physical indices that this process may use (CUDA_VISIBLE_DEVICES)."""
    everything = list(range(control.switches().num_gpus))
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return everything
    named = [int(word.removeprefix("GPU-double-")) for word in given.split(",") if word.strip()]
    return [index for index in named if index in everything]


@dataclass(frozen=True)
class Use:
    pid: int
    used_bytes: int


def lock_path(index: int) -> Path:
    return control.dir / f"gpu{index}.lock"


def use_of(index: int) -> Use | None:
    """Who holds a GPU's memory now; None: it is free."""
    path = lock_path(index)
    if not path.exists():
        return None
    with path.open("r+") as handle:
        text = handle.read()
        record: dict[str, Any] = json.loads(text) if text else {"pid": 0, "used_bytes": 0, "died_at_s": 0.0}
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Use(record["pid"], record["used_bytes"])
        # The process is gone; with the switch its memory stays a little.
        lingers_s = control.switches().memory_lingers_s
        if not record["pid"] or lingers_s == 0.0:
            return None
        if not record.get("died_at_s"):
            record["died_at_s"] = time.time()
            handle.seek(0)
            handle.truncate()
            handle.write(json.dumps(record))
            handle.flush()
        if time.time() < record["died_at_s"] + lingers_s:
            return Use(record["pid"], record["used_bytes"])
    return None
