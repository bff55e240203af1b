"""What a benchmark hands back, and how it is shown: short tables, and figures beside their targets."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil


class Table(msgspec.Struct, frozen=True):
    title: str
    columns: list[str]
    rows: list[list[str]]

    def __str__(self) -> str:
        """Columns padded to their widest cell; the first one to the left, the others to the right."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        padded = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines
        ]
        return "\n".join([self.title, *(f"  {line.rstrip()}" for line in padded)])


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A figure beside its target. `value` None: nothing was measured, which meets no target."""

    name: str
    value: float | None
    unit: str
    target: float
    higher_is_better: bool = False

    @property
    def is_met(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.target if self.higher_is_better else self.value <= self.target

    def __str__(self) -> str:
        sign = ">=" if self.higher_is_better else "<="
        value = "nothing measured" if self.value is None else f"{self.value:.3g} {self.unit}"
        return (
            f"{'met   ' if self.is_met else 'MISSED'}  {self.name}: {value} (target {sign} {self.target:g} {self.unit})"
        )


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Of one benchmark; `figures` is its own Struct with everything that was measured."""

    name: str
    tables: list[Table]
    checks: list[Check]
    figures: Any
    failure: str | None = None
    """Why it ended before its end; what was measured until then still counts."""

    def __str__(self) -> str:
        parts = [*map(str, self.tables)]
        if self.checks:
            parts.append("\n".join(map(str, self.checks)))
        if self.failure is not None:
            parts.append(f"FAILED: {self.failure}")
        return "\n\n".join(parts)


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    system: str
    processor: str
    num_cpus: int
    memory_bytes: int
    load_average: tuple[float, float, float]
    """Over 1, 5 and 15 minutes, before the first benchmark: above 1 or so, something else ran as well."""

    @classmethod
    def inspect(cls) -> Machine:
        return cls(
            system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            processor=_processor_name(),
            num_cpus=os.cpu_count() or 1,
            memory_bytes=psutil.virtual_memory().total,
            load_average=os.getloadavg(),
        )

    def __str__(self) -> str:
        load = ", ".join(f"{value:.1f}" for value in self.load_average)
        return f"{self.processor}, {self.num_cpus} CPUs, {self.memory_bytes / 2**30:.0f} GiB; load average {load}"


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def write_json(path: Path, command: Sequence[str], machine: Machine, reports: Sequence[Report]) -> None:
    """All figures of a run, with the command that gives them again."""
    content = {
        "command": " ".join(command),
        "ended_at_s": round(time.time(), 1),
        "machine": machine,
        "benchmarks": [
            {
                "name": report.name,
                "failure": report.failure,
                "checks": [{**msgspec.structs.asdict(check), "is_met": check.is_met} for check in report.checks],
                "figures": report.figures,
            }
            for report in reports
        ],
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


def seconds(value: float | None) -> str:
    """`0.123`, or `-` where there is nothing."""
    return "-" if value is None else f"{value:.3f}"
