"""What `spotserve doctor` found: one line each as it comes, a JSON report, an exit code."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TextIO


class Outcome(StrEnum):
    OK = "ok"
    DIFFERS = "differs"
    """It works, but not as the backend takes it to; what was seen says how."""
    MISSING = "missing"
    FAILED = "failed"
    SKIPPED = "skipped"


EXIT_CODES: Final = {Outcome.MISSING: 1, Outcome.FAILED: 1, Outcome.DIFFERS: 3}


@dataclass(frozen=True)
class Finding:
    name: str
    outcome: Outcome
    seen: str
    expected: str = ""
    """What the backend takes for granted, where that is a question at all."""


@dataclass
class Findings:
    """Prints each finding to `out` as it is added."""

    backend: str
    out: TextIO
    started_s: float = field(default_factory=time.time)
    found: list[Finding] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        self.found.append(finding)
        expected = f" (expected: {finding.expected})" if finding.outcome is not Outcome.OK and finding.expected else ""
        self.out.write(f"{finding.outcome:8} {finding.name}: {finding.seen}{expected}\n")
        self.out.flush()

    def has(self, outcome: Outcome) -> bool:
        return any(finding.outcome is outcome for finding in self.found)

    @property
    def exit_code(self) -> int:
        """0: all is well; 3: it works, but something differs; 1: something is missing or failed."""
        codes = {EXIT_CODES.get(finding.outcome, 0) for finding in self.found}
        return 1 if 1 in codes else max(codes, default=0)

    def write_json(self, path: Path) -> None:
        report: dict[str, Any] = {
            "backend": self.backend,
            "started_s": self.started_s,
            "took_s": time.time() - self.started_s,
            "exit_code": self.exit_code,
            "findings": [asdict(finding) for finding in self.found],
        }
        path.write_text(json.dumps(report, indent=2) + "\n")

    def summary(self) -> str:
        counts = {outcome: sum(f.outcome is outcome for f in self.found) for outcome in Outcome}
        words = ", ".join(f"{number} {outcome}" for outcome, number in counts.items() if number)
        return f"{words}; {time.time() - self.started_s:.0f} s"


def run_doctor(
    backend: str, model_help: str, examine: Callable[[Findings, Path | None], None], arguments: list[str] | None
) -> int:
    """The program of a backend's doctor: examine, with the model's directory if there is one; report; the exit code."""
    parser = argparse.ArgumentParser(prog=f"spotserve doctor --backend {backend}")
    parser.add_argument("--json", type=Path, help="write a report there")
    parser.add_argument("--model", type=Path, help=model_help)
    options = parser.parse_args(arguments)
    findings = Findings(backend, sys.stdout)
    try:
        examine(findings, options.model)
    except KeyboardInterrupt:
        findings.add(Finding("doctor", Outcome.FAILED, "interrupted"))
    sys.stdout.write(findings.summary() + "\n")
    if options.json is not None:
        findings.write_json(options.json)
    return findings.exit_code
