"""Calls taken out of the text of a model, whatever marks them. Pure."""

from __future__ import annotations

import hashlib

from gateway.core.parsing import Parsed, ToolCallDelta, num_open
from gateway.core.tools.call_scanner import CallScanner, State


class CallParser:
    """An `OutputParser`: text up to `begin` is content, then come calls as JSON objects, up to `end`.

    `begin` empty: an answer that starts with a brace is calls from its first character on. `end` empty: the calls
    go on to the end of the text. Between calls stand white space, commas, semicolons and brackets. What looks like a
    call and is none stays content.
    """

    def __init__(
        self,
        names: frozenset[str],
        *,
        begin: str,
        end: str = "",
        lead: str = "",
        max_calls: int,
        id_seed: str,
        visible_special_tokens: frozenset[str] = frozenset(),
    ) -> None:
        """`lead` may stand before the first brace and is dropped; ids of calls are a function of `id_seed`."""
        self._names = names
        self._begin, self._end, self._lead = begin, end, lead
        self._max_calls = max_calls
        self._id_seed = id_seed
        self._visible_special_tokens = visible_special_tokens
        self._held = ""
        """Not decided yet."""
        self._raw = ""
        """Of the calls since `begin`, as long as none is announced: they may turn out to be content."""
        self._scanner: CallScanner | None = None
        self._in_calls = False
        self._is_text = False
        """Without `begin`: the answer did not start as a call."""
        self._is_dropping = False
        """What followed a call was none: nothing counts up to the end mark."""
        self._num_calls = 0
        self._index: int | None = None
        """Of the call that is being read; None: it is not announced, or one too many."""

    @property
    def visible_special_tokens(self) -> frozenset[str]:
        return self._visible_special_tokens

    @property
    def is_in_call(self) -> bool:
        return self._index is not None

    def push(self, text: str) -> Parsed:
        """See `OutputParser`."""
        self._held += text
        content: list[str] = []
        calls: list[ToolCallDelta] = []
        while self._step(content, calls):
            pass
        return Parsed("".join(content), tool_calls=tuple(calls))

    def finish(self) -> Parsed:
        """See `OutputParser`."""
        parsed = self.push("")
        unread = self._scanner.text if self._scanner is not None else ""
        # After a call, only its end mark or white space can be missing.
        rest = "" if self._num_calls and (self._in_calls or self._held.isspace()) else self._raw + unread + self._held
        self._held, self._raw, self._scanner = "", "", None
        return Parsed(parsed.content + rest, tool_calls=parsed.tool_calls)

    def _step(self, content: list[str], calls: list[ToolCallDelta]) -> bool:
        """Decide what can be decided of the held text; False if more is needed."""
        if self._is_dropping:
            return self._drop()
        if self._scanner is not None:
            return self._scan(content, calls)
        return self._between_calls(content) if self._in_calls else self._text(content)

    def _text(self, content: list[str]) -> bool:
        if not self._begin:
            return self._start_of_answer(content)
        start = self._held.find(self._begin)
        if start >= 0:
            content.append(self._held[:start].rstrip())
            self._raw = self._held[len(self._held[:start].rstrip()) : start + len(self._begin)]
            self._held = self._held[start + len(self._begin) :]
            self._in_calls = True
            return True
        safe = len(self._held) - num_open(self._held, self._begin)
        safe = len(self._held[:safe].rstrip())
        content.append(self._held[:safe])
        self._held = self._held[safe:]
        return False

    def _start_of_answer(self, content: list[str]) -> bool:
        stripped = self._held.lstrip()
        if not self._is_text and (not stripped or (self._lead.startswith(stripped) and stripped != self._lead)):
            return False
        after = stripped.removeprefix(self._lead).lstrip() if self._lead else stripped
        if not self._is_text and after.startswith("{"):
            self._raw = self._held[: len(self._held) - len(after)]
            self._held = after
            self._in_calls = True
            return True
        if not self._is_text and not after:
            return False
        self._is_text = True
        content.append(self._held)
        self._held = ""
        return False

    def _between_calls(self, content: list[str]) -> bool:
        if self._end and self._held.startswith(self._end) and self._num_calls:
            self._held = self._held[len(self._end) :]
            self._in_calls, self._raw = False, ""
            return True
        if not self._held or (self._end and self._end.startswith(self._held)):
            return False
        first = self._held[0]
        if first == "{":
            self._scanner = CallScanner(self._names)
            return True
        if first in " \t\r\n,;[]":
            self._raw += first
            self._held = self._held[1:]
            return True
        return self._give_up(content)

    def _scan(self, content: list[str], calls: list[ToolCallDelta]) -> bool:
        scanner = self._scanner
        assert scanner is not None, "the caller looked"
        piece, self._held = self._held, ""
        scan = scanner.push(piece)
        if scan.name is not None and self._num_calls < self._max_calls:
            self._index = self._num_calls
            self._num_calls += 1
            calls.append(ToolCallDelta(self._index, self._id(self._index), scan.name))
        if scan.arguments and self._index is not None:
            calls.append(ToolCallDelta(self._index, None, None, scan.arguments))
        if scanner.state is State.OPEN:
            return False
        self._scanner, self._index = None, None
        self._held = scanner.rest if scanner.state is State.DONE else scanner.text
        return True if scanner.state is State.DONE else self._give_up(content)

    def _give_up(self, content: list[str]) -> bool:
        """It is no call: content, if there was none before; else dropped up to the end mark. Whether to go on."""
        if self._num_calls == 0:
            content.append(self._raw)
            self._in_calls, self._is_text, self._raw = False, True, ""
            return True
        self._is_dropping = True
        return True

    def _drop(self) -> bool:
        end = self._held.find(self._end) if self._end else -1
        if end < 0:
            self._held = self._held[len(self._held) - num_open(self._held, self._end) :] if self._end else ""
            return False
        self._held, self._is_dropping = self._held[end:], False
        return True

    def _id(self, index: int) -> str:
        return "call_" + hashlib.sha256(f"{self._id_seed}/{index}".encode()).hexdigest()[:24]
