"""Deltas of the fold as OpenAI's objects: chunks of a stream, or one whole body. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from engine.protocol import TokenLogprobs
from gateway.core import sse
from gateway.core.fold import Delta, Detokenizer, IncrementalText
from gateway.core.logprobs import CompletionLogprobs, Vocabulary, chat_logprobs, prompt_logprobs, token_text
from gateway.core.parsing import ToolCallDelta


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


class TokenTexts(Detokenizer, Vocabulary, Protocol):
    """A tokenizer as the answer needs it."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What all chunks of an answer have in common."""

    id: str
    created: int
    """Whole Unix seconds."""
    model: str
    system_fingerprint: str | None = None


class Extras(msgspec.Struct, frozen=True, kw_only=True):
    """What the client asked for beside text."""

    token_ids: bool = False
    top_logprobs: int | None = None
    """Alternatives of each token of the answer; None: no logprobs."""
    top_prompt_logprobs: int | None = None
    echo_texts: Sequence[str] = ()
    """By choice, the prompt's text as it came; empty: no echo."""


class ResponseFormat(ABC):
    """How one request is answered; `prompts` are the prompt ids by choice."""

    object_name: str
    chunk_name: str

    def __init__(self, header: Header, prompts: Sequence[Sequence[int]], extras: Extras, texts: TokenTexts) -> None:
        self._header = msgspec.structs.asdict(header)
        self._prompts = prompts
        self._extras = extras
        self._texts = texts
        self._started: set[int] = set()
        self._text_events: dict[int, sse.TextEvent] = {}
        self._has_extras = extras.token_ids or extras.top_logprobs is not None

    @abstractmethod
    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """The chunks for the next delta of choice `index`; the first call for it also begins the choice."""

    @abstractmethod
    def choice(self, index: int, whole: Delta) -> dict[str, Any]:
        """The choice in a whole body."""

    @abstractmethod
    def text_chunk(self, index: int, text: str) -> dict[str, Any]:
        """A chunk that only adds `text` to choice `index`."""

    def events(
        self, index: int, delta: Delta, usage: Callable[[], Usage] | None = None, *, with_usage: bool = False
    ) -> bytes:
        """The chunks of a delta as server-sent events, each with the usage so far, or null, if `with_usage`."""
        if usage is None and self._is_only_text(index, delta):
            event = self._text_events.get(index)
            if event is None:
                event = sse.TextEvent(lambda text: self._with_usage(self.text_chunk(index, text), None, with_usage))
                self._text_events[index] = event
            return event.encode(delta.text)
        so_far = usage().as_json() if usage is not None else None
        return b"".join(sse.event(self._with_usage(chunk, so_far, with_usage)) for chunk in self.chunks(index, delta))

    def _is_only_text(self, index: int, delta: Delta) -> bool:
        return bool(
            delta.text
            and index in self._started
            and delta.finish_reason is None
            and not (self._has_extras or delta.scores or delta.reasoning or delta.tool_calls)
        )

    @staticmethod
    def _with_usage(chunk: dict[str, Any], usage: dict[str, Any] | None, with_usage: bool) -> dict[str, Any]:
        return {**chunk, "usage": usage} if with_usage else chunk

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
        return {"token_ids": list(ids)} if self._extras.token_ids else {}

    def _prompt_logprobs(self, index: int, scores: Sequence[TokenLogprobs | None] | None) -> dict[str, Any]:
        num_top = self._extras.top_prompt_logprobs
        if num_top is None or scores is None:
            return {}
        return {"prompt_logprobs": prompt_logprobs(self._prompts[index], scores, num_top, self._texts)}


