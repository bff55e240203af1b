"""One unit of model context as tensors, and as the flat bytes in which it travels between ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.core.model_config import ModelConfig
from engine.errors import CorruptUnit

UnitTensors = dict[str, Tensor]
"""Tensors of one (layer, head group), named and shaped as `ModelConfig.unit_shapes` says."""


def tensor_bytes(tensor: Tensor) -> bytes:
    """The elements of `tensor` in row-major order."""
    return tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes()


def tensor_from_bytes(data: bytes | memoryview, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 1-D tensor with its own copy of `data`."""
    return torch.frombuffer(bytearray(data), dtype=dtype).to(device)


def unit_to_bytes(config: ModelConfig, layer: int, tensors: UnitTensors) -> bytes:
    """The tensors one after the other, in the order of `ModelConfig.unit_shapes`."""
    return b"".join(tensor_bytes(tensors[name]) for name in config.unit_shapes(layer))


def unit_from_bytes(
    config: ModelConfig,
    layer: int,
    group: int,
    data: bytes | memoryview,
    dtype: torch.dtype,
    device: torch.device,
) -> UnitTensors:
    """Raises CorruptUnit if `data` is not exactly one unit of `layer`."""
    expected_bytes = config.unit_elements(layer) * dtype.itemsize
    num_bytes = memoryview(data).nbytes
    if num_bytes != expected_bytes:
        raise CorruptUnit(f"unit (layer {layer}, group {group})", num_bytes, expected_bytes)
    flat = tensor_from_bytes(data, dtype, device)
    shapes = config.unit_shapes(layer)
    pieces = torch.split(flat, [math.prod(shape) for shape in shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
