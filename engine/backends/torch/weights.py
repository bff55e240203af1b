"""The model context of a rank: the units it holds, each in one place only.

A unit arrives as loose tensors. A stage model that needs it has it fused with its neighbours into a block, a form that
computes fast; from then on the unit lives in the block, and is taken out of it only to be sent or fused anew. Blocks
never change, so a stage model that still serves is not disturbed by one that is being built.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from engine.backends.torch.checkpoint import Checkpoint
from engine.backends.torch.units import UnitTensors, unit_from_bytes, unit_to_bytes
from engine.core.model_config import ModelConfig
from engine.errors import MissingUnit

__all__ = ["Block", "Checkpoint", "UnitTensors", "WeightStore"]


class Block(Protocol):
    """Units of consecutive head groups of one layer."""

    groups: range

    def units(self) -> list[UnitTensors]:
        """The tensors of its units, as they were given; of a packed block, one unpacked copy of all of them."""
        ...


class LooseUnit:
    def __init__(self, group: int, tensors: UnitTensors) -> None:
        self.groups = range(group, group + 1)
        self._tensors = tensors

    def units(self) -> list[UnitTensors]:
        return [self._tensors]


B = TypeVar("B", bound=Block)
Unit = tuple[int, int]
"""(layer, head group)"""


class WeightStore:
    """Units by (layer, head group): decoder layers 0 .. num_layers-1, embedding -1, output head num_layers.

    Every method may be called from any thread.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self._blocks: dict[Unit, Block] = {}
        self._lock = threading.RLock()
        self._last_exported: tuple[Block, list[UnitTensors]] | None = None
        """Units are pulled group after group: a block is unpacked once for all of them."""

    def units(self) -> set[Unit]:
        with self._lock:
            return set(self._blocks)

    def put(self, layer: int, group: int, tensors: UnitTensors) -> None:
        """Hold a unit; `tensors` are kept as they are where dtype and device fit."""
        placed = {name: tensor.to(self.device, self.dtype) for name, tensor in tensors.items()}
        with self._lock:
            self._blocks[layer, group] = LooseUnit(group, placed)

    def tensors(self, layer: int, groups: range) -> list[UnitTensors]:
        """Raises MissingUnit."""
        blocks = [self._block_of(layer, group) for group in groups]
        units = {block: block.units() for block in set(blocks)}
        return [units[block][group - block.groups[0]] for block, group in zip(blocks, groups, strict=True)]

    def export_unit(self, layer: int, group: int) -> bytes:
        """The unit as bytes that depend only on config and dtype. Raises MissingUnit."""
        block = self._block_of(layer, group)
        with self._lock:
            last = self._last_exported
            units = last[1] if last is not None and last[0] is block else block.units()
            self._last_exported = None if group == block.groups[-1] else (block, units)
        return unit_to_bytes(self.config, layer, units[group - block.groups[0]])

    def import_unit(self, layer: int, group: int, data: bytes | memoryview) -> None:
        """Raises CorruptUnit if the size is wrong; the store is then as before."""
        self.put(layer, group, unit_from_bytes(self.config, layer, group, data, self.dtype, self.device))

    def keep_only(self, units: set[Unit]) -> None:
        """Drop all other units and give their memory back, but for what a stage model still uses.

        A block that loses one of its units is taken apart.
        """
        with self._lock:
            kept = {unit: block for unit, block in self._blocks.items() if unit in units}
            for (layer, group), block in list(kept.items()):
                if any(kept.get((layer, other)) is not block for other in block.groups):
                    tensors = self.tensors(layer, range(group, group + 1))[0]
                    copies = {name: tensor.clone() for name, tensor in tensors.items()}
                    self._blocks[layer, group] = LooseUnit(group, copies)
            self._blocks = {unit: self._blocks[unit] for unit in kept}
            self._last_exported = None
        _return_free_memory()

    def block(self, kind: type[B], layer: int, groups: range, fuse: Callable[[range, list[UnitTensors]], B]) -> B:
        """The block of exactly these units; made by `fuse` unless the store has it already. Raises MissingUnit."""
        with self._lock:
            held = self._blocks.get((layer, groups[0]))
            if (
                isinstance(held, kind)
                and held.groups == groups
                and all(self._blocks.get((layer, group)) is held for group in groups)
            ):
                return held
            block = fuse(groups, self.tensors(layer, groups))
            self._blocks |= {(layer, group): block for group in groups}
            return block

    def _block_of(self, layer: int, group: int) -> Block:
        with self._lock:
            block = self._blocks.get((layer, group))
        if block is None:
            raise MissingUnit([(layer, group)])
        return block


def _return_free_memory() -> None:
    """With glibc, freed weights go back to the system only on request; the instance's other ranks may need them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
