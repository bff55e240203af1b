from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from tensorrt_llm.mapping import Mapping

from .base_weight_loader import BaseWeightLoader


class BaseCheckpointLoader(ABC):
    _weight_loader: BaseWeightLoader | None
    _checkpoint_format: str | None

    @abstractmethod
    def get_default_weight_loader(self) -> BaseWeightLoader: ...

    def load_config(self, checkpoint_dir: str, **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError

    def load_weights(self, checkpoint_dir: str, mapping: Mapping, **kwargs: Any) -> dict[str, Any]:
        assert self._weight_loader is not None
        return self._weight_loader.load_weights(checkpoint_dir, mapping=mapping, **kwargs)

    def cleanup(self) -> None:
        if self._weight_loader is not None:
            self._weight_loader.cleanup()
            self._weight_loader = None
