"""Thoughts taken out of the text of models that think aloud: `<think>` ... `</think>`, then the answer. Pure."""

from __future__ import annotations

from typing import Final

from gateway.core.parsing import OutputParser, Parsed, num_open

BEGIN: Final = "<think>"
END: Final = "</think>"


class ThinkParser:
    """An `OutputParser`: reasoning first, if there is any; the rest goes to `inner`, or is content.

    White space around the marks belongs to neither.
    """

    def __init__(self, inner: OutputParser | None, *, starts_inside: bool, special_tokens: frozenset[str]) -> None:
        """`starts_inside`: the prompt has opened the thought; `special_tokens`: which of the marks are such."""
        self._inner = inner
        self._special_tokens = special_tokens
        self._is_thinking = starts_inside
        self._may_begin = not starts_inside
        self._said = False
        """Something of the thought is out."""
        self._strip_content = starts_inside
        self._held = ""

    @property
    def visible_special_tokens(self) -> frozenset[str]:
        return self._special_tokens | (self._inner.visible_special_tokens if self._inner is not None else frozenset())

    @property
    def is_in_call(self) -> bool:
        return self._inner is not None and self._inner.is_in_call

    def push(self, text: str) -> Parsed:
        """See `OutputParser`."""
        self._held += text
        if self._may_begin and not self._begin():
            return Parsed()
        reasoning = self._think() if self._is_thinking else ""
        parsed = Parsed() if self._is_thinking else self._answer()
        return Parsed(parsed.content, reasoning, parsed.tool_calls)

    def finish(self) -> Parsed:
        """See `OutputParser`."""
        self._may_begin = False
        reasoning = self._held.rstrip() if self._is_thinking else ""
        parsed = Parsed() if self._is_thinking else self._answer()
        rest = self._inner.finish() if self._inner is not None else Parsed()
        return Parsed(parsed.content + rest.content, reasoning, parsed.tool_calls + rest.tool_calls)

    def _begin(self) -> bool:
        """Whether it is known if the answer begins with a thought."""
        stripped = self._held.lstrip()
        if BEGIN.startswith(stripped) and stripped != BEGIN:
            return False
        self._may_begin = False
        if stripped.startswith(BEGIN):
            self._is_thinking = self._strip_content = True
            self._held = stripped.removeprefix(BEGIN)
        return True

    def _think(self) -> str:
        if not self._said:
            self._held = self._held.lstrip()
        thought, mark, rest = self._held.partition(END)
        if mark:
            self._is_thinking, self._held = False, rest
            return thought.rstrip()
        safe = thought[: len(thought) - num_open(thought, END)].rstrip()
        self._said = self._said or bool(safe)
        self._held = thought[len(safe) :]
        return safe

    def _answer(self) -> Parsed:
        text, self._held = self._held, ""
        if self._strip_content:
            text = text.lstrip()
            self._strip_content = not text
        return self._inner.push(text) if self._inner is not None else Parsed(text)
