"""Programs of others that benchmarks run: pinned, each in a virtual environment of its own, made when first wanted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from deploy.default_model import cache_dir
from loadtest.errors import BenchError

INSTALL_TIMEOUT_S: Final = 900.0


class InstallError(BenchError):
    """A program cannot be installed here."""


def ensure_installed(requirement: str, *others: str) -> Path:
    """The Python that has `requirement` (NAME==VERSION), and `others` beside it; installed first if need be.

    Raises:
        InstallError: with the end of what pip says.

    """
    name = re.sub(r"\[.*\]", "", requirement).replace("==", "-")
    directory = cache_dir(os.environ) / "bench-venvs" / name
    python, stamp = directory / "bin" / "python", directory / ".installed"
    if stamp.exists():
        return python
    print(f"installing {requirement} into {directory}, once (some minutes) ...", flush=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", requirement, *others]
    for command in ([sys.executable, "-m", "venv", "--clear", str(directory)], pip):
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
        except subprocess.CalledProcessError as error:
            raise InstallError(f"{requirement} cannot be installed: {error.stderr.strip()[-500:]}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InstallError(f"{requirement} cannot be installed: {error}") from error
    stamp.touch()
    return python
