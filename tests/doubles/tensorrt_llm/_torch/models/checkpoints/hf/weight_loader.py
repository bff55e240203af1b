"""Reads safetensors files as arrays of bytes: torch is not wanted for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tensorrt_llm._torch.models.checkpoints.base_weight_loader import BaseWeightLoader
from tensorrt_llm.mapping import Mapping


def headers(checkpoint_dir: str) -> dict[str, tuple[Path, int, dict[str, Any]]]:
    """File, offset and header entry of every tensor of a checkpoint."""
    found: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in sorted(Path(checkpoint_dir).glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        found |= {name: (path, 8 + length, entry) for name, entry in header.items() if name != "__metadata__"}
    return found


class HfWeightLoader(BaseWeightLoader):
    def load_weights(self, checkpoint_dir: str, mapping: Mapping) -> dict[str, Any]:
        weights: dict[str, Any] = {}
        for name, (path, base, entry) in headers(checkpoint_dir).items():
            start, end = entry["data_offsets"]
            weights[name] = np.memmap(path, np.uint8, "r", base + start, (end - start,))
        if not weights:
            raise RuntimeError(f"No weight files found in {checkpoint_dir}.")
        return weights
