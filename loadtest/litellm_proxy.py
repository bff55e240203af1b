"""LiteLLM's proxy beside ours: a pinned version in a virtual environment of its own, made when it is first wanted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from deploy.default_model import cache_dir
from loadtest.errors import BenchError
from loadtest.openai_stub import MODEL
from loadtest.processes import Process

VERSION: Final = "1.106.2"
INSTALL_TIMEOUT_S: Final = 900.0
ENVIRONMENT: Final = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # nothing is fetched at start
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOG": "ERROR",
    "LITELLM_TELEMETRY": "False",
    # Loopback only, and as our gateway is measured: checking keys would only make it slower.
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
}


class InstallError(BenchError):
    """The proxy cannot be installed here."""


def ensure_installed() -> Path:
    """The Python that has the proxy; it is installed first if need be. Raises InstallError."""
    directory = cache_dir(os.environ) / "bench-venvs" / f"litellm-{VERSION}"
    python, stamp = directory / "bin" / "python", directory / ".installed"
    if stamp.exists():
        return python
    print(f"installing litellm[proxy] {VERSION} into {directory}, once (some minutes) ...", flush=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", f"litellm[proxy]=={VERSION}"]
    for command in ([sys.executable, "-m", "venv", "--clear", str(directory)], pip):
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
        except subprocess.CalledProcessError as error:
            raise InstallError(f"litellm cannot be installed: {error.stderr.strip()[-500:]}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InstallError(f"litellm cannot be installed: {error}") from error
    stamp.touch()
    return python


def proxy(python: Path, port: int, upstream_port: int, directory: Path) -> Process:
    """The proxy as its documentation runs it, with one worker, in front of `upstream_port`."""
    config = directory / "litellm.yaml"
    config.write_text(
        "model_list:\n"
        f"  - model_name: {MODEL}\n"
        "    litellm_params:\n"
        f"      model: openai/{MODEL}\n"
        f"      api_base: http://127.0.0.1:{upstream_port}/v1\n"
        "      api_key: none\n"
        "general_settings:\n"
        "  disable_spend_logs: true\n"
    )
    command = [str(python.with_name("litellm")), "--config", str(config), "--port", str(port), "--host", "127.0.0.1"]
    return Process("litellm", [*command, "--num_workers", "1", "--telemetry", "False"], directory, ENVIRONMENT)
