"""Step times of one model on one device type, per layer: what the cost model computes with. All times in ms.

The schema, as JSON (`profile_json` reads and writes it; a field that has a default may be left out):

    {"name": "GPT-20B on T4",       what it is, in error messages
     "num_layers": 44,              decoder layers of the model
     "prompt_tokens": 512,          length of the prompts whose prefill was measured
     "degrees": {                   by tensor degree: times of one decoder layer on one rank of a tensor group, with
       "1": {                       its share of the all-reduces
         "batch_sizes": [1, 2, 4],  sequences of a step, ascending; the lists below have one time for each of them
         "decode_layer_ms": [...],  one token for each sequence
         "prefill_layer_ms": [...], the whole prompt of each sequence
         "head_ms": [...]}},        embedding, head and sampling of a step; left out: the same at each degree, below
     "head_batch_sizes": [1, 2, 4],
     "head_ms": [...],
     "prefill_hop_ms": 7.0,         one prompt's activations to the next stage
     "decode_hop_ms": 0.1,          a decode step's activations to the next stage
     "context_layer_ms_per_token": 0.0002, "measured_context_tokens": 512,
     "fix_factor": 1.0, "padded_num_layers": 48, "hidden_size": 6144, "transfer_bytes_per_s": 5e8}

The artifact's own JSON is read as well (`artifact_profile`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import msgspec

from planner.errors import ProfileError
from planner.protocol import ModelShape, StepProfile

ALL_REDUCES_PER_LAYER: Final = 2
"""One after attention, one after the MLP."""
CALIBRATED_TOKENS: Final = 64
"""Prompt and context of the engine's calibration."""


class DegreeTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One decoder layer on one rank of a tensor group; the lists go with `batch_sizes` (ascending)."""

    batch_sizes: list[int]
    decode_layer_ms: list[float]
    """One decode step of `batch_sizes[i]` sequences."""
    prefill_layer_ms: list[float]
    """The prompts of `batch_sizes[i]` sequences, `Profile.prompt_tokens` tokens each."""
    head_ms: list[float] | None = None
    """Embedding, output head and sampling at this degree; None: `Profile.head_ms`."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
    """Passing the activations of one prompt of `prompt_tokens` to the next stage."""
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
    transfer_bytes_per_s: float = 5e8
    """What one rank receives from another, where it was measured."""

    def of_degree(self, tensor: int) -> DegreeTimes:
        """Raises ProfileError if that tensor degree was not measured."""
        times = self.degrees.get(tensor)
        if times is None:
            has = ", ".join(str(degree) for degree in sorted(self.degrees))
            raise ProfileError(self.name, "degrees", f"tensor degree {tensor} was not measured, only {has}")
        return times

    @classmethod
    def from_steps(cls, steps: StepProfile, model: ModelShape) -> Profile:
        """The calibration of a running engine: degree 1 is measured, a higher one has its share of the work and pays
        for the all-reduces, whose time grows with the ranks that take part.

        Raises ProfileError, with the device as the source, if the calibration contradicts itself.
        """
        source = f"calibration on {steps.device}"
        _check_times(source, "decode_layer_ms", steps.batch_sizes, steps.decode_layer_ms)
        _check_times(source, "decode_head_ms", steps.batch_sizes, steps.decode_head_ms, may_be_zero=True)
        _check_positive(source, "transfer_bytes_per_s", steps.transfer_bytes_per_s)
        prompt_ms = model.hidden_bytes_per_token * CALIBRATED_TOKENS / steps.transfer_bytes_per_s * 1000
        profile = cls(
            name=f"{model.name} on {steps.device}",
            num_layers=model.num_layers,
            degrees={tensor: _shard(steps, tensor, prompt_ms) for tensor in divisors(model.num_head_groups)},
            head_batch_sizes=steps.batch_sizes,
            head_ms=steps.decode_head_ms,
            prompt_tokens=CALIBRATED_TOKENS,
            prefill_hop_ms=steps.stage_hop_ms + prompt_ms,
            decode_hop_ms=steps.stage_hop_ms,
            # KV is read as fast as weights are.
            context_layer_ms_per_token=steps.decode_layer_ms[0]
            * model.kv_unit_bytes_per_token
            / max(1, model.decoder_unit_bytes),
            measured_context_tokens=CALIBRATED_TOKENS,
            transfer_bytes_per_s=steps.transfer_bytes_per_s,
        )
        check_profile(profile, source)
        return profile


