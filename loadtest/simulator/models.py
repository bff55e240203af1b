"""Which model is simulated: a config.json, or one of a few well-known architectures by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec

from engine.core.model_config import ModelConfig
from engine.errors import ModelError
from loadtest.errors import InputError
from planner.core.roofline import DecoderShape

KV_BLOCK_TOKENS: Final = 16
"""The engine's."""

_LLAMA_3: Final = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN_3: Final = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
}
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "llama-3.1-8b": _LLAMA_3
    | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
    "llama-3.1-70b": _LLAMA_3
    | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
    "qwen3-8b": _QWEN_3
    | {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288},
    "qwen3-32b": _QWEN_3
    | {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64, "intermediate_size": 25600},
}
"""The sizes of the models' published config.json files."""


class Model(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    config: ModelConfig


def read_model(given: str) -> Model:
    """`given`: a preset, a config.json, or a directory that has one.

    Raises InputError if it is none of them, or if the engine could not serve it.
    """
    if given in PRESETS:
        return Model(name=given, config=ModelConfig.from_dict(PRESETS[given]))
    path = Path(given).expanduser()
    path = path / "config.json" if path.is_dir() else path
    try:
        content = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        known = ", ".join(PRESETS)
        problem = f"neither a preset ({known}) nor a config.json that can be read ({error.strerror or error})"
        raise InputError(given, None, "model", problem) from error
    except msgspec.DecodeError as error:
        raise InputError(str(path), None, "model", f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(str(path), None, "model", "not a JSON object")
    try:
        return Model(name=path.resolve().parent.name or path.stem, config=ModelConfig.from_dict(content))
    except ModelError as error:
        raise InputError(str(path), None, "model", str(error)) from error


def decoder_shape(model: Model, dtype: str) -> DecoderShape:
    """What an estimate of its step times needs; all families of the engine have a gated MLP."""
    config = model.config
    return DecoderShape(
        name=model.name,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        dtype=dtype,
    )
