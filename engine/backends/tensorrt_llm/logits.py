"""The logits processor of one request: our own rules on the engine's logits, rebuilt from the ids at every step.

It is pickled into the engine's worker processes, and has no state that a resume would have to carry.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from engine.backends.tensorrt_llm.sampling import draws_itself, is_greedy
from engine.backends.torch.grammar import GrammarMasks, Grammars
from engine.backends.torch.processors import MINUS_INFINITY, History, needs_processing, processed
from engine.backends.torch.sampler import sample
from engine.core.scheduler_types import StepSlice
from engine.core.sequence import SequenceKey
from engine.errors import GrammarError
from engine.protocol import SamplingParams

logger = logging.getLogger(__name__)

_MAX_MATCHERS: Final = 1024


class Vocabulary(NamedTuple):
    """Where grammars find the tokens."""

    tokenizer_path: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


@lru_cache(maxsize=1)
def _masks(tokenizer_path: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> GrammarMasks:
    """Of this worker process."""
    grammars = Grammars(Path(tokenizer_path), vocab_size, list(eos_token_ids))
    return GrammarMasks(grammars, _MAX_MATCHERS, torch.device("cpu"))


class RequestLogits:
    """Called once a token, with all tokens so far; what is committed is told from the prompt by its length."""

    def __init__(
        self,
        run_id: int,
        sampling: SamplingParams,
        num_prompt: int,
        choice: int,
        vocabulary: Vocabulary,
    ) -> None:
        self._run_id = run_id
        self._sampling = sampling
        self._num_prompt = num_prompt
        self._choice = choice
        self._vocabulary = vocabulary
        self._tokens: list[int] = []

    def __call__(
        self,
        req_id: int,
        logits: Tensor,
        token_ids: list[list[int]],
        stream_ptr: int | None,
        client_id: int | None,
    ) -> None:
        """Change `logits` [1, 1, vocabulary] in place; `token_ids` are the prompt and all output."""
        if stream_ptr is None:
            self._process(logits, token_ids[0])
            return
        with torch.cuda.stream(torch.cuda.ExternalStream(stream_ptr)):  # type: ignore[no-untyped-call]  # torch's own
            self._process(logits, token_ids[0])

    @torch.inference_mode()
    def _process(self, logits: Tensor, tokens: list[int]) -> None:
        row = logits[0, 0]
        index = len(tokens) - self._num_prompt
        scores = row.float()
        history = History(tokens, self._num_prompt)
        mask = self._mask(tokens, row)
        if draws_itself(self._sampling) or is_greedy(self._sampling):
            token = sample(scores[None], [self._sampling], [self._choice], [index], [history], [mask])[0]
            row.fill_(MINUS_INFINITY)
            row[token] = 0.0
        elif needs_processing(self._sampling, index, mask):
            row.copy_(processed(scores, self._sampling, index, history, mask))

    def _mask(self, tokens: list[int], like: Tensor) -> Tensor | None:
        """What the grammar allows, bool [vocabulary]."""
        if self._sampling.grammar is None:
            return None
        allowed = torch.zeros(len(like), dtype=torch.bool)
        try:
            mask = _masks(*self._vocabulary).mask(self._slice(tokens))
        except GrammarError as error:
            # To raise here would fail every request of the engine; the rank refuses what ends out of place.
            logger.warning("run=%d event=grammar_failed cause=%s", self._run_id, error)
            mask = torch.zeros(len(like), dtype=torch.bool)
            mask[[token for token in self._sampling.eos_token_ids if token < len(like)]] = True
        allowed[: len(mask)] = mask[: len(like)]
        return allowed.to(like.device)

    def _slice(self, tokens: list[int]) -> StepSlice:
        # One list for the whole request: by it its matcher is known, which then sees each token once.
        if tokens[: len(self._tokens)] != self._tokens:
            self._tokens = []
        self._tokens += tokens[len(self._tokens) :]
        return StepSlice(
            key=SequenceKey(str(self._run_id), self._choice),
            token_ids=[],
            context_tokens=0,
            blocks=[],
            samples=True,
            num_logits=1,
            sampling=self._sampling,
            tokens=self._tokens,
            num_prompt_tokens=self._num_prompt,
        )
