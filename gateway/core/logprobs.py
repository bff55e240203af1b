"""Logprobs as OpenAI's objects: the chat form, the completions form, and vLLM's form for prompts. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol

from engine.protocol import TokenLogprobs
from gateway.core.fold import TokenScore

LOWEST_LOGPROB: Final = -9999.0
"""In place of minus infinity, which JSON does not have."""


class Vocabulary(Protocol):
    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text; special tokens by their name."""
        ...


def token_text(vocabulary: Vocabulary, token_id: int) -> str:
    """The token as a string; bytes that are no whole characters become U+FFFD."""
    return vocabulary.token_bytes(token_id).decode("utf-8", "replace")


def chat_logprobs(scores: Iterable[TokenScore], num_top: int, vocabulary: Vocabulary) -> dict[str, Any]:
    """`choices[].logprobs` of a chat answer: an entry a token, with exactly `num_top` alternatives."""
    content = [
        {
            **_named(score.token_id, score.logprobs.logprob, vocabulary),
            "top_logprobs": [
                _named(token_id, logprob, vocabulary) for token_id, logprob in _top(score.logprobs, num_top)
            ],
        }
        for score in scores
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """`choices[].logprobs` of a completion, put together from the prompt's tokens (echo) and the generated ones."""

    def __init__(self, num_top: int, vocabulary: Vocabulary) -> None:
        self._num_top = num_top
        self._vocabulary = vocabulary
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add(self, token_id: int, offset_chars: int, logprobs: TokenLogprobs | None) -> None:
        """The next token; `logprobs` None for the first of a prompt, which nothing precedes."""
        name = token_text(self._vocabulary, token_id)
        self._tokens.append(name)
        self._offsets.append(offset_chars)
        self._logprobs.append(None if logprobs is None else _finite(logprobs.logprob))
        self._tops.append(None if logprobs is None else self._top_map(name, logprobs))

    def as_json(self) -> dict[str, Any]:
        return {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._tops,
            "text_offset": self._offsets,
        }

    def _top_map(self, name: str, logprobs: TokenLogprobs) -> dict[str, float]:
        found: dict[str, float] = {}
        # Of tokens with the same text the likeliest stays; the chosen token is always there.
        for token_id, logprob in _top(logprobs, self._num_top):
            found.setdefault(token_text(self._vocabulary, token_id), logprob)
        found.setdefault(name, _finite(logprobs.logprob))
        return found


def prompt_logprobs(
    prompt_ids: Sequence[int],
    scores: Sequence[TokenLogprobs | None],
    num_top: int,
    vocabulary: Vocabulary,
) -> list[dict[str, Any] | None]:
    """The field `prompt_logprobs` of vLLM: by id, the token and the `num_top` likeliest; None for the first."""
    return [
        None if score is None else _by_id(token_id, score, num_top, vocabulary)
        for token_id, score in zip(prompt_ids, scores, strict=True)
    ]


def _by_id(token_id: int, score: TokenLogprobs, num_top: int, vocabulary: Vocabulary) -> dict[str, Any]:
    found = {token_id: (score.logprob, score.rank)}
    for rank, (other_id, logprob) in enumerate(_top(score, num_top), start=1):
        found.setdefault(other_id, (logprob, rank))
    return {
        str(key): {
            "logprob": _finite(logprob),
            "rank": rank,
            "decoded_token": token_text(vocabulary, key),
        }
        for key, (logprob, rank) in found.items()
    }


def _named(token_id: int, logprob: float, vocabulary: Vocabulary) -> dict[str, Any]:
    data = vocabulary.token_bytes(token_id)
    return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}


def _top(logprobs: TokenLogprobs, num_top: int) -> list[tuple[int, float]]:
    pairs = zip(logprobs.top_ids[:num_top], logprobs.top_logprobs[:num_top], strict=True)
    return [(token_id, _finite(logprob)) for token_id, logprob in pairs]


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
