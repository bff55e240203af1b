"""Errors of the engine.

EngineError
+-- SettingError            a setting is missing or out of range; names it
+-- ProtocolError           an operation that the present state does not allow
|   +-- TransitionError     an event that a sequence's state does not know; names both
|   +-- BlockError          a KV block is shared or freed that nobody owns; names it
+-- PipelineBroken          a member of the pipeline died or was told to give up
+-- TransferError           context could not be fetched from a holder; names holder and unit
    +-- CorruptTransfer     it arrived, but its checksum or size is wrong
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of the engine's errors."""


class SettingError(EngineError):
    def __init__(self, variable: str, problem: str) -> None:
        super().__init__(f"{variable}: {problem}")
        self.variable = variable


class ProtocolError(EngineError):
    """An operation that the present state does not allow."""


class TransitionError(ProtocolError):
    def __init__(self, sequence: object, state: str, event: str) -> None:
        super().__init__(f"{sequence} is {state}, which knows no event {event}")
        self.sequence = sequence
        self.state = state
        self.event = event


class BlockError(ProtocolError):
    def __init__(self, action: str, block: int, num_refs: int) -> None:
        super().__init__(f"cannot {action} block {block}: it has {num_refs} references")
        self.action = action
        self.block = block
        self.num_refs = num_refs


class PipelineBroken(EngineError):
    def __init__(self, pipeline: str, cause: str) -> None:
        super().__init__(f"pipeline {pipeline} is broken: {cause}")
        self.pipeline = pipeline
        self.cause = cause


class TransferError(EngineError):
    def __init__(self, holder: str, what: str, cause: str) -> None:
        super().__init__(f"cannot fetch {what} from {holder}: {cause}")
        self.holder = holder
        self.what = what


class CorruptTransfer(TransferError):
    """The bytes arrived, but their checksum or size is wrong."""
