"""Rotary position embedding: the inverse frequencies of the scaling variants that config.json can name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from engine.errors import InvalidModelConfig, UnsupportedModel

KINDS: Final = ("default", "linear", "dynamic", "llama3", "yarn")


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """One `rope_scaling` (or `rope_parameters`) of config.json; fields that a kind does not know are ignored."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    """Multiplies cosine and sine."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], max_positions: int) -> RopeScaling:
        """Read `rope_parameters`, or `rope_theta` with `rope_scaling`. Raises UnsupportedModel, InvalidModelConfig."""
        given: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in KINDS:
            raise UnsupportedModel("rope_scaling.rope_type", kind, f"one of {', '.join(KINDS)}")
        if given.get("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModel("partial_rotary_factor", given["partial_rotary_factor"], "1.0")
        theta = float(given.get("rope_theta", config.get("rope_theta", 10000.0)))
        if kind == "default":
            return cls(theta=theta)
        required = ["factor"]
        if kind == "llama3":
            required += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
        for field in required:
            if not isinstance(given.get(field), int | float):
                raise InvalidModelConfig(f"rope_scaling.{field}", f"{given.get(field)!r} is not a number")
        return cls(
            kind=kind,
            theta=theta,
            factor=float(given["factor"]),
            original_max_positions=int(given.get("original_max_position_embeddings") or max_positions),
            low_freq_factor=float(given.get("low_freq_factor") or 1.0),
            high_freq_factor=float(given.get("high_freq_factor") or 4.0),
            attention_factor=_attention_factor(given) if kind == "yarn" else 1.0,
            beta_fast=float(given.get("beta_fast") or 32.0),
            beta_slow=float(given.get("beta_slow") or 1.0),
            truncate=bool(given.get("truncate", True)),
        )

    def inverse_frequencies(self, head_dim: int) -> list[float]:
        """[head_dim / 2], radians a position.

        `dynamic` grows its base only for sequences beyond max_position_embeddings, which are refused elsewhere.
        """
        plain = [self.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
        if self.kind == "linear":
            return [frequency / self.factor for frequency in plain]
        if self.kind == "llama3":
            return [self._llama3(frequency) for frequency in plain]
        if self.kind == "yarn":
            return self._yarn(plain, head_dim)
        return plain

    def _llama3(self, frequency: float) -> float:
        turns = self.original_max_positions * frequency / (2 * math.pi)
        if turns < self.low_freq_factor:
            return frequency / self.factor
        if turns > self.high_freq_factor:
            return frequency
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return (1 - smooth) * frequency / self.factor + smooth * frequency

    def _yarn(self, plain: list[float], head_dim: int) -> list[float]:
        low, high = self._yarn_dimension(self.beta_fast, head_dim), self._yarn_dimension(self.beta_slow, head_dim)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        span = high - low or 0.001
        ramp = [min(max((i - low) / span, 0.0), 1.0) for i in range(len(plain))]
        return [
            frequency * (1 - part) + frequency / self.factor * part for frequency, part in zip(plain, ramp, strict=True)
        ]

    def _yarn_dimension(self, num_turns: float, head_dim: int) -> float:
        """The dimension that turns `num_turns` times over the original context."""
        wavelength = self.original_max_positions / (num_turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(self.theta))


def _attention_factor(given: Mapping[str, Any]) -> float:
    """Of yarn. A model may give it, or derive it from `mscale` and `mscale_all_dim`."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    factor = float(given["factor"])
    if given.get("mscale") and given.get("mscale_all_dim"):
        return _mscale(factor, float(given["mscale"])) / _mscale(factor, float(given["mscale_all_dim"]))
    return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
