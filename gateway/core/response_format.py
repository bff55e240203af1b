"""Deltas of the fold as OpenAI's objects: chunks of a stream, or one whole body. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec

from gateway.core.fold import Delta


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class ResponseFormat(ABC):
    """How one request is answered. `prompts` are the prompt ids by choice, `created_s` whole Unix seconds."""

    object_name: str
    chunk_name: str

    def __init__(
        self,
        response_id: str,
        created_s: int,
        model: str,
        prompts: Sequence[Sequence[int]],
        *,
        with_token_ids: bool,
    ) -> None:
        self._header = {"id": response_id, "created": created_s, "model": model, "system_fingerprint": None}
        self._prompts = prompts
        self._with_token_ids = with_token_ids
        self._started: set[int] = set()

    @abstractmethod
    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """The chunks for the next delta of choice `index`; the first call for it also begins the choice."""

    @abstractmethod
    def choice(self, index: int, whole: Delta) -> dict[str, Any]:
        """The choice in a whole body."""

    def body(self, wholes: Sequence[Delta], usage: Usage) -> dict[str, Any]:
        """The whole answer; `wholes` holds each choice's complete delta."""
        choices = [self.choice(index, whole) for index, whole in enumerate(wholes)]
        return {**self._header, "object": self.object_name, "choices": choices, "usage": usage.as_json()}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last chunk of a stream that asked for usage."""
        return {**self._header, "object": self.chunk_name, "choices": [], "usage": usage.as_json()}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._header, "object": self.chunk_name, "choices": [choice]}

    def _starts(self, index: int) -> bool:
        """Whether this is the first chunk of choice `index`."""
        starts = index not in self._started
        self._started.add(index)
        return starts

    def _ids(self, ids: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(ids)} if self._with_token_ids else {}


class ChatFormat(ResponseFormat):
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        unsent_ids = delta.token_ids
        if self._starts(index):
            first = self._delta_chunk(index, {"role": "assistant", "content": ""}, [])
            if self._with_token_ids and len(self._started) == 1:
                first["prompt_token_ids"] = list(self._prompts[0])
            found.append(first)
        if delta.text or (self._with_token_ids and unsent_ids and delta.finish_reason is None):
            found.append(self._delta_chunk(index, {"content": delta.text}, unsent_ids))
            unsent_ids = []
        if delta.finish_reason is not None:
            found.append(self._delta_chunk(index, {}, unsent_ids, delta.finish_reason))
        return found

    def choice(self, index: int, whole: Delta) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": whole.text, "refusal": None},
            "logprobs": None,
            "finish_reason": whole.finish_reason,
            **self._ids(whole.token_ids),
        }

    def body(self, wholes: Sequence[Delta], usage: Usage) -> dict[str, Any]:
        prompt = {"prompt_token_ids": list(self._prompts[0])} if self._with_token_ids else {}
        return {**super().body(wholes, usage), **prompt}

    def _delta_chunk(
        self, index: int, delta: dict[str, Any], ids: Sequence[int], finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._chunk({**choice, **self._ids(ids)})


class CompletionFormat(ResponseFormat):
    object_name = "text_completion"
    chunk_name = "text_completion"

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        starts = self._starts(index)
        said = delta.text or delta.finish_reason or (self._with_token_ids and delta.token_ids)
        if not said and not starts:
            return []
        return [self._chunk(self._choice(index, delta, with_prompt=starts))]

    def choice(self, index: int, whole: Delta) -> dict[str, Any]:
        return self._choice(index, whole, with_prompt=True)

    def _choice(self, index: int, delta: Delta, *, with_prompt: bool) -> dict[str, Any]:
        prompt = {"prompt_token_ids": list(self._prompts[index])}
        return {
            "index": index,
            "text": delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            **self._ids(delta.token_ids),
            **(prompt if with_prompt and self._with_token_ids else {}),
        }
