from .base_checkpoint_loader import BaseCheckpointLoader
from .base_weight_loader import BaseWeightLoader
from .hf.checkpoint_loader import HfCheckpointLoader
from .hf.weight_loader import HfWeightLoader

__all__ = ["BaseCheckpointLoader", "BaseWeightLoader", "HfCheckpointLoader", "HfWeightLoader"]
