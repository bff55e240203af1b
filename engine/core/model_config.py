"""What the engine must know of a model, read from a Hugging Face config.json; and the units it is cut into.

A model with V KV heads has V head groups. Group g holds KV head g with its query heads, and 1/V of the MLP columns
and of the vocabulary, cut at floor(g * n / V). Units of one layer are all of the same size: where V does not divide n,
the shorter ones are padded with zeros, which changes no result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from engine.core.rope import RopeScaling
from engine.errors import InvalidModelConfig, UnsupportedModel
from planner.protocol import EMBEDDING_LAYER, ModelShape

FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")
UNSUPPORTED_IF_SET: Final = ("mlp_bias", "quantization_config", "embedding_multiplier", "logits_scaling")


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder of the Llama family. Sizes are in elements, ids in vocabulary rows."""

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    """Also the number of head groups, V."""
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeScaling
    max_position_embeddings: int
    sliding_window: int | None = None
    """A row sees this many positions; no effect on sequences that are not longer."""
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: list[int] = []

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read the fields of config.json.

        Raises UnsupportedModel where the model needs what this engine lacks, and InvalidModelConfig where a field is
        missing or senseless; both name the field.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise UnsupportedModel("model_type", family, f"one of {', '.join(FAMILIES)}")
        _refuse_unsupported(config, family)
        num_heads = _positive(config, "num_attention_heads")
        hidden_size = _positive(config, "hidden_size")
        num_kv_heads = _positive(config, "num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise InvalidModelConfig("num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} heads")
        max_positions = _positive(config, "max_position_embeddings")
        head_dim = _positive(config, "head_dim", 128 if family == "qwen3" else hidden_size // num_heads)
        if head_dim % 2:
            raise InvalidModelConfig("head_dim", f"{head_dim} is odd")
        return cls(
            family=family,
            num_layers=_positive(config, "num_hidden_layers"),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=_positive(config, "intermediate_size"),
            vocab_size=_positive(config, "vocab_size"),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=RopeScaling.from_dict(config, max_positions),
            max_position_embeddings=max_positions,
            sliding_window=_sliding_window(config, family),
            # Mistral's, Llama's and Qwen's config.json leave it out where it is false.
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            eos_token_ids=_eos_token_ids(config),
        )

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def columns_of_group(self, num_columns: int, group: int) -> tuple[int, int]:
        """First column of `group` and the one behind its last, of `num_columns` MLP columns or vocabulary rows."""
        return group * num_columns // self.num_kv_heads, (group + 1) * num_columns // self.num_kv_heads

    def padded_columns(self, num_columns: int) -> int:
        """Columns (rows) of every unit, padding included."""
        return -(-num_columns // self.num_kv_heads)

    def unit_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Tensors of one unit of `layer`, in the order of its bytes. Matrices are [outputs, inputs]."""
        hidden, dim, heads = self.hidden_size, self.head_dim, self.heads_per_group
        rows = self.padded_columns(self.vocab_size)
        if layer == EMBEDDING_LAYER:
            return {"embedding": (rows, hidden)}
        if layer == self.num_layers:
            head = {} if self.tie_word_embeddings else {"lm_head": (rows, hidden)}
            return {"norm": (hidden,), **head}
        columns = self.padded_columns(self.intermediate_size)
        shapes: dict[str, tuple[int, ...]] = {"input_norm": (hidden,), "post_norm": (hidden,)}
        if self.qk_norm:
            shapes |= {"q_norm": (dim,), "k_norm": (dim,)}
        if self.qkv_bias:
            shapes |= {"qkv_bias": ((heads + 2) * dim,)}
        return shapes | {
            "qkv": ((heads + 2) * dim, hidden),
            "o": (hidden, heads * dim),
            "gate_up": (2 * columns, hidden),
            "down": (hidden, columns),
        }

    def unit_elements(self, layer: int) -> int:
        """Number of elements of one unit of `layer`."""
        total = 0
        for shape in self.unit_shapes(layer).values():
            total += shape[0] * (shape[1] if len(shape) == 2 else 1)
        return total

    def shape(self, name: str, dtype_bytes: int, block_tokens: int, max_model_len: int | None) -> ModelShape:
        """The planner's view of this model. Raises as `model_len` does."""
        return ModelShape(
            name=name,
            num_layers=self.num_layers,
            num_head_groups=self.num_kv_heads,
            decoder_unit_bytes=self.unit_elements(0) * dtype_bytes,
            embedding_unit_bytes=self.unit_elements(EMBEDDING_LAYER) * dtype_bytes,
            head_unit_bytes=self.unit_elements(self.num_layers) * dtype_bytes,
            kv_unit_bytes_per_token=2 * self.head_dim * dtype_bytes,
            kv_block_tokens=block_tokens,
            max_model_len=self.model_len(max_model_len),
            hidden_bytes_per_token=self.hidden_size * dtype_bytes,
            tied_embeddings=self.tie_word_embeddings,
        )

    def model_len(self, max_model_len: int | None) -> int:
        """The longest sequence to serve: the one asked for, or by default the longest that the model can do here.

        Raises UnsupportedModel if a sliding window would take effect, InvalidModelConfig if the model is not made
        for sequences of that length.
        """
        longest = min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)
        wanted = longest if max_model_len is None else max_model_len
        if wanted < 1:
            raise InvalidModelConfig("max_model_len", f"{wanted} is not positive")
        if wanted > self.max_position_embeddings:
            limit = self.max_position_embeddings
            raise InvalidModelConfig("max_position_embeddings", f"{limit} is below max_model_len {wanted}")
        if self.sliding_window is not None and wanted > self.sliding_window:
            needed = f"max_model_len up to {self.sliding_window}, not {wanted}"
            raise UnsupportedModel("sliding_window", self.sliding_window, needed)
        return wanted


def _positive(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field)
    value = default if value is None else value
    if value is None:
        raise InvalidModelConfig(field, "is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidModelConfig(field, f"{value!r} is not a positive integer")
    return value


def _refuse_unsupported(config: Mapping[str, Any], family: str) -> None:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModel("hidden_act", activation, "silu")
    # Qwen2 always has the bias on q, k and v, and never on o; the others have it on all four if at all.
    if config.get("attention_bias") and family != "qwen2":
        raise UnsupportedModel("attention_bias", config["attention_bias"], "false")
    for field in UNSUPPORTED_IF_SET:
        if config.get(field):
            raise UnsupportedModel(field, config[field], "unset")
    factor = config.get("partial_rotary_factor", 1.0)
    if factor != 1.0:
        raise UnsupportedModel("partial_rotary_factor", factor, "1.0")


def _sliding_window(config: Mapping[str, Any], family: str) -> int | None:
    # What config.json leaves out has the family's default in transformers.
    window = config.get("sliding_window", 4096 if family == "mistral" else None)
    if window is None:
        return None
    layer_types = config.get("layer_types")
    if layer_types is not None:
        return int(window) if "sliding_attention" in layer_types else None
    if family.startswith("qwen"):
        in_use = config.get("use_sliding_window", False)
        first_layer = config.get("max_window_layers", 28)
        return int(window) if in_use and first_layer < config["num_hidden_layers"] else None
    return int(window) if family == "mistral" else None


def _eos_token_ids(config: Mapping[str, Any]) -> list[int]:
    ids = config.get("eos_token_id")
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else [int(token) for token in ids]
