"""Structured output with llguidance: which tokens a sequence's grammar allows next.

A matcher's state is a function of (grammar, output ids). Matchers are kept from step to step only to save time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Final

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from engine.core.scheduler import SequenceKey, StepSlice
from engine.errors import GrammarError

MAX_COMPILED: Final = 128


class Grammars:
    """Compiled grammars of a model, by their text. Methods may be called from any thread."""

    def __init__(self, tokenizer_path: Path, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._path = tokenizer_path
        self.vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._tokenizer: LLTokenizer | None = None
        self.end_ids: list[int] = []
        """What llguidance takes for ends; known once a grammar was compiled."""
        self._compiled: dict[str, LLMatcher] = {}
        self._lock = threading.Lock()

    def knows(self, grammar: str) -> bool:
        """Whether `compile` returns at once."""
        return grammar in self._compiled

    def compile(self, grammar: str) -> LLMatcher:
        """The grammar's matcher before the first token; the caller copies it.

        Takes up to a second for a large schema (and for the first one, which loads the tokenizer).

        Raises:
            GrammarError: it cannot be compiled; says why.

        """
        compiled = self._compiled.get(grammar)
        if compiled is not None:
            return compiled
        with self._lock:
            matcher = LLMatcher(self._load_tokenizer(), grammar, log_level=0)
            if matcher.is_error():
                raise GrammarError(_first_line(matcher.get_error()))
            if len(self._compiled) >= MAX_COMPILED:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[grammar] = matcher
        return matcher

    def _load_tokenizer(self) -> LLTokenizer:
        if self._tokenizer is None:
            try:
                self._tokenizer = LLTokenizer(
                    str(self._path), n_vocab=self.vocab_size, eos_token=self._eos_token_ids or None
                )
            except ValueError as error:
                raise GrammarError(f"the model's tokenizer cannot be used for it: {error}") from error
            self.end_ids = list(self._tokenizer.eos_tokens)
        return self._tokenizer


class _Matched:
    """A sequence's matcher, and how much of its output that has seen."""

    def __init__(self, tokens: list[int], matcher: LLMatcher) -> None:
        self.tokens = tokens
        self.matcher = matcher
        self.num_consumed = 0


class GrammarMasks:
    """The masks of one pipeline's sequences."""

    def __init__(self, grammars: Grammars, max_sequences: int, device: torch.device) -> None:
        self._grammars = grammars
        self._max_sequences = max_sequences
        self._device = device
        self._matched: OrderedDict[SequenceKey, _Matched] = OrderedDict()

    def mask(self, part: StepSlice) -> Tensor:
        """Which tokens may be next: bool [vocabulary]. An end token may be where the grammar may end, and only there.

        Raises:
            GrammarError: the grammar cannot be compiled or followed any further (a limit of the parser, or output
                that does not match it).

        """
        matcher = self._advance(part)
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        mask = torch.from_numpy(bits[: self._grammars.vocab_size].astype(np.bool_))
        mask[self._grammars.end_ids] = False  # The request's own count.
        mask[[token for token in part.sampling.eos_token_ids if 0 <= token < len(mask)]] = matcher.is_accepting()
        if matcher.is_error() or not bool(mask.any()):
            raise GrammarError(_first_line(matcher.get_error()) or "it allows no token here")
        return mask.to(self._device)

    def _advance(self, part: StepSlice) -> LLMatcher:
        """Its matcher after all of its output."""
        assert part.sampling.grammar is not None
        known = self._matched.get(part.key)
        # Another attempt has another list of tokens.
        if known is None or known.tokens is not part.tokens:
            known = _Matched(part.tokens, self._grammars.compile(part.sampling.grammar).deep_copy())
        self._matched[part.key] = known
        self._matched.move_to_end(part.key)
        if len(self._matched) > self._max_sequences:
            self._matched.popitem(last=False)
        new_ids = part.tokens[part.num_prompt_tokens + known.num_consumed :]
        if new_ids and not known.matcher.consume_tokens(new_ids):
            raise GrammarError(_first_line(known.matcher.get_error()))
        known.num_consumed += len(new_ids)
        return known.matcher


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
