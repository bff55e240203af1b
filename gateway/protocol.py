"""The file of API keys: what `spotserve keys` writes and every gateway reads. Imports msgspec and the standard library.

A key is `sk-<id>-<secret>`. The file keeps the id and a salted hash of the secret, so that it gives no key away. One
round of SHA-256 is enough: a secret is 256 random bits, not a password, so that there is nothing to guess for which a
slow hash would help, and a fast one keeps the check out of a request's way.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re

import msgspec

KEY_PATTERN = re.compile(r"sk-([0-9a-f]{8})-([A-Za-z0-9_-]{20,200})")


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One key. Limits: None is none."""

    id: str
    """8 hexadecimal digits; stands in logs and traces."""
    name: str = ""
    salt: str
    """Hexadecimal."""
    sha256: str
    """Of salt and secret, hexadecimal."""
    created_s: float = 0.0
    expires_s: float | None = None
    """Unix seconds."""
    models: list[str] | None = None
    """Names of the models that it may use."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and answer."""
    budget_tokens: int | None = None
    """In all, prompt and answer."""
    priority_class: int = 0
    """Lower goes first."""

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{8}", self.id):
            raise ValueError(f"id {self.id[:20]!r} must be 8 hexadecimal digits")
        for name, digits in (("salt", r"(?:[0-9a-f]{2})+"), ("sha256", "[0-9a-f]{64}")):
            if not re.fullmatch(digits, getattr(self, name)):
                raise ValueError(f"{name} of key {self.id} must be hexadecimal digits")
        for name in ("requests_per_minute", "tokens_per_minute", "budget_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} of key {self.id} must be 1 or more, not {value}")

    def matches(self, secret: str) -> bool:
        """Whether this is the key's secret; takes the same time wherever they differ."""
        return hmac.compare_digest(hash_secret(self.salt, secret), self.sha256)


class KeyFile(msgspec.Struct, frozen=True, kw_only=True):
    """The file, as JSON."""

    keys: list[KeyRecord] = []

    def __post_init__(self) -> None:
        ids = [key.id for key in self.keys]
        twice = next((id_ for id_ in ids if ids.count(id_) > 1), None)
        if twice is not None:
            raise ValueError(f"key {twice} stands there twice")


class KeyUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What one gateway has counted since it first ran; kept in the bucket `key_usage_bucket`, by gateway."""

    gateway: str
    requests: dict[str, int] = {}
    """By key id."""
    tokens: dict[str, int] = {}


def hash_secret(salt: str, secret: str) -> str:
    """Hexadecimal SHA-256 of the salt's bytes and the secret."""
    return hashlib.sha256(bytes.fromhex(salt) + secret.encode()).hexdigest()


def key_usage_bucket(model: str) -> str:
    """The JetStream KV bucket where gateways tell each other what keys have used."""
    return f"spotserve-{model}-key-usage"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`: on any other address API keys are required."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
