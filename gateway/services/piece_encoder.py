"""Text to token ids, with the pieces between special tokens remembered: most of a chat's prompt has been seen before.

A chat template sets special tokens between the messages, so that system prompt, tools and all earlier turns come again,
piece by piece, with each request of a conversation. A tokenizer splits a text at its special tokens before it does
anything else; with most byte-level tokenizers each piece is then tokenized as if it stood alone.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from tokenizers import Tokenizer

_MAX_PIECES: Final = 2048
_MAX_PIECE_CHARS: Final = 4096
"""Longer ones are not remembered: all together take some tens of megabytes at most."""
_PIECEWISE_NORMALIZERS: Final = ("NFC", "NFD", "NFKC", "NFKD")
_PIECEWISE_PRE_TOKENIZERS: Final = ("Digits", "Split", "ByteLevel")


class PieceEncoder:
    """Gives what `tokenizer.encode` gives, without the tokens that it adds by itself."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, int] = {}
        if _is_piecewise(json.loads(tokenizer.to_str())):
            self._ids = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
        # The tokenizer takes the longest of several that begin at the same place.
        marks = sorted(filter(None, self._ids), key=len, reverse=True)
        self._marks = re.compile("(" + "|".join(map(re.escape, marks)) + ")") if marks else None
        self._remembered = lru_cache(_MAX_PIECES)(self._encode)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        if self._marks is None:
            return list(self._encode(text))
        ids: list[int] = []
        for number, piece in enumerate(self._marks.split(text)):
            if number % 2:
                ids.append(self._ids[piece])
            elif piece:
                ids += self._remembered(piece) if len(piece) <= _MAX_PIECE_CHARS else self._encode(piece)
        return ids

    def _encode(self, piece: str) -> array[int]:
        return array("I", self._tokenizer.encode(piece, add_special_tokens=False).ids)


def _is_piecewise(tokenizer: Mapping[str, Any]) -> bool:
    """Whether what is between two added tokens is tokenized as if it stood alone (`tokenizer`: tokenizer.json)."""
    normalizer, pre_tokenizer = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", []) if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    return (
        (normalizer is None or normalizer.get("type") in _PIECEWISE_NORMALIZERS)
        and all(step.get("type") in _PIECEWISE_PRE_TOKENIZERS and not step.get("add_prefix_space") for step in steps)
        and not any(
            token.get(flag)
            for token in tokenizer.get("added_tokens", [])
            for flag in ("single_word", "lstrip", "rstrip", "normalized")
        )
    )
