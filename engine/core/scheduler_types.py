"""What goes into the scheduler and what comes out of it: limits, costs, steps and effects."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.core.sequence import SequenceKey
from engine.protocol import KvSource, SamplingParams, TokenEntry, TokenLogprobs


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    num_blocks: int
    block_tokens: int
    max_batch: int
    """Sequences with KV at once."""
    max_model_len: int
    """Prompt and generated tokens of a sequence."""
    max_step_tokens: int = 256
    """Rows of one step."""
    num_micro_batches: int = 1
    """Steps in flight at once: the number of stages."""
    vocab_size: int = 0
    """Token ids outside are refused; 0: not checked."""
    prefix_caching: bool = True
    """Sequences that begin alike share the KV of their full blocks, also with those that have ended."""

    def __post_init__(self) -> None:
        for name in (
            "num_blocks",
            "block_tokens",
            "max_batch",
            "max_model_len",
            "max_step_tokens",
            "num_micro_batches",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """Figures of the whole model, that decide between pulling KV and computing it again."""

    prefill_s_per_token: float
    transfer_bytes_per_s: float
    transfer_latency_s: float
    kv_bytes_per_token: int

    def __post_init__(self) -> None:
        if not self.transfer_bytes_per_s > 0:
            raise ValueError(f"transfer_bytes_per_s: must be positive, got {self.transfer_bytes_per_s}")

    def pull_s(self, num_tokens: int) -> float:
        return self.transfer_latency_s + num_tokens * self.kv_bytes_per_token / self.transfer_bytes_per_s


@dataclass(frozen=True, slots=True)
class StepSlice:
    """One sequence's part of a step: `token_ids` are fed at positions context_tokens, context_tokens+1, ..."""

    key: SequenceKey
    token_ids: list[int]
    context_tokens: int
    """Tokens before these; their KV is complete."""
    blocks: list[int]
    """Block table that covers the context and these rows."""
    samples: bool
    """The last row yields a token."""
    num_logits: int
    """Of the last rows: 1 if it samples; all rows while the prompt is scored."""
    sampling: SamplingParams
    tokens: list[int]
    """Prompt and output so far; the sequence's own list, which stays as it is while the step is in flight."""
    num_prompt_tokens: int

    @property
    def index(self) -> int:
        """Of the token to be sampled: 0 = first generated token of the choice."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def scored_ids(self) -> list[int]:
        """Prompt tokens whose logprobs the first of the logits give; empty unless the prompt is scored."""
        if self.num_logits < len(self.token_ids) or self.sampling.prompt_logprobs is None:
            return []
        first = self.context_tokens + 1
        return self.tokens[first : min(first + len(self.token_ids), self.num_prompt_tokens)]


@dataclass(frozen=True, slots=True)
class Step:
    step_id: int
    slices: list[StepSlice]


@dataclass(frozen=True, slots=True)
class StepExtras:
    """What a step yields beside tokens, for the sequences that asked for it."""

    logprobs: dict[SequenceKey, TokenLogprobs] = field(default_factory=dict)
    """Of the sampled token."""
    prompt_logprobs: dict[SequenceKey, list[TokenLogprobs]] = field(default_factory=dict)
    """Of the slice's `scored_ids`."""
    errors: dict[SequenceKey, str] = field(default_factory=dict)
    """The sequence cannot go on; its sampled id means nothing."""


@dataclass(frozen=True, slots=True)
class PullOrder:
    """Effect: pull the first `source.num_tokens` tokens' KV into `blocks`, then call `pull_done`."""

    key: SequenceKey
    source: KvSource
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class OutEntry:
    """Effect: goes into the next frame to `gateway`."""

    gateway: str
    entry: TokenEntry


@dataclass(frozen=True, slots=True)
class Counts:
    running: int
    """Sequences with KV, or with blocks that a pull is filling."""
    waiting: int
    parked: int
    free_slots: int
    """Sequences that it would take now without making them wait for a slot."""
    free_kv_blocks: int
    total_kv_blocks: int
    cached_kv_blocks: int
    """Free or not, whose content can be found by the next sequence that begins alike."""
    steps_in_flight: int
