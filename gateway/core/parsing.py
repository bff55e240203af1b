"""Between the text of a model and the message of an answer: reasoning and tool calls are taken out of it. Pure."""

from __future__ import annotations

from typing import Protocol

import msgspec


def num_open(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the start of `mark`; not all of it."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


class ToolCallDelta(msgspec.Struct, frozen=True):
    """What a piece of text adds to call `index`; `id` and `name` come once, whole, with the call's first delta."""

    index: int
    id: str | None
    name: str | None
    arguments: str = ""
    """The next piece of the JSON text."""


class Parsed(msgspec.Struct, frozen=True):
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class OutputParser(Protocol):
    """One for each choice. What it gives depends on the text alone, not on how the text was cut into pieces."""

    @property
    def visible_special_tokens(self) -> frozenset[str]:
        """Special tokens of the tokenizer that the parser must see as text."""
        ...

    @property
    def is_in_call(self) -> bool:
        """A tool call was announced and has not ended."""
        ...

    def push(self, text: str) -> Parsed:
        """The next piece of text, stop strings already applied; what cannot be decided yet is held back."""
        ...

    def finish(self) -> Parsed:
        """The text has ended: what was held back."""
        ...
