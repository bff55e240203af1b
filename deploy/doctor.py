"""`spotserve doctor`: whether a backend would work on this machine. The engine's own program does the looking."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Final

from deploy.errors import SettingError

BACKENDS: Final = {"torch": "engine.backends.torch.doctor", "tensorrt_llm": "engine.backends.tensorrt_llm.doctor"}


def wants_model(backend: str) -> bool:
    """Whether a model would be used that is worth fetching: not where no engine could be started."""
    return backend == "tensorrt_llm" and importlib.util.find_spec("tensorrt_llm") is not None


def examine(backend: str, model_dir: Path | None, report: Path | None) -> int:
    """Look at this machine; prints a line for each finding. Exit code: 0 well, 1 something is missing, 3 differs.

    Raises:
        SettingError: there is no such backend, or the report cannot be written.

    """
    if backend not in BACKENDS:
        raise SettingError("--backend", backend, f"must be one of {', '.join(BACKENDS)}")
    if report is not None and not report.absolute().parent.is_dir():
        raise SettingError("--json", str(report), "lies in a directory that does not exist")
    command = [sys.executable, "-m", BACKENDS[backend]]
    command += ["--model", str(model_dir)] if model_dir is not None else []
    command += ["--json", str(report)] if report is not None else []
    sys.stdout.flush()
    return subprocess.run(command, check=False).returncode
