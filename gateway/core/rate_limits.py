"""Rates and budgets of API keys, as token buckets. Pure.

A bucket holds a minute's worth and fills evenly. A request takes one from the bucket of requests, and its prompt from
the bucket of tokens when it is admitted; its answer when it has ended, even if that leaves a debt: the next request
waits until it is paid. What other gateways have let through is taken from the buckets here as soon as they tell.
"""

from __future__ import annotations

import math
from http import HTTPStatus

from gateway.errors import ApiError
from gateway.protocol import KeyRecord, KeyUsage

_PERIOD_S = 60.0
_MAX_RETRY_AFTER_S = 60


class TokenBucket:
    """`limit` a minute."""

    def __init__(self, limit: int, now_s: float) -> None:
        self.limit = limit
        self._level = float(limit)
        self._at_s = now_s

    def level(self, now_s: float) -> float:
        """What may be taken; negative: a debt."""
        self._level = min(self.limit, self._level + max(0.0, now_s - self._at_s) * self.limit / _PERIOD_S)
        self._at_s = max(self._at_s, now_s)
        return self._level

    def take(self, amount: float, now_s: float) -> None:
        self._level = self.level(now_s) - amount

    def wait_s(self, amount: float, now_s: float) -> float:
        """Until `amount` may be taken: more than the limit never can, so that a full bucket is enough for it."""
        return max(0.0, min(amount, self.limit) - self.level(now_s)) * _PERIOD_S / self.limit


class _Meter:
    """What one key has used of its limits."""

    def __init__(self, key: KeyRecord, now_s: float) -> None:
        self.requests = TokenBucket(key.requests_per_minute, now_s) if key.requests_per_minute else None
        self.tokens = TokenBucket(key.tokens_per_minute, now_s) if key.tokens_per_minute else None
        self.limits = (key.requests_per_minute, key.tokens_per_minute)


class RateLimits:
    """The meters of all keys at one gateway."""

    def __init__(self, gateway: str) -> None:
        self._gateway = gateway
        self._meters: dict[str, _Meter] = {}
        self._own_requests: dict[str, int] = {}
        self._own_tokens: dict[str, int] = {}
        self._others: dict[str, KeyUsage] = {}

    def check(self, key: KeyRecord, prompt_tokens: int, now_s: float) -> None:
        """Raises ApiError (429) if a request may not run now."""
        meter = self._meter(key, now_s)
        if key.budget_tokens is not None and self.used_tokens(key.id) >= key.budget_tokens:
            raise _refused(
                key, f"its budget of {key.budget_tokens} tokens is used up", "insufficient_quota", _MAX_RETRY_AFTER_S
            )
        for what, bucket, amount in (("requests", meter.requests, 1), ("tokens", meter.tokens, prompt_tokens)):
            wait_s = bucket.wait_s(amount, now_s) if bucket is not None else 0.0
            if bucket is not None and wait_s > 0:
                raise _refused(key, f"it may use {bucket.limit} {what} a minute", "rate_limit_exceeded", wait_s)

    def admitted(self, key: KeyRecord, prompt_tokens: int, now_s: float) -> None:
        """A request has been taken in."""
        meter = self._meter(key, now_s)
        if meter.requests is not None:
            meter.requests.take(1, now_s)
        self._own_requests[key.id] = self._own_requests.get(key.id, 0) + 1
        self.count_tokens(key, prompt_tokens, now_s)

    def count_tokens(self, key: KeyRecord, num_tokens: int, now_s: float) -> None:
        """`key` has used them."""
        meter = self._meter(key, now_s)
        if meter.tokens is not None:
            meter.tokens.take(num_tokens, now_s)
        self._own_tokens[key.id] = self._own_tokens.get(key.id, 0) + num_tokens

    def used_tokens(self, key_id: str) -> int:
        """At all gateways."""
        return self._own_tokens.get(key_id, 0) + sum(usage.tokens.get(key_id, 0) for usage in self._others.values())

    def usage(self) -> KeyUsage:
        """What this gateway has counted."""
        return KeyUsage(gateway=self._gateway, requests=dict(self._own_requests), tokens=dict(self._own_tokens))

    def observe(self, usage: KeyUsage, now_s: float, *, past: bool) -> None:
        """Another gateway's count, or this one's before it was restarted; `past`: none of it is of this minute."""
        if usage.gateway == self._gateway:
            if past:
                self._own_requests = _sum(self._own_requests, usage.requests)
                self._own_tokens = _sum(self._own_tokens, usage.tokens)
            return
        before = self._others.get(usage.gateway, KeyUsage(gateway=usage.gateway))
        self._others[usage.gateway] = usage
        if past:
            return
        for id_, meter in self._meters.items():
            if meter.requests is not None:
                meter.requests.take(max(0, usage.requests.get(id_, 0) - before.requests.get(id_, 0)), now_s)
            if meter.tokens is not None:
                meter.tokens.take(max(0, usage.tokens.get(id_, 0) - before.tokens.get(id_, 0)), now_s)

    def headers(self, key: KeyRecord, now_s: float) -> dict[str, str]:
        """`x-ratelimit-*`, as OpenAI names them."""
        meter = self._meter(key, now_s)
        headers = {}
        for what, bucket in (("requests", meter.requests), ("tokens", meter.tokens)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{what}"] = str(bucket.limit)
                headers[f"x-ratelimit-remaining-{what}"] = str(max(0, math.floor(bucket.level(now_s))))
                headers[f"x-ratelimit-reset-{what}"] = f"{bucket.wait_s(bucket.limit, now_s):.3f}s"
        return headers

    def _meter(self, key: KeyRecord, now_s: float) -> _Meter:
        meter = self._meters.get(key.id)
        if meter is None or meter.limits != (key.requests_per_minute, key.tokens_per_minute):
            meter = self._meters[key.id] = _Meter(key, now_s)
        return meter


def _sum(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in one.keys() | other.keys()}


def _refused(key: KeyRecord, why: str, code: str, wait_s: float) -> ApiError:
    retry_after_s = max(1, min(_MAX_RETRY_AFTER_S, math.ceil(wait_s)))
    return ApiError(
        HTTPStatus.TOO_MANY_REQUESTS,
        f"The limit of API key {key.id} is reached: {why}. Retry in {retry_after_s} s.",
        kind="rate_limit_error",
        code=code,
        retry_after_s=retry_after_s,
        headers={"x-should-retry": "false"} if code == "insufficient_quota" else {},
    )
