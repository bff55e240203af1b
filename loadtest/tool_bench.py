"""Load tools of others against a local stack, as their users would run them: a smoke run of each.

It is no measurement of the stack: it says whether a tool works unmodified. Each tool's own count of successes is
checked, and each must end by itself.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec

from deploy.default_model import cache_dir, default_model_dir
from loadtest import vllm_traffic
from loadtest.bench_venvs import InstallError, ensure_installed
from loadtest.errors import BenchError
from loadtest.report import Check, Report, Table
from loadtest.stack import LocalStack

GUIDELLM: Final = "guidellm==0.8.1"
AIPERF: Final = "aiperf==0.13.0"
NUM_REQUESTS: Final = 8
CONCURRENCY: Final = 4
NUM_TOKENS: Final = 16
TOOL_TIMEOUT_S: Final = 120.0
"""Each takes well under a minute on a machine with nothing else to do."""
PROMPT: Final = "The lighthouse keeper opened the door and"
# Not HF_HUB_OFFLINE: with it, aiperf does not take a tokenizer's directory.
ENVIRONMENT: Final = {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_COLOR": "1"}


class ToolRun(msgspec.Struct, frozen=True, kw_only=True):
    tool: str
    version: str = ""
    num_succeeded: int | None
    """By the tool's own count; None: it did not run."""
    num_requests: int
    wall_s: float = 0.0
    note: str = ""


def run(up_options: list[str], tools: Sequence[str]) -> Report:
    """Each of `tools` (keys of TOOLS) against one stack; a tool that cannot be installed is reported, not failed."""
    runs = []
    with LocalStack([*up_options, "--instances", "1"]) as stack:
        for tool in tools:
            try:
                runs.append(TOOLS[tool](stack))
            except BenchError as error:
                print(error, file=sys.stderr)
                runs.append(
                    ToolRun(tool=tool, num_succeeded=0, num_requests=NUM_REQUESTS, note=str(error).splitlines()[0])
                )
            print(f"tools: {tool}: {runs[-1].note or 'done'}", file=sys.stderr, flush=True)
    checks = [
        Check(
            name=f"{one.tool}: requests that it counts as successful",
            value=one.num_succeeded,
            unit=f"of {one.num_requests}",
            target=one.num_requests,
            higher_is_better=True,
        )
        for one in runs
        if one.num_succeeded is not None
    ]
    return Report(name="tools", tables=[_table(runs)], checks=checks, figures=runs)


def _table(runs: Sequence[ToolRun]) -> Table:
    rows = [
        [f"{one.tool} {one.version}".strip(), f"{one.num_succeeded}/{one.num_requests}", f"{one.wall_s:.1f}", one.note]
        for one in runs
    ]
    return Table("tools: as they are, against a local stack", ["tool", "succeeded", "s", ""], rows)


# --- the tools ------------------------------------------------------------------------------------------------------


def _vllm(stack: LocalStack) -> ToolRun:
    model = stack.running.served_model_name
    answer = httpx.post(f"{stack.endpoint}/tokenize", json={"model": model, "prompt": PROMPT}, trust_env=False)
    shapes = vllm_traffic.shapes(model, PROMPT, answer.raise_for_status().json()["tokens"], NUM_TOKENS)
    began_s = time.monotonic()
    outcomes = asyncio.run(vllm_traffic.replay(stack.endpoint, shapes, NUM_REQUESTS, CONCURRENCY))
    errors = [f"{outcome.shape}: {outcome.error}" for outcome in outcomes if outcome.error]
    return ToolRun(
        tool="vllm bench serve",
        version="(replayed)",
        num_succeeded=len(outcomes) - len(errors),
        num_requests=len(outcomes),
        wall_s=time.monotonic() - began_s,
        note="; ".join(errors[:3]),
    )


def _guidellm(stack: LocalStack) -> ToolRun:
    output = stack.directory / "guidellm.json"
    # Without a version, pip would take one that is not the project's, with gigabytes of CUDA.
    python = _installed(GUIDELLM, f"torch=={importlib.metadata.version('torch').partition('+')[0]}")
    return _smoke(GUIDELLM, python, _guidellm_command(stack, output), stack, lambda: _guidellm_count(output))


