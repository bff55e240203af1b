from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from tensorrt_llm.mapping import Mapping


class BaseWeightLoader(ABC):
    @abstractmethod
    def load_weights(self, checkpoint_dir: str, mapping: Mapping) -> dict[str, Any]:
        """Whole tensors by name; at least those of the rank's layers."""

    def cleanup(self) -> None:  # noqa: B027 - free to override, as there
        pass
