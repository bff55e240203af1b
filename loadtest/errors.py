"""Errors of the benchmarks and of the simulator.

BenchError
+-- StackError     the stack did not start, or did not do in time what was waited for; says where its logs are
+-- StreamError    a stream ended with an error, or without all its tokens
+-- InputError     what a simulation was given cannot be used; names file (or option), line and field
+-- SimulationError  a scenario cannot be simulated, or its policy has broken a rule of the simulator
"""

from __future__ import annotations

from pathlib import Path


class BenchError(Exception):
    """Base of the benchmarks' errors."""


class StackError(BenchError):
    def __init__(self, problem: str, logs: Path) -> None:
        super().__init__(f"{problem}\n{_ends_of(logs)}")
        self.problem = problem


class StreamError(BenchError):
    def __init__(self, request_id: str, problem: str) -> None:
        super().__init__(f"stream {request_id or '(no id yet)'}: {problem}")
        self.request_id = request_id


class InputError(BenchError):
    """One line for the user. `source` is the file, or the option if it was given there; `line` counts from 1."""

    def __init__(self, source: str, line: int | None, field: str | None, problem: str) -> None:
        place = source if line is None else f"{source}, line {line}"
        super().__init__(f"{place}: {problem}" if field is None else f"{place}: {field}: {problem}")
        self.source = source
        self.line = line
        self.field = field
        self.problem = problem


class SimulationError(BenchError):
    pass


def _ends_of(logs: Path) -> str:
    """The last lines of every log: the directory goes away with the benchmark."""
    return "\n".join(
        f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
        for path in sorted(logs.rglob("*.log"))
    )
