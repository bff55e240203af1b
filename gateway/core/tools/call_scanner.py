"""One call, `{"name": ..., "arguments": {...}}`, read from text that comes in pieces. Pure.

The arguments are passed on as they come, once the name is known and they have begun as an object.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Final

import msgspec

_KEYS: Final = ("arguments", "parameters")
_DECODER: Final = json.JSONDecoder()


class State(StrEnum):
    OPEN = "open"
    """More text is needed."""
    DONE = "done"
    BAD = "bad"
    """This is no call of a known tool."""


class Scan(msgspec.Struct, frozen=True):
    """What a piece of text gave."""

    name: str | None = None
    """Once, when the call is known to be one."""
    arguments: str = ""


class CallScanner:
    """Feed it text from the opening brace on; `rest` is what follows the closing one."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self.state = State.OPEN
        self.text = ""
        """All that was fed and belongs to the call."""
        self.rest = ""
        self._name: str | None = None
        self._position = 0
        """Up to where the members of the object have been read."""
        self._arguments_start: int | None = None
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._has_arguments = False
        self._early_arguments = ""
        """Those that came before the name."""

    def push(self, piece: str) -> Scan:
        """The next piece of text."""
        self.text += piece
        name, arguments = None, []
        while self.state is State.OPEN:
            scanned = self._read_member() if self._arguments_start is None else self._read_arguments()
            if scanned is None:
                break
            name = scanned.name or name
            arguments.append(scanned.arguments)
        return Scan(name, "".join(arguments))

    def _read_member(self) -> Scan | None:
        """The next member of the object, or its end; None if more text is needed."""
        text, start = self.text, self._skip_space(self._position)
        if start >= len(text):
            return None
        if self._position == 0:
            return self._step(start + 1) if text[start] == "{" else self._fail()
        if text[start] == "}":
            return self._end(start + 1)
        if text[start] == ",":
            start = self._skip_space(start + 1)
        if start < len(text) and text[start] != '"':
            return self._fail()
        key = self._value(start)
        if key is None:
            return None
        colon = self._skip_space(key[1])
        value_start = self._skip_space(colon + 1)
        if value_start >= len(text):
            return None
        if text[colon] != ":":
            return self._fail()
        if key[0] in _KEYS and self._has_arguments:
            return self._fail()
        if key[0] in _KEYS and text[value_start] == "{" and self._name is not None:
            self._arguments_start, self._has_arguments = value_start, True
            self._position = value_start
            return Scan(self._name)
        value = self._value(value_start)
        if value is None:
            return None
        return self._take(key[0], value[0], text[value_start : value[1]], value[1])

    def _take(self, key: object, value: object, text: str, end: int) -> Scan:
        if key == "name":
            if value not in self._names or self._name is not None:
                return self._fail()
            self._name = str(value)
        elif key in _KEYS:
            # Before the name, or as text that holds JSON, as some models write it: all of it at once.
            arguments = value if isinstance(value, str) else text
            if not isinstance(value, dict | str) or self._has_arguments:
                return self._fail()
            self._has_arguments = True
            self._early_arguments = arguments
        self._position = end
        is_news = key == "name" or key in _KEYS
        if is_news and self._has_arguments and self._name is not None:
            return Scan(self._name, self._early_arguments)
        return Scan()

    def _read_arguments(self) -> Scan | None:
        """The next piece of the arguments' own text; None if there is none."""
        start = self._position
        for position in range(start, len(self.text)):
            if self._closes(self.text[position]):
                self._position, self._arguments_start = position + 1, None
                return Scan(arguments=self.text[start : position + 1])
        self._position = len(self.text)
        return Scan(arguments=self.text[start:]) if len(self.text) > start else None

    def _closes(self, char: str) -> bool:
        """Whether `char` ends the object that the arguments are."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
            return False
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._depth == 0
        return False

    def _end(self, end: int) -> Scan:
        if self._name is None:
            return self._fail()
        self.state, self.rest, self.text = State.DONE, self.text[end:], self.text[:end]
        return Scan() if self._has_arguments else Scan(self._name, "{}")

    def _step(self, position: int) -> Scan:
        self._position = position
        return Scan()

    def _fail(self) -> Scan:
        self.state = State.BAD
        return Scan()

    def _skip_space(self, position: int) -> int:
        while position < len(self.text) and self.text[position] in " \t\r\n":
            position += 1
        return position

    def _value(self, start: int) -> tuple[object, int] | None:
        """(value, end) of the JSON value at `start`; None if it is not whole yet, or not JSON."""
        try:
            value, end = _DECODER.raw_decode(self.text, start)
        except (ValueError, RecursionError):
            return None
        # A number may go on with the next piece.
        return (value, end) if end < len(self.text) or isinstance(value, str | dict | list) else None
