"""What the state machine hears besides wire messages, and what it wants done."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from planner.protocol import (
    Arrange,
    DesiredCapacity,
    Explanation,
    InstanceInventory,
    InstanceLost,
    InstanceRequested,
    InstanceStarting,
    LoadReport,
    NoticeCancelled,
    Plan,
    PreemptionNotice,
    RankProgress,
)


class Internal(msgspec.Struct, frozen=True, kw_only=True):
    """Base of events and effects that stay inside the planner."""


class InstanceReached(Internal, frozen=True, kw_only=True):
    """Its liveness connection stands."""

    instance: str


class Tick(Internal, frozen=True, kw_only=True):
    """Time has passed: `PlannerState.next_wakeup_s()` has come."""


Event = (
    InstanceInventory
    | InstanceRequested
    | InstanceStarting
    | PreemptionNotice
    | NoticeCancelled
    | InstanceLost
    | LoadReport
    | RankProgress
    | InstanceReached
    | Tick
)


class PublishPlan(Internal, frozen=True, kw_only=True):
    plan: Plan


class PublishArrange(Internal, frozen=True, kw_only=True):
    arrange: Arrange


class PublishAdvice(Internal, frozen=True, kw_only=True):
    """What the planner would have done; nobody acts on it."""

    explanation: Explanation


class PublishDesired(Internal, frozen=True, kw_only=True):
    desired: DesiredCapacity


class WatchInstance(Internal, frozen=True, kw_only=True):
    """Hold a liveness connection to it; nothing to do if there is one to this address."""

    instance: str
    address: str


class ForgetInstance(Internal, frozen=True, kw_only=True):
    """Close its liveness connection."""

    instance: str


class ProbeInstances(Internal, frozen=True, kw_only=True):
    """Find out at once which of them live: one of them is suspected."""

    instances: list[str]


class Severity(StrEnum):
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Report(Internal, frozen=True, kw_only=True):
    """Something that the operator should read in the log."""

    event: str
    fields: dict[str, str]
    severity: Severity = Severity.INFO


Effect = (
    PublishPlan
    | PublishArrange
    | PublishAdvice
    | PublishDesired
    | WatchInstance
    | ForgetInstance
    | ProbeInstances
    | Report
)
"""To be carried out in order."""
