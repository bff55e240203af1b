"""Errors of the engine.

EngineError
+-- SettingError            a setting is missing or out of range; names it
+-- ProtocolError           an operation that the present state does not allow
|   +-- TransitionError     an event that a sequence's state does not know; names both
|   +-- BlockError          a KV block is shared or freed that nobody owns; names it
+-- GrammarError            a grammar cannot be compiled, or not be followed any further; says why
+-- PipelineBroken          a member of the pipeline died or was told to give up
+-- EngineUnavailable       an engine of another make cannot be had here; says why, and what to do
|   +-- ShapeRefused        it cannot take the shape of this pipeline, ever; another shape may do
+-- TransferError           context could not be fetched from a holder; names holder and unit
|   +-- CorruptTransfer     it arrived, but its checksum or size is wrong
+-- ModelError              a model cannot be served from what is there
    +-- UnsupportedModel    its config.json asks for what this engine lacks; names the field
    +-- InvalidModelConfig  a field of config.json is missing or senseless; names it
    +-- MissingTensor       the checkpoint lacks a tensor or a file, or its shape is wrong; names both
    +-- MissingUnit         a stage lacks units of its model context; names them
    +-- CorruptUnit         the bytes of a unit or of a sequence's KV have the wrong size; names it
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


class GrammarError(EngineError):
    """The output cannot be held to a request's grammar."""


class PipelineBroken(EngineError):
    def __init__(self, pipeline: str, cause: str) -> None:
        super().__init__(f"pipeline {pipeline} is broken: {cause}")
        self.pipeline = pipeline
        self.cause = cause


class EngineUnavailable(EngineError):
    """An engine of another make (TensorRT-LLM) is not installed, of a wrong version, or cannot take the shape."""


class ShapeRefused(EngineUnavailable):
    """The engine cannot take the shape of this pipeline here, however often it is tried."""


class TransferError(EngineError):
    def __init__(self, holder: str, what: str, cause: str) -> None:
        super().__init__(f"cannot fetch {what} from {holder}: {cause}")
        self.holder = holder
        self.what = what


class CorruptTransfer(TransferError):
    """The bytes arrived, but their checksum or size is wrong."""


class ModelError(EngineError):
    """A model cannot be served from what is there."""


class UnsupportedModel(ModelError):
    def __init__(self, field: str, value: object, supported: str) -> None:
        super().__init__(f"config.json: {field} = {value!r} is not supported (supported: {supported})")
        self.field = field
        self.value = value


class InvalidModelConfig(ModelError):
    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"config.json: {field} {problem}")
        self.field = field


class MissingTensor(ModelError):
    def __init__(self, tensor: str, file: str, problem: str = "is missing") -> None:
        super().__init__(f"{file}: {tensor} {problem}")
        self.tensor = tensor
        self.file = file


class MissingUnit(ModelError):
    def __init__(self, units: list[tuple[int, int]]) -> None:
        shown = ", ".join(f"layer {layer} group {group}" for layer, group in units[:8])
        more = f" and {len(units) - 8} more" if len(units) > 8 else ""
        super().__init__(f"model context lacks {shown}{more}")
        self.units = units


class CorruptUnit(ModelError):
    def __init__(self, what: str, num_bytes: int, expected_bytes: int) -> None:
        super().__init__(f"{what}: {num_bytes} bytes, expected {expected_bytes}")
        self.what = what
