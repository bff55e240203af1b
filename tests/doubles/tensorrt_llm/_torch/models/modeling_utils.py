from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T", bound=type)
CHECKPOINT_LOADER_FORMAT_DEFAULT_MAPPING: dict[str, type] = {}
CHECKPOINT_WEIGHT_LOADER_FORMAT_DEFAULT_MAPPING: dict[str, type] = {}
CONFIG_LOADER_FORMAT_DEFAULT_MAPPING: dict[str, type] = {}
MODEL_CLASS_MAPPER_MAPPING: dict[str, type] = {}


def _registers(table: dict[str, type]) -> Callable[[str], Callable[[T], T]]:
    def named(name: str) -> Callable[[T], T]:
        def register(cls: T) -> T:
            table[name] = cls
            return cls

        return register

    return named


register_checkpoint_loader = _registers(CHECKPOINT_LOADER_FORMAT_DEFAULT_MAPPING)
register_checkpoint_weight_loader = _registers(CHECKPOINT_WEIGHT_LOADER_FORMAT_DEFAULT_MAPPING)
register_config_loader = _registers(CONFIG_LOADER_FORMAT_DEFAULT_MAPPING)
register_mapper = _registers(MODEL_CLASS_MAPPER_MAPPING)
