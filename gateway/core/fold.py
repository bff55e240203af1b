"""A response as a fold over its token log: ids -> text -> stop strings -> deltas, finish reason, usage.

The same fold makes the stream and the whole answer. It works token by token, so the result depends on the log
alone and not on how the log was cut into frames. Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import msgspec

from engine.protocol import TokenLogprobs
from gateway.core.parsing import OutputParser, Parsed, ToolCallDelta, num_open

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

    def whole_text(self, token_id: int) -> str | None:
        """What the token adds to any text that ends with a whole character; None if that cannot be said of it alone."""
        ...


class IncrementalText:
    """Token ids in, stable text out: the joined pieces equal `decode` of all ids.

    A window of ids is decoded at each step. It starts at a *seam*, a place where the text so far is final, and
    carries the ids before it as left context, because decoders treat the first token of a text differently:

        ids:   ....  [ context | open ]     text of open = decode(context + open) - decode(context)

    Most tokens of most tokenizers need no window: at a seam they add their own text, whatever was before.
    """

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._ids: list[int] = []
        self._context_start = 0
        self._open_start = 0
        self._context_text = ""
        self._num_open_emitted = 0
        self._num_emitted = 0
        self._ends_whole = True
        """The last token was whole by itself, so nothing is held back."""

    def push(self, token_id: int) -> str:
        """The text that is final now and was not before."""
        if self._open_start == len(self._ids):
            whole = self._detokenizer.whole_text(token_id)
            if whole == "":
                return ""  # and no context for what follows, which may depend on the last visible token
            if whole is not None:
                self._ids.append(token_id)
                self._context_start, self._open_start = self._open_start, len(self._ids)
                self._context_text = whole
                self._num_emitted += len(whole)
                self._ends_whole = True
                return whole
        return self._push_open(token_id)

    def _push_open(self, token_id: int) -> str:
        if self._detokenizer.is_special(token_id):
            return ""
        self._ends_whole = False
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
        self._num_emitted += len(piece)
        return piece

    def finish(self) -> str:
        """What was held back."""
        if self._ends_whole:
            return ""
        piece = self._detokenizer.decode(self._ids)[self._num_emitted :]
        self._num_emitted += len(piece)
        return piece


class StopScanner:
    """Holds text back while it could be the start of a stop string.

    The first stop string to be complete wins; of several that end at the same character, the longest.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = [stop for stop in stops if stop]
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may go out, whether a stop string was found; what follows it, and mostly itself, is dropped)."""
        if not self._stops:
            return text, False
        buffer = self._held + text
        matches = [(buffer.find(stop), stop) for stop in self._stops]
        found = [(start + len(stop), start) for start, stop in matches if start >= 0]
        if found:
            self._held = ""
            end, start = min(found)
            return buffer[: end if self._include_stop else start], True
        num_held = max(num_open(buffer, stop) for stop in self._stops)
        self._held = buffer[len(buffer) - num_held :]
        return buffer[: len(buffer) - num_held], False

    def flush(self) -> str:
        """What was held back and is no stop string after all."""
        text, self._held = self._held, ""
        return text


class TokenScore(msgspec.Struct, frozen=True):
    """The logprobs of one token of the text, and where in the generated text it begins."""

    token_id: int
    offset_chars: int
    logprobs: TokenLogprobs


class Delta(msgspec.Struct, frozen=True):
    """What one step of the log adds to the response of one choice."""

    text: str
    """Of the message: without reasoning and tool calls, where a parser takes them out."""
    token_ids: list[int]
    finish_reason: str | None = None
    scores: list[TokenScore] = []
    """Of the tokens whose text is out, if logprobs were asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Of the prompt's tokens, once, if they were asked for."""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


def merge(deltas: Sequence[Delta]) -> Delta:
    """All deltas of a choice as one: its whole answer, with one delta a tool call."""
    calls: dict[int, ToolCallDelta] = {}
    for call in (call for delta in deltas for call in delta.tool_calls):
        known = calls.get(call.index, ToolCallDelta(call.index, call.id, call.name))
        calls[call.index] = msgspec.structs.replace(known, arguments=known.arguments + call.arguments)
    return Delta(
        "".join(delta.text for delta in deltas),
        [token_id for delta in deltas for token_id in delta.token_ids],
        next((delta.finish_reason for delta in reversed(deltas) if delta.finish_reason is not None), None),
        [score for delta in deltas for score in delta.scores],
        next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None),
        "".join(delta.reasoning for delta in deltas),
        tuple(calls.values()),
    )


