"""Reads TensorRT-LLM's output: one object, changed in place, whose lists are cumulative and may shrink at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.protocol import TokenLogprobs


class Logprob(Protocol):
    @property
    def logprob(self) -> float: ...

    @property
    def rank(self) -> int | None: ...


class Completion(Protocol):
    """What is read of `CompletionOutput`; never its `*_diff`: those of a choice that did not move are stale."""

    @property
    def index(self) -> int: ...

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def logprobs(self) -> Sequence[Mapping[int, Logprob]] | None: ...

    @property
    def finish_reason(self) -> str | None: ...

    @property
    def stop_reason(self) -> int | str | None: ...


@dataclass(frozen=True, slots=True)
class News:
    ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None
    """Told once."""
    stop_id: int | None


class Cursor:
    """How far one choice has been read.

    Tokens that a stop match takes back were handed on already and stay: the caller's own stop rules have seen them.
    """

    def __init__(self, num_top_logprobs: int | None = None, index: int = 0) -> None:
        self._num_top = num_top_logprobs
        self._index = index
        self._num_read = 0
        self._is_finished = False

    def read(self, outputs: Iterable[Completion]) -> News | None:
        """What is new of this choice; None if nothing is."""
        completion = next((output for output in outputs if output.index == self._index), None)
        if completion is None or self._is_finished:
            return None
        first, last = self._num_read, len(completion.token_ids)
        ids = list(completion.token_ids[first:last])
        self._num_read = max(first, last)
        self._is_finished = completion.finish_reason is not None
        if not ids and not self._is_finished:
            return None
        stop_reason = completion.stop_reason
        return News(
            ids=ids,
            logprobs=self._logprobs(completion, first, ids),
            finish_reason=completion.finish_reason,
            stop_id=stop_reason if isinstance(stop_reason, int) else None,
        )

    def _logprobs(self, completion: Completion, first: int, ids: list[int]) -> list[TokenLogprobs] | None:
        """Of `ids`; the engine's list may go on behind its tokens, since a stop match takes back those alone."""
        if self._num_top is None:
            return None
        known = list(completion.logprobs or [])[first : first + len(ids)]
        if len(known) < len(ids):
            raise ValueError(f"{len(known)} logprobs for {len(ids)} tokens")
        return [_token_logprobs(token, best, self._num_top) for token, best in zip(ids, known, strict=True)]


def _token_logprobs(token: int, known: Mapping[int, Logprob], num_top: int) -> TokenLogprobs:
    own = known.get(token)
    if own is None:
        raise ValueError(f"no logprob of the chosen token {token}")
    best = sorted(known.items(), key=lambda item: (-item[1].logprob, item[0]))
    rank = own.rank or 1 + sum(other.logprob > own.logprob for other in known.values())
    best = best[:num_top]
    return TokenLogprobs(own.logprob, rank, [i for i, _ in best], [other.logprob for _, other in best])
