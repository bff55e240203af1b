"""LiteLLM's proxy beside ours: a pinned version in a virtual environment of its own, made when it is first wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from loadtest import bench_venvs
from loadtest.openai_stub import MODEL
from loadtest.processes import Process

VERSION: Final = "1.106.2"
ENVIRONMENT: Final = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # nothing is fetched at start
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOG": "ERROR",
    "LITELLM_TELEMETRY": "False",
    # Loopback only, and as our gateway is measured: checking keys would only make it slower.
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
}


def ensure_installed() -> Path:
    """The Python that has the proxy; it is installed first if need be. Raises InstallError."""
    return bench_venvs.ensure_installed(f"litellm[proxy]=={VERSION}")


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
