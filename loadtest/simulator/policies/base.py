"""The seam between scenarios and policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from loadtest.simulator.result import Result
from loadtest.simulator.scenario import Scenario

OnProgress = Callable[[float], None]
"""Called now and then with the virtual time in seconds."""


class Policy(Protocol):
    """One way of running a fleet. The same scenario gives the same result, to the byte."""

    @property
    def name(self) -> str: ...

    def run(self, scenario: Scenario, on_progress: OnProgress) -> Result: ...
