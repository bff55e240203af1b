"""Errors of the benchmarks.

BenchError
+-- StackError     the stack did not start, or did not do in time what was waited for; says where its logs are
+-- StreamError    a stream ended with an error, or without all its tokens
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


def _ends_of(logs: Path) -> str:
    """The last lines of every log: the directory goes away with the benchmark."""
    return "\n".join(
        f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
        for path in sorted(logs.rglob("*.log"))
    )
