"""Errors of the engine.

EngineError
+-- SettingError            a setting is missing or out of range; names it
+-- ProtocolError           an operation that the present state does not allow
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
