"""How long `spotserve up` takes, with everything cached: from the command to the first token of a stream."""

from __future__ import annotations

import re
import sys
import time
from typing import Final

import httpx
import msgspec

from loadtest.errors import StreamError
from loadtest.report import Check, Report, Table, seconds
from loadtest.stack import LocalStack

FIRST_TOKEN_TARGET_S: Final = 30.0
REQUEST_TIMEOUT_S: Final = 60.0
NUM_TOKENS: Final = 8
ELAPSED: Final = re.compile(r"^\[ *([\d.]+) s\] (.*)$", re.MULTILINE)


class Start(msgspec.Struct, frozen=True, kw_only=True):
    ready_s: float
    """From the command to `GET /ready`: 200."""
    first_token_s: float
    """From the command to the first streamed token of a request that was sent then."""
    steps: list[tuple[float, str]]
    """What `up` printed, with its own clock."""


def run(up_options: list[str], num_runs: int) -> Report:
    """Start and stop a stack `num_runs` times."""
    starts = []
    for number in range(num_runs):
        with LocalStack(up_options) as stack:
            first_token_s = _time_of_first_token(stack) - stack.started_at_s
            starts.append(Start(ready_s=stack.ready_s, first_token_s=first_token_s, steps=steps_of(stack.output())))
        print(f"startup: {number + 1}/{num_runs} first token after {first_token_s:.1f} s", file=sys.stderr, flush=True)
    worst_s = max((start.first_token_s for start in starts), default=None)
    check = Check(name="first token after `up`, slowest run", value=worst_s, unit="s", target=FIRST_TOKEN_TARGET_S)
    return Report(name="startup", tables=_tables(starts), checks=[check], figures=starts)


def steps_of(output: str) -> list[tuple[float, str]]:
    """(seconds since the supervisor's start, line) of each line that carries its time."""
    return [(float(elapsed_s), text) for elapsed_s, text in ELAPSED.findall(output)]


def _time_of_first_token(stack: LocalStack) -> float:
    """Unix time; raises StreamError."""
    body = {"model": stack.running.served_model_name, "prompt": "Once upon a time", "max_tokens": NUM_TOKENS}
    with (
        httpx.Client(base_url=stack.endpoint, timeout=REQUEST_TIMEOUT_S, trust_env=False) as client,
        client.stream("POST", "/v1/completions", json={**body, "stream": True, "return_token_ids": True}) as response,
    ):
        for line in response.iter_lines():
            if '"token_ids":[' in line:
                return time.time()
    raise StreamError("", f"HTTP {response.status_code} without a token")


def _tables(starts: list[Start]) -> list[Table]:
    rows = [[str(i + 1), seconds(start.ready_s), seconds(start.first_token_s)] for i, start in enumerate(starts)]
    tables = [Table("startup: s from the command `up`", ["run", "ready", "first token"], rows)]
    if starts:
        steps = [[text, f"{elapsed_s:.1f}"] for elapsed_s, text in starts[-1].steps]
        tables.append(Table("steps of the last run", ["", "s"], steps))
    return tables
