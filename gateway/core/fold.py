"""A response as a fold over its token log: ids -> text -> stop strings -> deltas, finish reason, usage.

The same fold makes the stream and the whole answer. It works token by token, so the result depends on the log
alone and not on how the log was cut into frames. Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """What the fold needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` as one piece; special tokens are left out."""
        ...

    def is_special(self, token_id: int) -> bool: ...

    def is_byte(self, token_id: int) -> bool:
        """Whether the token stands for one raw byte: a run of these is decoded as a whole or not at all."""
        ...


class IncrementalText:
    """Token ids in, stable text out: the joined pieces equal `decode` of all ids.

    A window of ids is decoded at each step. It starts at a *seam*, a place where the text so far is final, and
    carries the ids before it as left context, because decoders treat the first token of a text differently:

        ids:   ....  [ context | open ]     text of open = decode(context + open) - decode(context)
    """

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._ids: list[int] = []
        self._context_start = 0
        self._open_start = 0
        self._context_text = ""
        self._num_open_emitted = 0
        self._pieces: list[str] = []

    def push(self, token_id: int) -> str:
        """The text that is final now and was not before."""
        if self._detokenizer.is_special(token_id):
            return ""
        self._ids.append(token_id)
        if self._detokenizer.is_byte(token_id):
            return ""
        window = self._detokenizer.decode(self._ids[self._context_start :])
        text = window[len(self._context_text) :]
        unfinished = text.endswith(REPLACEMENT)
        piece = text[self._num_open_emitted : len(text) - 1 if unfinished else None]
        if unfinished:
            self._num_open_emitted += len(piece)
        else:
            self._context_start, self._open_start = self._open_start, len(self._ids)
            self._context_text = self._detokenizer.decode(self._ids[self._context_start :])
            self._num_open_emitted = 0
        self._pieces.append(piece)
        return piece

    def finish(self) -> str:
        """What was held back."""
        text = self._detokenizer.decode(self._ids)
        piece = text[sum(map(len, self._pieces)) :]
        self._pieces.append(piece)
        return piece


class StopScanner:
    """Holds text back while it could be the start of a stop string.

    The first stop string to be complete wins; of several that end at the same character, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may go out, whether a stop string was found; it and what follows it are dropped)."""
        if not self._stops:
            return text, False
        buffer = self._held + text
        matches = [(buffer.find(stop), stop) for stop in self._stops]
        found = [(start + len(stop), start) for start, stop in matches if start >= 0]
        if found:
            self._held = ""
            return buffer[: min(found)[1]], True
        num_held = max(self._longest_start(buffer, stop) for stop in self._stops)
        self._held = buffer[len(buffer) - num_held :]
        return buffer[: len(buffer) - num_held], False

    def flush(self) -> str:
        """What was held back and is no stop string after all."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _longest_start(buffer: str, stop: str) -> int:
        """Characters at the end of `buffer` that `stop` begins with (not all of it)."""
        for length in range(min(len(stop) - 1, len(buffer)), 0, -1):
            if buffer.endswith(stop[:length]):
                return length
        return 0


class Delta(msgspec.Struct, frozen=True):
    """What one step of the log adds to the response of one choice."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None


class ChoiceFold:
    """The fold of one choice."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str] = ()) -> None:
        self._text = IncrementalText(detokenizer)
        self._scanner = StopScanner(stops)
        self.num_tokens = 0
        """Completion tokens: all up to the end, an end-of-sequence token or stop string included."""
        self.finish_reason: str | None = None

    def push(self, ids: Sequence[int], finish: str | None = None) -> Delta:
        """Fold the next ids of the log; `finish` is "stop" (the last id ends the text) or "length".

        After the choice has finished, what still comes is ignored.
        """
        pieces: list[str] = []
        used: list[int] = []
        for position, token_id in enumerate(ids):
            if self.finish_reason is not None:
                break
            used.append(token_id)
            if finish == "stop" and position == len(ids) - 1:
                break
            self._take(self._text.push(token_id), pieces)
        self.num_tokens += len(used)
        if finish is not None and self.finish_reason is None:
            self._take(self._text.finish(), pieces)
            if self.finish_reason is None:
                pieces.append(self._scanner.flush())
                self.finish_reason = finish
        elif not used:
            return Delta("", [])
        return Delta("".join(pieces), used, self.finish_reason)

    def _take(self, text: str, pieces: list[str]) -> None:
        if not text:
            return
        visible, stopped = self._scanner.push(text)
        pieces.append(visible)
        if stopped:
            self.finish_reason = "stop"
