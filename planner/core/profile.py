"""Step times of one model on one device type, per layer: what the cost model computes with. All times in ms."""

from __future__ import annotations

import msgspec


class DegreeTimes(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder layer on one rank of a tensor group; the lists go with `batch_sizes` (ascending)."""

    batch_sizes: list[int]
    decode_layer_ms: list[float]
    """One decode step of `batch_sizes[i]` sequences."""
    prefill_layer_ms: list[float]
    """The prompts of `batch_sizes[i]` sequences, `Profile.prompt_tokens` tokens each."""


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    num_layers: int
    degrees: dict[int, DegreeTimes]
    """By tensor degree."""
    head_batch_sizes: list[int]
    head_ms: list[float]
    """Embedding, output head and sampling of a step of `head_batch_sizes[i]` sequences."""
    prompt_tokens: int = 512
    """Length of the prompts that were measured."""
    prefill_hop_ms: float = 0.0
    """Passing the activations of one prefill batch to the next stage."""
    decode_hop_ms: float = 0.0
    context_layer_ms_per_token: float = 0.0
    """What each token of context of each sequence adds to a decode step of a layer, at tensor degree 1, beyond
    the context that was measured."""
    measured_context_tokens: int = 512
    fix_factor: float = 1.0
    """The artifact's multiplier on the whole latency."""
    padded_num_layers: int | None = None
    """The artifact's: its pipeline degrees divide this number."""
    hidden_size: int | None = None
