"""Estimates a profile from a model's shape and a device's data sheet, for what-if before anything is rented.

A kernel takes what its slower resource takes: bytes at the memory's speed, or operations at the arithmetic's speed
(the roofline), each at an achievable fraction; small work is dominated by a fixed time for each kernel, so that the
fraction reached grows with the work. A tensor group pays two all-reduces a layer. The constants below are one set for
all devices and models. `relative_errors` compares an estimate with a measured profile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from planner.core.devices import Device
from planner.core.profile import ALL_REDUCES_PER_LAYER, DegreeTimes, Profile, check_profile, divisors
from planner.errors import ProfileError

BATCH_SIZES: Final = (1, 2, 4, 8, 16, 32, 64)
MAX_TENSOR: Final = 64
MEMORY_FRACTION: Final = 0.8
"""Of the memory bandwidth that matrix-vector kernels reach."""
MATH_FRACTION: Final = 0.8
"""Of the arithmetic peak that large matrix products reach, beside what the board's power takes (`Device.sustained`)."""
KERNELS_PER_LAYER: Final = 12
KERNEL_MS: Final = 0.005
"""Launch and tail of one kernel, in which it neither reads nor computes at full rate."""
ELEMENTWISE_PASSES: Final = 8
"""Hidden vectors that norms, residuals and activations read or write for each token of a layer; not sharded."""
INTRA_MS: Final = 0.02
"""An all-reduce of few bytes inside an instance."""
INTER_MS: Final = 0.06
"""One crossing between two instances; an all-reduce crosses twice for each instance of its ring."""
INTER_FRACTION: Final = 0.8
"""Of the network's rate that many TCP streams, or RDMA, reach."""
DTYPE_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}
GATED_ACTIVATIONS: Final = ("silu", "swiglu", "geglu", "gelu_gated")
CONTEXT_TOKENS: Final = 512
"""Of a sequence in the decode times."""


class DecoderShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the times of a decoder depend on; sizes in elements."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    dtype: str
    num_mlp_matrices: int = 3
    """Gate, up and down; 2 where there is no gate."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str, dtype: str | None = None) -> DecoderShape:
        """Of a Hugging Face config.json; `name` is the source in errors, `dtype` overrides the config's.

        Raises ProfileError with the field that is missing or senseless.
        """
        hidden_size = _size(config, name, "hidden_size")
        num_heads = _size(config, name, "num_attention_heads")
        has_ffn_dim = "ffn_dim" in config  # OPT's name for it.
        chosen = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
        if chosen not in DTYPE_BYTES:
            raise ProfileError(name, "dtype", f"{chosen!r} is none of {', '.join(DTYPE_BYTES)}")
        is_gated = not has_ffn_dim and config.get("hidden_act", "silu") in GATED_ACTIVATIONS
        return cls(
            name=name,
            num_layers=_size(config, name, "num_hidden_layers"),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=_size(config, name, "num_key_value_heads", num_heads),
            head_dim=_size(config, name, "head_dim", max(1, hidden_size // num_heads)),
            intermediate_size=_size(config, name, "ffn_dim" if has_ffn_dim else "intermediate_size"),
            vocab_size=_size(config, name, "vocab_size"),
            dtype=chosen,
            num_mlp_matrices=3 if is_gated else 2,
        )

    @property
    def layer_weights(self) -> int:
        """Elements of the matrices of one layer."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.hidden_size * (attention + self.num_mlp_matrices * self.intermediate_size)

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]


def roofline_profile(shape: DecoderShape, device: Device, *, prompt_tokens: int = 512) -> Profile:
    """Raises ProfileError if the device does not compute in the model's dtype."""
    if shape.dtype not in device.flops_per_s:
        has = ", ".join(device.flops_per_s)
        raise ProfileError(shape.name, "dtype", f"{device.name} does not compute in {shape.dtype}, only in {has}")
    roof = _Roofline(shape, device, prompt_tokens)
    token_bytes = shape.hidden_size * shape.dtype_bytes
    profile = Profile(
        name=f"{shape.name} on {device.name} (estimated)",
        num_layers=shape.num_layers,
        degrees={tensor: roof.degree(tensor) for tensor in divisors(shape.num_kv_heads) if tensor <= MAX_TENSOR},
        head_batch_sizes=list(BATCH_SIZES),
        head_ms=[roof.head_ms(size, 1) for size in BATCH_SIZES],
        prompt_tokens=prompt_tokens,
        prefill_hop_ms=roof.hop_ms(prompt_tokens * token_bytes),
        decode_hop_ms=roof.hop_ms(token_bytes),
        context_layer_ms_per_token=roof.read_ms(2 * shape.num_kv_heads * shape.head_dim * shape.dtype_bytes),
        measured_context_tokens=CONTEXT_TOKENS,
        hidden_size=shape.hidden_size,
        transfer_bytes_per_s=INTER_FRACTION * device.inter_bytes_per_s,
    )
    check_profile(profile, profile.name)
    return profile


