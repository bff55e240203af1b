"""`SamplingParams` with the fields, defaults, checks and mutations of 1.2.1."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any


class LogitsProcessor(ABC):
    @abstractmethod
    def __call__(
        self, req_id: int, logits: Any, token_ids: list[list[int]], stream_ptr: int | None, client_id: int | None
    ) -> None:
        """Change `logits` (1, 1, vocabulary) in place; `token_ids` hold prompt and output."""


class BatchedLogitsProcessor(ABC):
    @abstractmethod
    def __call__(self, req_ids: Any, logits: Any, token_ids: Any, stream_ptr: int, client_ids: Any) -> None: ...


@dataclass(slots=True, kw_only=True)
class GuidedDecodingParams:
    json: Any = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | None = None

    def _validate(self) -> None:
        if sum(bool(getattr(self, item.name)) for item in fields(self)) > 1:
            raise ValueError("Only one guide can be used for guided decoding.")


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int | None = 32
    bad: str | list[str] | None = None
    bad_token_ids: list[int] | None = None
    _bad_word_ids: list[list[int]] | None = field(default=None, init=False, repr=False)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    _stop_word_ids: list[list[int]] | None = field(default=None, init=False, repr=False)
    embedding_bias: Any = None
    logits_processor: Any = None
    apply_batched_logits_processor: bool = False
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    top_k: int | None = None
    top_p: float | None = None
    top_p_min: float | None = None
    top_p_reset_ids: int | None = None
    top_p_decay: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    beam_search_diversity_rate: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    prompt_ignore_length: int | None = None
    length_penalty: float | None = None
    early_stopping: int | None = None
    no_repeat_ngram_size: int | None = None
    min_p: float | None = None
    beam_width_array: list[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_context_logits: bool = False
    return_generation_logits: bool = False
    exclude_input_from_output: bool = True
    return_encoder_output: bool = False
    return_perf_metrics: bool = False
    additional_model_outputs: list[str] | None = None
    lookahead_config: Any = None
    guided_decoding: GuidedDecodingParams | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    _stream_interval: int | None = field(default=None, init=False, repr=False)
    _is_set_up: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.pad_id is None:
            self.pad_id = self.end_id
        if self.best_of is None:
            self.best_of = self.n
        self._validate()

    def _validate(self) -> None:
        if self.top_p is not None and not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"require 0 <= top_p <= 1, got top_p={self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"require top_k >= 0, got top_k={self.top_k}")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"require temperature >= 0, got temperature={self.temperature}")
        assert self.best_of is not None
        if self.best_of < self.n:
            raise ValueError(f"best_of ({self.best_of}) cannot be less than n ({self.n})")
        if self.best_of > 1 and self._greedy_decoding and not os.environ.get("TLLM_ALLOW_N_GREEDY_DECODING"):
            raise ValueError(f"Greedy decoding in the LLM API does not allow multiple returns (best_of={self.best_of})")
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens < 1:
            raise ValueError(f"truncate_prompt_tokens must be >= 1, got {self.truncate_prompt_tokens}")
        if self.guided_decoding is not None:
            self.guided_decoding._validate()
        self.logprobs = int(self.logprobs) if self.logprobs is not None else None
        self.prompt_logprobs = int(self.prompt_logprobs) if self.prompt_logprobs is not None else None

    @property
    def _greedy_decoding(self) -> bool:
        return not self.use_beam_search and (
            (self.temperature is None and self.top_p is None and self.top_k is None)
            or self.top_k == 1
            or self.top_p == 0.0
            or self.temperature == 0
        )

    def _setup(self, tokenizer: Any, generation_config: dict[str, Any]) -> None:
        """Only called while `end_id` is None: the model's EOS ids, and words into ids. Changes the object."""
        eos = generation_config.get("eos_token_id")
        all_eos = eos if isinstance(eos, list) else [eos] if eos is not None else []
        self.end_id = tokenizer.eos_token_id if tokenizer is not None else all_eos[0]
        if self.pad_id is None:
            self.pad_id = self.end_id
        extra = [i for i in all_eos if i != self.end_id]
        if extra and not self.ignore_eos:
            own = self.stop_token_ids or []
            self.stop_token_ids = own + [i for i in extra if i not in own]
        for name, target in (("stop", "_stop_word_ids"), ("bad", "_bad_word_ids")):
            words = getattr(self, name)
            if words:
                encoded = [tokenizer.encode(word) for word in ([words] if isinstance(words, str) else words)]
                setattr(self, target, encoded)

    def _stop_reasons_and_words(self) -> list[tuple[int | str, list[int]]]:
        reasons: list[tuple[int | str, list[int]]] = [(i, [i]) for i in self.stop_token_ids or []]
        if self.stop:
            if self._stop_word_ids is None:
                raise RuntimeError(f"{self.stop=} is not processed by tokenizer, please call the setup method")
            words = [self.stop] if isinstance(self.stop, str) else self.stop
            reasons += zip(words, self._stop_word_ids, strict=True)
        return reasons
