"""One sequence (one choice of one request) in the scheduler: its tokens, its KV and its state table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

from engine.core.frames import MAX_VALUES
from engine.core.prefix_index import ROOT
from engine.errors import TransitionError
from engine.protocol import (
    FinishReason,
    GenerateRequest,
    Interruption,
    KvSource,
    ResumeStats,
    SamplingParams,
    TokenEntry,
    TokenLogprobs,
)

MAX_LOGPROBS: Final = 100
BANNED_BIAS: Final = -100.0


class SequenceKey(NamedTuple):
    request_id: str
    choice: int


class State(StrEnum):
    WAITING = "waiting"
    """For a slot and blocks; has no KV."""
    PULLING = "pulling"
    """Has blocks; the runtime is filling them from another pipeline."""
    RUNNING = "running"
    """Has blocks; prefill or decode, in a step or ready for one."""
    RETIRING = "retiring"
    """Over for the client; the blocks stay until the step or the pull in flight has returned."""
    PARKED = "parked"
    """Interrupted; the blocks stay for others to pull."""
    FINISHED = "finished"


class Event(StrEnum):
    ORDER_PULL = "order_pull"
    START = "start"
    PULLED = "pulled"
    EVICT = "evict"
    RETIRE = "retire"
    PARK = "park"
    END = "end"


TRANSITIONS: Final[dict[tuple[State, Event], State]] = {
    (State.WAITING, Event.ORDER_PULL): State.PULLING,
    (State.WAITING, Event.START): State.RUNNING,
    (State.WAITING, Event.END): State.FINISHED,
    (State.PULLING, Event.PULLED): State.RUNNING,
    (State.PULLING, Event.RETIRE): State.RETIRING,
    (State.RUNNING, Event.EVICT): State.WAITING,
    (State.RUNNING, Event.RETIRE): State.RETIRING,
    (State.RUNNING, Event.PARK): State.PARKED,
    (State.RUNNING, Event.END): State.FINISHED,
    (State.RETIRING, Event.END): State.FINISHED,
    (State.PARKED, Event.END): State.FINISHED,
}


@dataclass(slots=True, eq=False)
class Sequence:
    request: GenerateRequest
    priority: tuple[int, int]
    """Smaller goes first; the greatest is evicted first."""
    submitted_s: float
    key: SequenceKey = field(init=False)
    tokens: list[int] = field(init=False)
    """Prompt, then all generated tokens."""
    state: State = State.WAITING
    blocks: list[int] = field(default_factory=list)
    """Block table: token at position p lies in block `blocks[p // block_tokens]`."""
    num_computed: int = 0
    """KV exists for `tokens[:num_computed]`; never for the newest token, which the next step feeds."""
    num_fed: int = 0
    """`tokens[:num_fed]` have KV, or are in a step in flight."""
    num_steps: int = 0
    """Steps in flight that it is in: several only in prefill, a chunk in each."""
    kv_source: KvSource | None = field(init=False)
    """KV that can still be pulled; None once that was done, has failed, or was decided against."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the tokens generated here, if asked for."""
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    """Of the prompt so far, if asked for."""
    prefix_node: int = ROOT
    """What is known of its first `num_indexed` blocks, see PrefixIndex."""
    num_indexed: int = 0
    reused_tokens: int = 0
    """Whose KV it found in the pool when it was last admitted."""
    cached_tokens: int | None = None
    """Of the prompt, when it was first admitted."""
    pulled_tokens: int = 0
    pull_s: float = 0.0
    resumes: bool = field(init=False)
    """Its first entry, which tells how the resume went, is still to come."""
    finish: FinishReason | None = None
    error: str | None = None
    interruption: Interruption | None = None
    ended_s: float = math.inf

    def __post_init__(self) -> None:
        self.key = SequenceKey(self.request.request_id, self.request.choice)
        self.tokens = [*self.request.prompt_ids, *self.request.committed_ids]
        self.kv_source = self.request.kv_source
        self.resumes = bool(self.request.committed_ids) or self.kv_source is not None

    @property
    def num_committed(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def num_to_feed(self) -> int:
        """Tokens that were in no step yet: 1 in decode, more in prefill; 0 until the step with its newest returns."""
        return len(self.tokens) - self.num_fed

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's logprobs are still to be computed; a resume with tokens had them before."""
        return self.request.sampling.prompt_logprobs is not None and not self.num_committed

    def apply(self, event: Event) -> None:
        """Raises TransitionError, with no change, for an event that the state does not know."""
        state = TRANSITIONS.get((self.state, event))
        if state is None:
            raise TransitionError(self.key, self.state, event)
        self.state = state

    def finish_reason(self, max_model_len: int) -> FinishReason | None:
        """Whether the tokens so far end the sequence; only the newest can, so only that is looked at."""
        sampling, num_committed = self.request.sampling, self.num_committed
        if not num_committed:
            return None
        newest = self.tokens[-1]
        if newest in sampling.eos_token_ids and sampling.grammar is not None:
            return FinishReason.STOP  # Chosen only where the grammar has ended.
        stops = newest in sampling.stop_token_ids or (not sampling.ignore_eos and newest in sampling.eos_token_ids)
        if stops and num_committed >= sampling.min_tokens:
            return FinishReason.STOP
        if num_committed >= sampling.max_tokens or len(self.tokens) >= max_model_len:
            return FinishReason.LENGTH
        return None

    def entry(self, from_index: int, resume: ResumeStats | None = None) -> TokenEntry:
        """All tokens from index `from_index` (of the generated ones) on, and how the sequence ended, if it has.

        With logprobs `from_index` must not lie before what was generated here (`num_without_logprobs`).
        """
        logprobs, prompt_logprobs = None, None
        if self.request.sampling.logprobs is not None:
            logprobs = self.logprobs[from_index - len(self.request.committed_ids) :]
        if from_index == 0 and len(self.prompt_logprobs) == len(self.request.prompt_ids):
            prompt_logprobs = self.prompt_logprobs
        return TokenEntry(
            request_id=self.key.request_id,
            choice=self.key.choice,
            attempt=self.request.attempt,
            index=from_index,
            ids=self.tokens[len(self.request.prompt_ids) + from_index :],
            finish=self.finish,
            error=self.error,
            interruption=self.interruption,
            resume=resume,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            cached_tokens=(self.cached_tokens or 0) if from_index == len(self.request.committed_ids) else 0,
        )

    @property
    def num_without_logprobs(self) -> int:
        """Generated tokens whose logprobs were asked for, but are known to the gateway alone."""
        return len(self.request.committed_ids) if self.request.sampling.logprobs is not None else 0

    def resume_stats(self, now_s: float) -> ResumeStats:
        """Of what had been computed before the interruption, what was pulled and what was computed again.

        What was found here is neither.
        """
        source = self.request.kv_source
        num_known = len(self.request.prompt_ids) + len(self.request.committed_ids) - 1
        num_before = num_known if source is None else min(source.num_tokens, num_known)
        return ResumeStats(
            pulled_tokens=self.pulled_tokens,
            recomputed_tokens=max(0, num_before - max(self.pulled_tokens, self.reused_tokens)),
            pull_s=self.pull_s,
            waited_s=now_s - self.submitted_s,
        )


def invalid_field(request: GenerateRequest, vocab_size: int) -> str | None:
    """What is wrong with a request, led by the name of the field; None if nothing is. `vocab_size` 0: not known."""
    if not request.prompt_ids:
        return "prompt_ids: empty"
    for name, ids in (("prompt_ids", request.prompt_ids), ("committed_ids", request.committed_ids)):
        if ids and (min(ids) < 0 or (vocab_size and max(ids) >= vocab_size)):
            return f"{name}: token ids must be in 0..{vocab_size - 1 if vocab_size else 'vocabulary size'}"
    return _invalid_sampling(request.sampling, vocab_size) or _invalid_extras(request, vocab_size)


def _invalid_sampling(sampling: SamplingParams, vocab_size: int) -> str | None:
    least_tokens = 1 if sampling.prompt_logprobs is None else 0
    # Written so that NaN fails each of them.
    rules = {
        "max_tokens": (sampling.max_tokens >= least_tokens, sampling.max_tokens, f"at least {least_tokens}"),
        "min_tokens": (sampling.min_tokens >= 0, sampling.min_tokens, "at least 0"),
        "temperature": (0 <= sampling.temperature < math.inf, sampling.temperature, "finite and at least 0"),
        "top_p": (0 < sampling.top_p <= 1, sampling.top_p, "above 0 and at most 1"),
        "top_k": (sampling.top_k >= 0, sampling.top_k, "at least 0"),
        "min_p": (0 <= sampling.min_p <= 1, sampling.min_p, "in 0..1"),
        "presence_penalty": (math.isfinite(sampling.presence_penalty), sampling.presence_penalty, "finite"),
        "frequency_penalty": (math.isfinite(sampling.frequency_penalty), sampling.frequency_penalty, "finite"),
        "repetition_penalty": (
            0 < sampling.repetition_penalty < math.inf,
            sampling.repetition_penalty,
            "finite and above 0",
        ),
    }
    most_logprobs = min(MAX_LOGPROBS, vocab_size or MAX_LOGPROBS)
    for name, number in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
        if number is not None:
            rules[name] = (0 <= number <= most_logprobs, number, f"in 0..{most_logprobs}")
    for name, (valid, value, rule) in rules.items():
        if not valid:
            return f"sampling.{name}: must be {rule}, got {value}"
    return None


def _invalid_extras(request: GenerateRequest, vocab_size: int) -> str | None:
    sampling = request.sampling
    for token_id, bias in sampling.logit_bias.items():
        if token_id < 0 or (vocab_size and token_id >= vocab_size):
            return f"sampling.logit_bias: token id {token_id} is not in the vocabulary"
        if not math.isfinite(bias):
            return f"sampling.logit_bias: must be finite, got {bias} for token {token_id}"
    if sampling.prompt_logprobs is not None:
        number = (1 + sampling.prompt_logprobs) * len(request.prompt_ids)
        if number > MAX_VALUES:
            return f"sampling.prompt_logprobs: {number} values for this prompt, at most {MAX_VALUES}"
    if sampling.grammar is not None and not sampling.eos_token_ids:
        return "sampling.eos_token_ids: must not be empty with a grammar"
    return None