def check_profile(profile: Profile, source: str) -> None:
    """Raises ProfileError, naming `source` and the field, if `profile` contradicts itself."""
    if profile.num_layers < 1:
        raise ProfileError(source, "num_layers", f"{profile.num_layers} is not positive")
    if not profile.degrees:
        raise ProfileError(source, "degrees", "no tensor degree was measured")
    for tensor, times in profile.degrees.items():
        if tensor < 1:
            raise ProfileError(source, "degrees", f"{tensor} is not a tensor degree")
        field = f"degrees.{tensor}"
        _check_times(source, f"{field}.decode_layer_ms", times.batch_sizes, times.decode_layer_ms)
        _check_times(source, f"{field}.prefill_layer_ms", times.batch_sizes, times.prefill_layer_ms)
        if times.head_ms is not None:
            _check_times(source, f"{field}.head_ms", times.batch_sizes, times.head_ms, may_be_zero=True)
    _check_times(source, "head_ms", profile.head_batch_sizes, profile.head_ms, may_be_zero=True)
    for name in ("prompt_tokens", "fix_factor", "transfer_bytes_per_s", "padded_num_layers", "hidden_size"):
        value = getattr(profile, name)
        if value is not None:
            _check_positive(source, name, value)
    for name in ("prefill_hop_ms", "decode_hop_ms", "context_layer_ms_per_token", "measured_context_tokens"):
        if not 0 <= getattr(profile, name) < math.inf:
            raise ProfileError(source, name, f"{getattr(profile, name)} is negative or not a number")


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _shard(steps: StepProfile, tensor: int, prompt_ms: float) -> DegreeTimes:
    """`prompt_ms`: sending the activations of a calibrated prompt once."""
    # Measured on CPU: 1.2 ms among two ranks, 3 ms among three.
    reduce_ms = steps.all_reduce_ms * (tensor - 1)
    layer_reduce_ms = ALL_REDUCES_PER_LAYER * reduce_ms
    # A ring all-reduce sends and receives 2 (n-1)/n of the bytes.
    prefill_reduce_ms = ALL_REDUCES_PER_LAYER * prompt_ms * 2 * (tensor - 1) / tensor
    prompt_layer_ms = CALIBRATED_TOKENS * steps.prefill_layer_ms_per_token / tensor + prefill_reduce_ms
    return DegreeTimes(
        batch_sizes=steps.batch_sizes,
        decode_layer_ms=[layer_ms / tensor + layer_reduce_ms for layer_ms in steps.decode_layer_ms],
        prefill_layer_ms=[size * prompt_layer_ms + layer_reduce_ms for size in steps.batch_sizes],
        head_ms=[head_ms / tensor + reduce_ms for head_ms in steps.decode_head_ms],
    )


def _check_times(
    source: str, field: str, batch_sizes: Sequence[int], times_ms: Sequence[float], *, may_be_zero: bool = False
) -> None:
    if not batch_sizes or batch_sizes[0] < 1 or any(left >= right for left, right in pairwise(batch_sizes)):
        raise ProfileError(source, field, f"batch sizes {list(batch_sizes)} are not positive and ascending")
    if len(times_ms) != len(batch_sizes):
        raise ProfileError(source, field, f"{len(times_ms)} times for {len(batch_sizes)} batch sizes")
    for size, time_ms in zip(batch_sizes, times_ms, strict=True):
        if not (0 < time_ms < math.inf or (may_be_zero and time_ms == 0)):
            raise ProfileError(source, field, f"{time_ms} ms at batch size {size} is not a positive time")


def _check_positive(source: str, field: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ProfileError(source, field, f"{value} is not positive")
