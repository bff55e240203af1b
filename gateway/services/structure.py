"""What the text of an answer must be, and how it is read: grammars, tool calls and reasoning of the served model."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec
from llguidance import LLMatcher, LLTokenizer

from gateway.core.grammar import Grammar, after_reasoning, body_grammar, literal
from gateway.core.parsing import OutputParser
from gateway.core.reasoning import BEGIN, END, ThinkParser
from gateway.core.tools.definitions import ToolUse
from gateway.core.tools.formats import FORMATS, ToolFormat, either, format_of
from gateway.errors import bad_request
from gateway.openai import GenerationBody
from gateway.services.tokenizer import TextTokenizer

COMPILE_TIMEOUT_S: Final = 5.0
MAX_REMEMBERED: Final = 512


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """How one answer is made and read."""

    structure: Structure
    grammar: str | None
    tools: ToolUse | None
    reasons: bool
    """The model may think aloud."""
    starts_inside: bool
    """The prompt has opened a thought."""

    def parser(self, response_id: str, choice: int) -> OutputParser | None:
        """Of one choice; None: the text is the message."""
        inner = self.structure.call_parser(self.tools, f"{response_id}/{choice}") if self.tools is not None else None
        if not self.reasons:
            return inner
        marks = frozenset(mark for mark in (BEGIN, END) if self.structure.tokenizer.special_id(mark) is not None)
        return ThinkParser(inner, starts_inside=self.starts_inside, special_tokens=marks)


class Structure(msgspec.Struct, frozen=True):
    """Of one model; `tool_format` and `reasoning` as of the settings."""

    tokenizer: TextTokenizer
    checker: GrammarChecker
    tool_format: ToolFormat
    reasons: bool

    @classmethod
    def of(cls, tokenizer: TextTokenizer, model_dir: Path, tool_format: str, reasoning: str) -> Structure:
        """Chosen by the chat template where the settings say `auto`."""
        template = tokenizer.template_source
        return cls(
            tokenizer,
            GrammarChecker(model_dir / "tokenizer.json", tokenizer.vocab_size, tokenizer.eos_token_ids),
            format_of(template) if tool_format == "auto" else FORMATS[tool_format],
            BEGIN in (template or "") if reasoning == "auto" else reasoning == "think",
        )

    async def shape(self, body: GenerationBody, tools: ToolUse | None, prompt: str) -> Shape:
        """For an answer to `prompt`. Raises ApiError (400) if its grammar cannot be compiled."""
        content = body_grammar(body)
        grammar = content
        if tools is not None:
            grammar = either(tools, self.tool_format, self._mark, content)
        ended = prompt.rstrip()
        starts_inside = self.reasons and ended.endswith(BEGIN)
        if grammar is not None:
            if starts_inside:
                grammar = Grammar(after_reasoning(grammar.text, END), grammar.param)
            await self.checker.check(grammar)
        return Shape(
            structure=self,
            grammar=grammar.text if grammar is not None else None,
            tools=tools,
            reasons=self.reasons and (starts_inside or grammar is None) and not ended.endswith(END),
            starts_inside=starts_inside,
        )

    def call_parser(self, tools: ToolUse, id_seed: str) -> OutputParser:
        """Of one choice."""
        return self.tool_format.parser(tools, id_seed, lambda text: self.tokenizer.special_id(text) is not None)

    def _mark(self, text: str) -> str:
        """A mark in Lark; special tokens are named by their ids, because no text makes them."""
        core = text.strip()
        special_id = self.tokenizer.special_id(core)
        if special_id is None:
            return literal(text)
        before, _, after = text.partition(core)
        return " ".join(
            [*([literal(before)] if before else []), f"<[{special_id}]>", *([literal(after)] if after else [])]
        )


class GrammarChecker:
    """Finds out whether a grammar can be compiled, off the event loop; remembers the answer."""

    def __init__(self, tokenizer_path: Path, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._path, self._vocab_size, self._eos_token_ids = tokenizer_path, vocab_size, eos_token_ids
        self._tokenizer: LLTokenizer | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._errors: OrderedDict[str, str] = OrderedDict()
        """By grammar; empty: it is good."""

    async def check(self, grammar: Grammar) -> None:
        """Raises ApiError (400) naming the field."""
        error = self._errors.get(grammar.text)
        if error is None:
            loop = asyncio.get_running_loop()
            try:
                checking = loop.run_in_executor(self._thread, self._check, grammar.text)
                error = await asyncio.wait_for(checking, COMPILE_TIMEOUT_S)
            except TimeoutError:
                error = f"it takes longer than {COMPILE_TIMEOUT_S:.0f} s to compile"
            self._errors[grammar.text] = error
            if len(self._errors) > MAX_REMEMBERED:
                self._errors.popitem(last=False)
        if error:
            raise bad_request(f"{grammar.param} cannot be enforced: {error}"[:500], grammar.param)

    def _check(self, text: str) -> str:
        if self._tokenizer is None:
            try:
                self._tokenizer = LLTokenizer(
                    str(self._path), n_vocab=self._vocab_size, eos_token=self._eos_token_ids or None
                )
            except ValueError as error:
                return f"the model's tokenizer cannot be used for it: {error}"
        matcher = LLMatcher(self._tokenizer, text, log_level=0)
        problem = matcher.get_error() if matcher.is_error() else ""
        return problem.strip().partition("\n")[0] if matcher.is_error() else ""

    def close(self) -> None:
        """End its thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
