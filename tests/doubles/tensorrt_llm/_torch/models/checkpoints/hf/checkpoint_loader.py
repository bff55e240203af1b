from __future__ import annotations

from typing import Any

from tensorrt_llm._torch.models.checkpoints.base_checkpoint_loader import BaseCheckpointLoader
from tensorrt_llm._torch.models.checkpoints.base_weight_loader import BaseWeightLoader
from tensorrt_llm._torch.models.modeling_utils import register_checkpoint_loader

from .weight_loader import HfWeightLoader


@register_checkpoint_loader("HF")
class HfCheckpointLoader(BaseCheckpointLoader):
    def __init__(
        self, *, weight_loader: BaseWeightLoader | None = None, weight_mapper: Any = None, config_loader: Any = None
    ) -> None:
        self._weight_loader = weight_loader if weight_loader is not None else self.get_default_weight_loader()
        self._weight_mapper = weight_mapper
        self._config_loader = config_loader
        self._checkpoint_format = "HF"

    def get_default_weight_loader(self) -> HfWeightLoader:
        return HfWeightLoader()
