"""The model context of a rank: the units it holds, each in one place only.

A unit arrives as loose tensors. A stage model that needs it has it fused with its neighbours into a block, a form that
computes fast; from then on the unit lives in the block, and is taken out of it only to be sent or fused anew. Blocks
never change, so a stage model that still serves is not disturbed by one that is being built.
"""

from __future__ import annotations

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

    def unit(self, group: int) -> UnitTensors:
        """The tensors of one of its units, as they were given."""
        ...


class LooseUnit:
    def __init__(self, group: int, tensors: UnitTensors) -> None:
        self.groups = range(group, group + 1)
        self._tensors = tensors

    def unit(self, group: int) -> UnitTensors:
        return self._tensors


B = TypeVar("B", bound=Block)


class WeightStore:
    """Units by (layer, head group): decoder layers 0 .. num_layers-1, embedding -1, output head num_layers.

    Every method may be called from any thread.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self._blocks: dict[tuple[int, int], Block] = {}
        self._lock = threading.RLock()

    def units(self) -> set[tuple[int, int]]:
        with self._lock:
            return set(self._blocks)

    def put(self, layer: int, group: int, tensors: UnitTensors) -> None:
        """Hold a unit; `tensors` are kept as they are where dtype and device fit."""
        placed = {name: tensor.to(self.device, self.dtype) for name, tensor in tensors.items()}
        with self._lock:
            self._blocks[layer, group] = LooseUnit(group, placed)

    def unit(self, layer: int, group: int) -> UnitTensors:
        """Raises MissingUnit."""
        with self._lock:
            block = self._blocks.get((layer, group))
        if block is None:
            raise MissingUnit([(layer, group)])
        return block.unit(group)

    def export_unit(self, layer: int, group: int) -> bytes:
        """The unit as bytes that depend only on config and dtype. Raises MissingUnit."""
        return unit_to_bytes(self.config, layer, self.unit(layer, group))

    def import_unit(self, layer: int, group: int, data: bytes | memoryview) -> None:
        """Raises CorruptUnit if the size is wrong; the store is then as before."""
        self.put(layer, group, unit_from_bytes(self.config, layer, group, data, self.dtype, self.device))

    def keep_only(self, units: set[tuple[int, int]]) -> None:
        """Drop all other units; a block that loses one of its units is taken apart, so that its memory is freed."""
        with self._lock:
            kept = {unit: block for unit, block in self._blocks.items() if unit in units}
            for (layer, group), block in kept.items():
                if any(kept.get((layer, other)) is not block for other in block.groups):
                    copies = {name: tensor.clone() for name, tensor in block.unit(group).items()}
                    kept[layer, group] = LooseUnit(group, copies)
            self._blocks = kept

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
            block = fuse(groups, [self.unit(layer, group) for group in groups])
            self._blocks |= {(layer, group): block for group in groups}
            return block
