"""Requests that are drawn: arrivals and lengths. The same generator state gives the same requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import numpy as np

from loadtest.simulator.scenario import Request

MINUTE_S = 60.0


def poisson(rate_per_s: float, end_s: float, rng: np.random.Generator) -> list[float]:
    """Arrival times in [0, end_s): independent, gaps with a coefficient of variation of 1.

    Raises ValueError for a negative rate.
    """
    return gamma(rate_per_s, 1.0, end_s, rng)


def gamma(rate_per_s: float, cv: float, end_s: float, rng: np.random.Generator) -> list[float]:
    """Arrival times in [0, end_s) with Gamma-distributed gaps of mean 1 / `rate_per_s`.

    `cv` is the coefficient of variation that the gaps have: shape 1 / cv^2, scale cv^2 * mean. (The SpotServe
    artifact's "CV" is the scale in ms; its gaps have a coefficient of variation below 0.11.) 0: evenly spaced.
    Raises ValueError for a negative rate or cv.
    """
    if rate_per_s < 0 or not math.isfinite(rate_per_s):
        raise ValueError(f"rate_per_s: {rate_per_s} is negative, or not a number")
    if cv < 0 or not math.isfinite(cv):
        raise ValueError(f"cv: {cv} is negative, or not a number")
    if rate_per_s == 0:
        return []
    mean_s = 1 / rate_per_s
    if cv == 0:
        return _until(end_s, lambda: mean_s)
    shape, scale = 1 / cv**2, cv**2 * mean_s
    return _until(end_s, lambda: float(rng.gamma(shape, scale)))


def per_minute(rates_per_s: Sequence[float], rng: np.random.Generator, *, scale: float = 1.0) -> list[float]:
    """Arrival times of a Poisson process whose rate is `scale * rates_per_s[i]` in minute i.

    Raises ValueError for a negative rate.
    """
    arrivals_s = []
    for minute, rate_per_s in enumerate(rates_per_s):
        # A Poisson process has no memory: each minute begins anew.
        arrivals_s += [minute * MINUTE_S + at_s for at_s in poisson(rate_per_s * scale, MINUTE_S, rng)]
    return arrivals_s


def _until(end_s: float, gap_s: Callable[[], float]) -> list[float]:
    arrivals_s: list[float] = []
    at_s = gap_s()
    while at_s < end_s:
        arrivals_s.append(at_s)
        at_s += gap_s()
    return arrivals_s


class Lengths(Protocol):
    """How many tokens a prompt or an output has."""

    def draw(self, rng: np.random.Generator) -> int: ...


class Fixed(msgspec.Struct, frozen=True):
    """Raises ValueError unless `num_tokens` is positive."""

    num_tokens: int

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens: {self.num_tokens} is not positive")

    def draw(self, rng: np.random.Generator) -> int:
        return self.num_tokens


class LogNormal(msgspec.Struct, frozen=True, kw_only=True):
    """With this mean and coefficient of variation before values are rounded and cut to 1 .. `maximum`.

    Raises ValueError for a mean below 1 or a negative cv.
    """

    mean: float
    cv: float
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.mean < math.inf:
            raise ValueError(f"mean: {self.mean} is below 1, or not a number")
        if not 0 <= self.cv < math.inf:
            raise ValueError(f"cv: {self.cv} is negative, or not a number")
        if self.maximum < 1:
            raise ValueError(f"maximum: {self.maximum} is below 1")

    def draw(self, rng: np.random.Generator) -> int:
        sigma = math.sqrt(math.log1p(self.cv**2))
        value = rng.lognormal(math.log(self.mean) - sigma**2 / 2, sigma)
        return int(min(max(1, round(value)), self.maximum))


def make_requests(
    arrivals_s: Sequence[float], prompts: Lengths, outputs: Lengths, rng: np.random.Generator
) -> tuple[Request, ...]:
    """One request for each arrival, numbered from 0."""
    return tuple(
        Request(id=number, arrival_s=at_s, prompt_tokens=prompts.draw(rng), output_tokens=outputs.draw(rng))
        for number, at_s in enumerate(arrivals_s)
    )
