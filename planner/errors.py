"""What can go wrong in the planner.

PlannerError
├── SettingsError        a setting is missing or out of range
├── ModelMismatchError   an instance serves another model than the fleet
├── InventoryError       an inventory names units that its model does not have, or contradicts itself
├── MessageError         another message has a field with an impossible value
├── ProfileError         a profile of step times lacks what is asked for, or contradicts itself
├── MessageTooLargeError NATS does not take a message of this size
└── PlanInvariantError   a plan contradicts itself: a fault of the planner, the plan is not published
"""

from __future__ import annotations


class PlannerError(Exception):
    """Base of all errors of this package."""


class SettingsError(PlannerError):
    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class ModelMismatchError(PlannerError):
    def __init__(self, instance: str, model: str, expected: str) -> None:
        super().__init__(f"instance {instance} holds model {model}, the fleet serves {expected}")
        self.instance = instance
        self.model = model
        self.expected = expected


class InventoryError(PlannerError):
    def __init__(self, instance: str, field: str, reason: str) -> None:
        super().__init__(f"inventory of {instance}: {field}: {reason}")
        self.instance = instance
        self.field = field
        self.reason = reason


class MessageError(PlannerError):
    def __init__(self, message: str, sender: str, field: str, reason: str) -> None:
        super().__init__(f"{message} of {sender}: {field}: {reason}")
        self.message = message
        self.sender = sender
        self.field = field
        self.reason = reason


class MessageTooLargeError(PlannerError):
    def __init__(self, what: str, num_bytes: int, max_bytes: int) -> None:
        super().__init__(f"{what} takes {num_bytes} bytes, and NATS {max_bytes} at most: raise max_payload there")
        self.what = what
        self.num_bytes = num_bytes
        self.max_bytes = max_bytes


class PlanInvariantError(PlannerError):
    def __init__(self, epoch: int, reason: str) -> None:
        super().__init__(f"plan of epoch {epoch}: {reason}")
        self.epoch = epoch
        self.reason = reason


class ProfileError(PlannerError):
    def __init__(self, source: str, field: str, reason: str) -> None:
        super().__init__(f"profile {source}: {field}: {reason}")
        self.source = source
        self.field = field
        self.reason = reason