def _guidellm_command(stack: LocalStack, output: Path) -> list[str]:
    return [
        "run",
        *("--backend", f"kind=openai_http,target={stack.endpoint},model={stack.running.served_model_name}"),
        *("--tokenizer", f"kind=huggingface_auto,model={_model_dir()}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={NUM_TOKENS},output_tokens={NUM_TOKENS}"),
        *("--profile", f"kind=concurrent,streams={CONCURRENCY}"),
        *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
        *("--output", f"kind=json,path={output}", "--disable-console"),
    ]


def _guidellm_count(output: Path) -> int:
    report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return sum(one["metrics"]["request_totals"]["successful"] for one in report["benchmarks"])


def _aiperf(stack: LocalStack) -> ToolRun:
    directory = stack.directory / "aiperf"
    python = _installed(AIPERF)
    return _smoke(AIPERF, python, _aiperf_command(stack, directory), stack, lambda: _aiperf_count(directory))


def _aiperf_command(stack: LocalStack, directory: Path) -> list[str]:
    return [
        *("profile", "--model", stack.running.served_model_name, "--url", stack.endpoint, "--endpoint-type", "chat"),
        *("--streaming", "--tokenizer", str(_model_dir()), "--concurrency", str(CONCURRENCY)),
        *("--request-count", str(NUM_REQUESTS), "--synthetic-input-tokens-mean", str(NUM_TOKENS)),
        *("--output-tokens-mean", str(NUM_TOKENS), "--extra-inputs", "ignore_eos:true"),
        *("--artifact-dir", str(directory), "--ui", "none"),
    ]


def _aiperf_count(directory: Path) -> int:
    found = next(directory.rglob("profile_export_aiperf.json"))
    report: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return int(report["request_count"]["avg"])


TOOLS: Final[dict[str, Callable[[LocalStack], ToolRun]]] = {"vllm": _vllm, "guidellm": _guidellm, "aiperf": _aiperf}


def _model_dir() -> Path:
    """Whose tokenizer the tools use."""
    return default_model_dir(cache_dir(os.environ))


def _installed(requirement: str, *others: str) -> Path | str:
    """The Python that has it, or why there is none."""
    try:
        return ensure_installed(requirement, *others)
    except InstallError as error:
        return f"not installed: {str(error).splitlines()[-1][-160:]}"


def _smoke(
    requirement: str, python: Path | str, command: list[str], stack: LocalStack, count: Callable[[], int]
) -> ToolRun:
    """Raises BenchError if the tool does not end by itself, or leaves no report."""
    tool, _, version = requirement.partition("==")
    if isinstance(python, str):
        return ToolRun(tool=tool, version=version, num_succeeded=None, num_requests=NUM_REQUESTS, note=python)
    began_s = time.monotonic()
    said = _run([str(python.with_name(tool)), *command], stack.directory / f"{tool}.log", stack.directory)
    try:
        num_succeeded = count()
    except (OSError, KeyError, ValueError, StopIteration) as error:
        raise BenchError(f"{tool} left no report ({error!r}):\n{said[-3000:]}") from error
    wall_s = time.monotonic() - began_s
    return ToolRun(tool=tool, version=version, num_succeeded=num_succeeded, num_requests=NUM_REQUESTS, wall_s=wall_s)


def _run(command: list[str], log: Path, directory: Path) -> str:
    """What it printed. Raises BenchError if it fails or takes too long; then all of its processes are killed."""
    with log.open("wb") as output:
        environ = {**os.environ, **ENVIRONMENT}
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environ,
            cwd=directory,
            start_new_session=True,
        )
        try:
            code = process.wait(TOOL_TIMEOUT_S)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                said = log.read_text(encoding="utf-8", errors="replace")[-3000:]
                raise BenchError(f"{command[0]} did not end in {TOOL_TIMEOUT_S:.0f} s:\n{said}") from error
            raise
    said = log.read_text(encoding="utf-8", errors="replace")
    if code != 0:
        raise BenchError(f"{command[0]} ended with code {code}:\n{said[-3000:]}")
    return said