def relative_errors(estimated: Profile, measured: Profile) -> dict[tuple[str, int, int], float]:
    """(estimate - measurement) / measurement of a layer, by ("decode" or "prefill", tensor degree, batch size), for
    all that both profiles have.
    """
    errors = {}
    for tensor in estimated.degrees.keys() & measured.degrees.keys():
        guess, truth = estimated.degrees[tensor], measured.degrees[tensor]
        for size in set(guess.batch_sizes) & set(truth.batch_sizes):
            left, right = guess.batch_sizes.index(size), truth.batch_sizes.index(size)
            for kind in ("decode", "prefill"):
                value = getattr(truth, f"{kind}_layer_ms")[right]
                errors[kind, tensor, size] = getattr(guess, f"{kind}_layer_ms")[left] / value - 1
    return errors


class _Roofline:
    def __init__(self, shape: DecoderShape, device: Device, prompt_tokens: int) -> None:
        self._shape = shape
        self._device = device
        self._prompt_tokens = prompt_tokens
        self._flops_per_s = device.flops_per_s[shape.dtype] * device.sustained * MATH_FRACTION

    def degree(self, tensor: int) -> DegreeTimes:
        prompt = self._prompt_tokens
        return DegreeTimes(
            batch_sizes=list(BATCH_SIZES),
            decode_layer_ms=[self._layer_ms(size, 1, CONTEXT_TOKENS, tensor) for size in BATCH_SIZES],
            # Under a causal mask a prompt token sees half of its prompt.
            prefill_layer_ms=[self._layer_ms(size, prompt, prompt // 2, tensor) for size in BATCH_SIZES],
            head_ms=[self.head_ms(size, tensor) for size in BATCH_SIZES],
        )

    def _layer_ms(self, num_sequences: int, tokens_each: int, context_tokens: int, tensor: int) -> float:
        """`tokens_each` new tokens of each sequence, each of which sees `context_tokens`."""
        shape = self._shape
        num_tokens = num_sequences * tokens_each
        products_ms = self._roof_ms(shape.layer_weights / tensor, 2 * num_tokens * shape.layer_weights / tensor)
        kv = 2 * num_sequences * max(tokens_each, context_tokens) * shape.num_kv_heads * shape.head_dim / tensor
        attention = 4 * num_tokens * context_tokens * shape.num_heads * shape.head_dim / tensor
        elementwise_ms = self.read_ms(ELEMENTWISE_PASSES * num_tokens * shape.hidden_size * shape.dtype_bytes)
        reduce_ms = ALL_REDUCES_PER_LAYER * self._all_reduce_ms(num_tokens * shape.hidden_size, tensor)
        kernels_ms = KERNELS_PER_LAYER * KERNEL_MS
        return products_ms + self._roof_ms(kv, attention) + elementwise_ms + reduce_ms + kernels_ms

    def head_ms(self, num_sequences: int, tensor: int) -> float:
        """Embedding, head and sampling: the head's matrix, and the logits gathered from the shards."""
        shape = self._shape
        weights = shape.hidden_size * shape.vocab_size / tensor
        gather_ms = self._all_reduce_ms(num_sequences * shape.vocab_size / 2, tensor)  # It moves half of the bytes.
        return self._roof_ms(weights, 2 * num_sequences * weights) + gather_ms + 4 * KERNEL_MS

    def read_ms(self, num_bytes: float) -> float:
        return num_bytes / (MEMORY_FRACTION * self._device.memory_bytes_per_s) * 1000

    def hop_ms(self, num_bytes: float) -> float:
        """To a rank of another instance."""
        return INTER_MS + num_bytes / (INTER_FRACTION * self._device.inter_bytes_per_s) * 1000

    def _roof_ms(self, num_elements: float, flops: float) -> float:
        return max(self.read_ms(num_elements * self._shape.dtype_bytes), flops / self._flops_per_s * 1000)

    def _all_reduce_ms(self, num_elements: float, tensor: int) -> float:
        """A ring: every rank sends and receives 2 (n-1)/n of the bytes; the slowest link decides."""
        if tensor == 1:
            return 0.0
        device = self._device
        sent_bytes = 2 * (tensor - 1) / tensor * num_elements * self._shape.dtype_bytes
        intra_ms = INTRA_MS + sent_bytes / device.achieved_intra_bytes_per_s * 1000
        num_instances = math.ceil(tensor / device.ranks_per_instance)
        if num_instances == 1:
            return intra_ms
        inter_ms = sent_bytes / (INTER_FRACTION * device.inter_bytes_per_s) * 1000
        return max(intra_ms, 2 * num_instances * INTER_MS + inter_ms)


def _size(config: Mapping[str, Any], source: str, field: str, default: int | None = None) -> int:
    value = config.get(field)
    value = default if value is None else value
    if value is None:
        raise ProfileError(source, field, "is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ProfileError(source, field, f"{value!r} is not a positive integer")
    return value