class ChoiceFold:
    """The fold of one choice: `stops` end it, `parser` takes reasoning and tool calls out of its text."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        parser: OutputParser | None = None,
    ) -> None:
        self._text = IncrementalText(detokenizer)
        self._scanner = StopScanner(stops, include_stop=include_stop)
        self._parser = parser
        self.can_end_early = any(stops)
        """Its text may end it before the engine does."""
        self._is_plain = parser is None and not self.can_end_early
        self._has_calls = False
        self._pending_scores: deque[TokenScore] = deque()
        self._num_chars = 0
        """Of the text so far, that held back included."""
        self._num_visible_chars = 0
        """Of the text that the stop scanner has let pass."""
        self.num_tokens = 0
        """Completion tokens: all up to the end, an end-of-sequence token or stop string included."""
        self.num_reasoning_tokens = 0
        self.sum_logprob = 0.0
        """Of all these tokens, if logprobs were asked for."""
        self.finish_reason: str | None = None

    def push(
        self,
        ids: Sequence[int],
        finish: str | None = None,
        logprobs: Sequence[TokenLogprobs] | None = None,
        prompt_logprobs: list[TokenLogprobs | None] | None = None,
    ) -> Delta:
        """Fold the next ids of the log; `finish` is "stop" (the last id ends the text) or "length".

        After the choice has finished, what still comes is ignored.
        """
        if self._has_finished():
            return Delta("", [])
        if self._is_plain and finish is None and logprobs is None and prompt_logprobs is None:
            return self._push_plain(ids)
        if self._parser is not None and len(ids) > 1:
            return self._push_each(ids, finish, logprobs, prompt_logprobs)
        pieces: list[str] = []
        used: list[int] = []
        for position, token_id in enumerate(ids):
            if self._has_finished():
                break
            used.append(token_id)
            ends = finish == "stop" and position == len(ids) - 1
            if logprobs is not None:
                self.sum_logprob += logprobs[position].logprob
                if not ends:
                    self._pending_scores.append(TokenScore(token_id, self._num_chars, logprobs[position]))
            if not ends:
                self._take(self._text.push(token_id), pieces)
        self.num_tokens += len(used)
        if finish is not None and not self._has_finished():
            self._take(self._text.finish(), pieces)
        ends_by_itself = finish is not None and not self._has_finished()
        if ends_by_itself:
            pieces.append(self._scanner.flush())
            self.finish_reason = finish
        visible = "".join(pieces)
        self._num_visible_chars += len(visible)
        parsed = self._parse(visible)
        self.num_reasoning_tokens += len(used) if parsed.reasoning and not parsed.content else 0
        return Delta(
            parsed.content,
            used,
            self.finish_reason,
            self._scores(everything=ends_by_itself),
            prompt_logprobs,
            parsed.reasoning,
            parsed.tool_calls,
        )

    def _push_plain(self, ids: Sequence[int]) -> Delta:
        """What most tokens of most requests need, and no more."""
        text = self._text.push(ids[0]) if len(ids) == 1 else "".join(map(self._text.push, ids))
        self.num_tokens += len(ids)
        self._num_chars += len(text)
        self._num_visible_chars += len(text)
        return Delta(text, list(ids))

    def _push_each(
        self,
        ids: Sequence[int],
        finish: str | None,
        logprobs: Sequence[TokenLogprobs] | None,
        prompt_logprobs: list[TokenLogprobs | None] | None,
    ) -> Delta:
        """Token by token: which tokens are reasoning must not depend on the frames."""
        last = len(ids) - 1
        return merge(
            [
                self.push(
                    [token_id],
                    finish if position == last else None,
                    logprobs[position : position + 1] if logprobs is not None else None,
                    prompt_logprobs if position == 0 else None,
                )
                for position, token_id in enumerate(ids)
            ]
        )

    def _has_finished(self) -> bool:
        return self.finish_reason is not None

    def _take(self, text: str, pieces: list[str]) -> None:
        if not text:
            return
        self._num_chars += len(text)
        visible, stopped = self._scanner.push(text)
        pieces.append(visible)
        if stopped:
            self.finish_reason = "stop"

    def _scores(self, *, everything: bool) -> list[TokenScore]:
        """Of the tokens that begin in the visible text: a stop string takes its tokens with it."""
        pending, found = self._pending_scores, []
        while pending and (everything or pending[0].offset_chars < self._num_visible_chars):
            found.append(pending.popleft())
        return found

    def _parse(self, visible: str) -> Parsed:
        if self._parser is None:
            return Parsed(visible)
        parsed = self._parser.push(visible)
        if self.finish_reason is not None:
            rest = self._parser.finish()
            parsed = Parsed(
                parsed.content + rest.content,
                parsed.reasoning + rest.reasoning,
                parsed.tool_calls + rest.tool_calls,
            )
        self._has_calls = self._has_calls or bool(parsed.tool_calls)
        # A call that a stop string cut is not one to be carried out.
        if self._has_calls and self.finish_reason == "stop" and not self._parser.is_in_call:
            self.finish_reason = "tool_calls"
        return parsed
