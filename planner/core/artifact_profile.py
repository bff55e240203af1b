"""Reads a profile as the artifact of the SpotServe paper ships it, the older schema included.

Its fields: `layer_num`; `padded_layer_num` (pipeline degrees divide it), `hidden_size` and `max_tp` (measured degrees
beyond it are not used), all three absent in the older schema; `final_fix_factor`; `pp_init_comm` and `pp_incr_comm`
(ms a stage boundary); `embed[i]` (ms at batch 2^i, spent once before and once after the layers); and "tp-M" -> "bsz-B"
-> `init` and `incr` (ms of one layer: prefill of 512-token prompts, one decode step).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from planner.core.profile import DegreeTimes, Profile, check_profile
from planner.errors import ProfileError

PROMPT_TOKENS: Final = 512
"""Stated by the artifact's scripts, not in its profiles."""
WEIGHTS_PER_SQUARE: Final = 12
"""Weights of a layer over the hidden size squared: q, k, v, output and an MLP of four times the hidden size."""


class _Fixed(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    layer_num: int
    final_fix_factor: float
    pp_init_comm: float
    pp_incr_comm: float
    embed: list[float]
    padded_layer_num: int | None = None
    hidden_size: int | None = None
    max_tp: int | None = None


class _Times(msgspec.Struct, frozen=True, kw_only=True):
    init: float
    incr: float


def is_artifact_profile(content: Mapping[str, Any]) -> bool:
    """Told by the fields that only the artifact has."""
    return "layer_num" in content or any(key.startswith("tp-") for key in content)


def read_artifact_profile(content: Mapping[str, Any], source: str) -> Profile:
    """Raises ProfileError, naming `source` and the field, for what is missing or senseless."""
    try:
        fixed = msgspec.convert(content, _Fixed)
    except msgspec.ValidationError as error:
        raise ProfileError(source, *field_and_reason(error)) from error
    degrees = {}
    for key, value in content.items():
        if key.startswith("tp-"):
            tensor = _number(source, key, key)
            if fixed.max_tp is None or tensor <= fixed.max_tp:
                degrees[tensor] = _degree(source, key, value)
    profile = Profile(
        name=fixed.name,
        num_layers=fixed.layer_num,
        degrees=dict(sorted(degrees.items())),
        head_batch_sizes=[1 << index for index in range(len(fixed.embed))],
        head_ms=[2 * embed_ms for embed_ms in fixed.embed],
        prompt_tokens=PROMPT_TOKENS,
        prefill_hop_ms=fixed.pp_init_comm,
        decode_hop_ms=fixed.pp_incr_comm,
        context_layer_ms_per_token=_context_ms(fixed, degrees),
        measured_context_tokens=PROMPT_TOKENS,
        fix_factor=fixed.final_fix_factor,
        padded_num_layers=fixed.padded_layer_num,
        hidden_size=fixed.hidden_size,
    )
    check_profile(profile, source)
    return profile


def field_and_reason(error: msgspec.ValidationError) -> tuple[str, str]:
    """Msgspec names the place behind the reason: "Expected `int`, got `str` - at `$.layer_num`"."""
    reason, _, place = str(error).partition(" - at ")
    return place.strip("`").removeprefix("$.") or "content", reason


def _degree(source: str, field: str, content: object) -> DegreeTimes:
    if not isinstance(content, dict):
        raise ProfileError(source, field, "is not an object of batch sizes")
    sizes = [(_number(source, f"{field}.{key}", key), f"{field}.{key}", value) for key, value in content.items()]
    by_size = {size: _times(source, place, value) for size, place, value in sorted(sizes, key=lambda entry: entry[0])}
    return DegreeTimes(
        batch_sizes=list(by_size),
        decode_layer_ms=[value.incr for value in by_size.values()],
        prefill_layer_ms=[value.init for value in by_size.values()],
    )


def _times(source: str, field: str, content: object) -> _Times:
    try:
        return msgspec.convert(content, _Times)
    except msgspec.ValidationError as error:
        place, reason = field_and_reason(error)
        raise ProfileError(source, field if place == "content" else f"{field}.{place}", reason) from error


def _number(source: str, field: str, key: str) -> int:
    """Of "tp-4" or "bsz-8"."""
    digits = key.partition("-")[2]
    if not digits.isdecimal():
        raise ProfileError(source, field, f"{key!r} does not end in a number")
    return int(digits)


def _context_ms(fixed: _Fixed, degrees: Mapping[int, DegreeTimes]) -> float:
    """K and V of a token are 2 h numbers of the same type as the weights, and are read as fast as those are in a step
    of one sequence. 0 where the hidden size or degree 1 is not known.
    """
    if not fixed.hidden_size or 1 not in degrees or not degrees[1].decode_layer_ms:
        return 0.0
    return degrees[1].decode_layer_ms[0] * 2 / (WEIGHTS_PER_SQUARE * fixed.hidden_size)
