"""How families of models write tool calls: the grammar that makes them, the parser that reads them. Pure.

A family is one `ToolFormat`; to add one, add an entry to `FORMATS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from gateway.core.grammar import Grammar, literal, renamed_start
from gateway.core.tools.call_parser import CallParser
from gateway.core.tools.definitions import Mode, ToolUse

MarkLark = Callable[[str], str]
"""A mark in Lark: a special token by its id where the tokenizer has one, else its text."""

NO_LIMIT: Final = 2**31


class ToolFormat(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence of calls as text: `begin` call `end` ..., or `begin` call `separator` call ... `end`."""

    name: str
    begin: str = ""
    end: str = ""
    open_list: str = ""
    """Between `begin` and the first call."""
    close_list: str = ""
    separator: str = ""
    """Between two calls; empty: each call has its own `begin` and `end`."""
    lead: str = ""
    """May stand before the first call where there is no `begin`."""
    arguments_key: str = "arguments"
    signs: Sequence[str] = ()
    """Texts in a chat template that give the family away."""

    def grammar(self, use: ToolUse, mark: MarkLark) -> str:
        """Lark that allows nothing but calls, as many as `use` wants."""
        begin = " ".join(filter(None, [mark(self.begin) if self.begin else "", _maybe(self.open_list)]))
        end = " ".join(filter(None, [_maybe(self.close_list), mark(self.end) if self.end else ""]))
        more = use.max_calls - 1
        if self.separator:
            rest = f" ({literal(self.separator)} one_call){{0,{more}}}" if more else ""
            start = f"{begin} one_call{rest} {end}"
        else:
            rest = f' ("\\n" {begin} one_call {end}){{0,{more}}}' if more else ""
            start = f"{begin} one_call {end}{rest}"
        return f"start: {start.strip()}\none_call: {use.call_lark(self.arguments_key)}"

    def parser(self, use: ToolUse, id_seed: str, is_special: Callable[[str], bool]) -> CallParser:
        """Of one choice."""
        marks = [mark.strip() for mark in (self.begin, self.end, self.lead) if mark]
        return CallParser(
            use.names,
            begin=self.begin.strip(),
            end=self.end.strip(),
            lead=self.lead,
            # What the grammar enforces needs no second count.
            max_calls=1 if not use.parallel or use.mode is Mode.NAMED else NO_LIMIT,
            id_seed=id_seed,
            visible_special_tokens=frozenset(mark for mark in marks if is_special(mark)),
        )

    def render_calls(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Calls of a conversation as the model would have written them."""
        texts = [
            json.dumps({"name": call["name"], self.arguments_key: call["arguments"]}, ensure_ascii=False)
            for call in calls
        ]
        if self.separator:
            return self.begin + self.open_list + self.separator.join(texts) + self.close_list + self.end
        return "\n".join(f"{self.begin}{self.open_list}{text}{self.close_list}{self.end}" for text in texts)

    def preamble(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """What a model whose template does not know tools is told of them."""
        example = self.render_calls([{"name": "FUNCTION", "arguments": {"PARAMETER": "VALUE"}}])
        functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        return (
            "You can call functions. These are the functions, one JSON object a line:\n"
            f"{functions}\n"
            f"To call a function, answer with nothing but its name and arguments as JSON, in this form:\n{example}\n"
            "If no function is needed, answer in words."
        )


HERMES: Final = ToolFormat(name="hermes", begin="<tool_call>\n", end="\n</tool_call>", signs=("<tool_call>",))
LLAMA3_JSON: Final = ToolFormat(
    name="llama3_json",
    separator="; ",
    lead="<|python_tag|>",
    arguments_key="parameters",
    signs=("<|python_tag|>", "Environment: ipython"),
)
MISTRAL: Final = ToolFormat(
    name="mistral",
    begin="[TOOL_CALLS]",
    open_list=" [",
    close_list="]",
    separator=", ",
    signs=("[TOOL_CALLS]",),
)
FORMATS: Final[Mapping[str, ToolFormat]] = {f.name: f for f in (HERMES, LLAMA3_JSON, MISTRAL)}


def format_of(template: str | None) -> ToolFormat:
    """The family that a chat template was written for; Hermes' form where it says nothing of tools."""
    for candidate in FORMATS.values():
        if any(sign in (template or "") for sign in candidate.signs):
            return candidate
    return HERMES


def either(use: ToolUse, form: ToolFormat, mark: MarkLark, content: Grammar | None) -> Grammar | None:
    """The grammar of an answer that may call tools: calls only where they are a must, else calls or `content`."""
    if use.mode is not Mode.AUTO:
        return Grammar(form.grammar(use, mark), "tools")
    if content is None:
        return None
    calls = renamed_start(form.grammar(use, mark), "all_calls")
    text = "\n".join(["start: all_calls | whole_content", calls, renamed_start(content.text, "whole_content")])
    return Grammar(text, content.param)


def _maybe(text: str) -> str:
    return literal(text) if text else ""