class ChatFormat(ResponseFormat):
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        unsent = Unsent(delta)
        if self._starts(index):
            first = self._delta_chunk(index, {"role": "assistant", "content": ""}, Unsent(None))
            if self._extras.token_ids and len(self._started) == 1:
                first["prompt_token_ids"] = list(self._prompts[0])
            found.append(first)
        if delta.reasoning:
            found.append(self._delta_chunk(index, {"reasoning_content": delta.reasoning}, unsent))
        has_news = delta.scores or (self._extras.token_ids and delta.token_ids)
        if delta.text or (has_news and delta.finish_reason is None and not delta.reasoning and not delta.tool_calls):
            found.append(self._delta_chunk(index, {"content": delta.text}, unsent))
        found += [self._delta_chunk(index, {"tool_calls": [_call_delta(call)]}, unsent) for call in delta.tool_calls]
        if delta.finish_reason is not None:
            found.append(self._delta_chunk(index, {}, unsent, delta.finish_reason))
        return found

    def text_chunk(self, index: int, text: str) -> dict[str, Any]:
        return self._delta_chunk(index, {"content": text}, Unsent(None))

    def choice(self, index: int, whole: Delta) -> dict[str, Any]:
        num_top = self._extras.top_logprobs
        message: dict[str, Any] = {"role": "assistant", "content": whole.text, "refusal": None}
        if whole.reasoning:
            message["reasoning_content"] = whole.reasoning
        if whole.tool_calls:
            message |= {"content": whole.text or None, "tool_calls": [_call(call) for call in whole.tool_calls]}
        return {
            "index": index,
            "message": message,
            "logprobs": None if num_top is None else chat_logprobs(whole.scores, num_top, self._texts),
            "finish_reason": whole.finish_reason,
            **self._ids(whole.token_ids),
        }

    def body(self, wholes: Sequence[Delta], usage: Usage) -> dict[str, Any]:
        prompt = {"prompt_token_ids": list(self._prompts[0])} if self._extras.token_ids else {}
        return {**super().body(wholes, usage), **prompt, **self._prompt_logprobs(0, wholes[0].prompt_logprobs)}

    def _delta_chunk(
        self, index: int, delta: dict[str, Any], unsent: Unsent, finish_reason: str | None = None
    ) -> dict[str, Any]:
        return self._chunk(
            {
                "index": index,
                "delta": delta,
                "logprobs": self._logprobs(unsent),
                "finish_reason": finish_reason,
                **self._ids(unsent.take_ids()),
            }
        )

    def _logprobs(self, unsent: Unsent) -> dict[str, Any] | None:
        num_top, scores = self._extras.top_logprobs, unsent.take_scores()
        return None if num_top is None or not scores else chat_logprobs(scores, num_top, self._texts)


class CompletionFormat(ResponseFormat):
    object_name = "text_completion"
    chunk_name = "text_completion"

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        starts = self._starts(index)
        said = delta.text or delta.finish_reason or delta.scores or (self._extras.token_ids and delta.token_ids)
        if not said and not starts:
            return []
        return [self._chunk(self._choice(index, delta, with_prompt=starts))]

    def text_chunk(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk(self._choice(index, Delta(text, []), with_prompt=False))

    def choice(self, index: int, whole: Delta) -> dict[str, Any]:
        return self._choice(index, whole, with_prompt=True)

    def _choice(self, index: int, delta: Delta, *, with_prompt: bool) -> dict[str, Any]:
        prompt = {"prompt_token_ids": list(self._prompts[index])} if self._extras.token_ids else {}
        echo = self._extras.echo_texts[index] if self._extras.echo_texts and with_prompt else ""
        return {
            "index": index,
            "text": echo + delta.text,
            "logprobs": self._logprobs(index, delta, with_prompt=with_prompt),
            "finish_reason": delta.finish_reason,
            **self._ids(delta.token_ids),
            **(prompt if with_prompt else {}),
            **(self._prompt_logprobs(index, delta.prompt_logprobs) if with_prompt else {}),
        }

    def _logprobs(self, index: int, delta: Delta, *, with_prompt: bool) -> dict[str, Any] | None:
        num_top, echo_texts = self._extras.top_logprobs, self._extras.echo_texts
        if num_top is None:
            return None
        found = CompletionLogprobs(num_top, self._texts)
        if with_prompt and echo_texts and delta.prompt_logprobs is not None:
            ids = self._prompts[index]
            offsets = token_offsets(ids, echo_texts[index], self._texts)
            for token_id, offset, logprobs in zip(ids, offsets, delta.prompt_logprobs, strict=True):
                found.add(token_id, offset, logprobs)
        start = len(echo_texts[index]) if echo_texts else 0
        for score in delta.scores:
            found.add(score.token_id, start + score.offset_chars, score.logprobs)
        return found.as_json()


class Unsent:
    """Ids and scores of a delta, which go out with the first chunk that is made of it."""

    def __init__(self, delta: Delta | None) -> None:
        self._ids = delta.token_ids if delta is not None else []
        self._scores = delta.scores if delta is not None else []

    def take_ids(self) -> list[int]:
        taken, self._ids = self._ids, []
        return taken

    def take_scores(self) -> list[Any]:
        taken, self._scores = self._scores, []
        return taken


def token_offsets(ids: Sequence[int], text: str, texts: TokenTexts) -> list[int]:
    """Where in `text`, which became `ids` or was made of them, each token begins, in characters.

    Special tokens count where the text has their names: in a prompt that came as text they may stand.
    """
    others, offsets, num_chars = IncrementalText(texts), [], 0
    for token_id in ids:
        offsets.append(min(num_chars, len(text)))
        name = token_text(texts, token_id) if texts.is_special(token_id) else ""
        if name and text.startswith(name, num_chars):
            num_chars += len(name)
        else:
            num_chars += len(others.push(token_id))
    return offsets


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, **_call(call)}


def _call(call: ToolCallDelta) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
