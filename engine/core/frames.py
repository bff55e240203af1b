"""Token log entries in frames that a message can carry."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from engine.protocol import TokenEntry, TokenLogprobs

MAX_VALUES: Final = 50_000
"""Ids and logprobs of a message: at most 14 bytes for an id with its logprob, and NATS takes 1 MiB."""


def in_frames(entries: Iterable[TokenEntry]) -> list[list[TokenEntry]]:
    """The entries in order, cut where a frame would hold more than MAX_VALUES."""
    frames: list[list[TokenEntry]] = []
    num_left = 0
    for entry in entries:
        num = _num_values(entry)
        if not frames or num > num_left:
            frames.append([])
            num_left = MAX_VALUES
        frames[-1].append(entry)
        num_left -= num
    return frames


def shortened(entry: TokenEntry) -> TokenEntry:
    """The entry, or if it is too large for a message, as many of its tokens as fit; one at least."""
    if entry.logprobs is None or _num_values(entry) <= MAX_VALUES:
        return entry
    num_left = MAX_VALUES - _num_logprobs(entry.prompt_logprobs or [])
    num_tokens = 0
    for token in entry.logprobs:
        num_left -= 2 + len(token.top_ids)
        if num_tokens and num_left < 0:
            break
        num_tokens += 1
    if num_tokens == len(entry.ids):
        return entry
    return msgspec.structs.replace(
        entry,
        ids=entry.ids[:num_tokens],
        logprobs=entry.logprobs[:num_tokens],
        finish=None,
        error=None,
        interruption=None,
    )


def _num_values(entry: TokenEntry) -> int:
    return len(entry.ids) + _num_logprobs(entry.logprobs or []) + _num_logprobs(entry.prompt_logprobs or [])


def _num_logprobs(logprobs: Iterable[TokenLogprobs | None]) -> int:
    return sum(1 + len(one.top_ids) for one in logprobs if one is not None)
