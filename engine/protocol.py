"""Wire types and NATS subjects that the engine owns: requests in, the token log out. Imports msgspec only.

Engines see and return token ids only. A response is a fold over its token log; a log entry is accepted by index:
a repeat is dropped, a gap is asked for again (`ResendRequest`), an older attempt is fenced off.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

from planner.protocol import Message, ModelShape, RankInventory, StepProfile, Wire

DEADLINE_PASSED: Final = "deadline"
"""`TokenEntry.error` of a sequence that was ended because its client's time is over."""


class SamplingParams(Wire, frozen=True, kw_only=True):
    """How the next token is chosen; defaults are off.

    Order, as in vLLM: grammar -> min_tokens, logit_bias -> penalties -> temperature -> min_p -> top_k -> top_p -> draw.
    Each is a function of these parameters, the prompt ids and the ids so far, and the draw of (seed, choice, index):
    a resume rebuilds everything from the committed ids. Logprobs are those of the model's own distribution: before
    all of this.
    """

    max_tokens: int
    """0 only with `prompt_logprobs`: the prompt is scored, and the log ends with no token ("length")."""
    min_tokens: int = 0
    """Before so many, end-of-sequence and stop tokens are ruled out, unless the grammar allows nothing else."""
    temperature: float = 1.0
    """Below 1e-5: greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    min_p: float = 0.0
    seed: int = 0
    """Always set: the gateway draws one where the client gave none."""
    seeded: bool = False
    """The client gave the seed: it expects the same tokens again. Engines that draw by (seed, choice, index) always
    do so; others only then."""
    ignore_eos: bool = False
    """With a grammar: go on for as long as the grammar allows anything else than to end."""
    eos_token_ids: list[int] = []
    stop_token_ids: list[int] = []
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each generated token."""
    frequency_penalty: float = 0.0
    """Subtracted for each time that a token was generated."""
    repetition_penalty: float = 1.0
    """Of tokens in prompt or output: a positive logit is divided by it, a negative one multiplied."""
    logit_bias: dict[int, float] = {}
    """Added to a token's logit; -100 and below rule it out."""
    logprobs: int | None = None
    """With each token its logprob, and so many of the likeliest tokens (0: none)."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens; once, with the first entry (`TokenEntry.prompt_logprobs`)."""
    grammar: str | None = None
    """What the output must match, as `llguidance.LLMatcher` takes it: Lark, or JSON from its `grammar_from_*`.

    Needs `eos_token_ids`: one of them ends the output, and only where the grammar may end.
    """


class KvHolder(Wire, frozen=True, kw_only=True):
    """A rank that holds the KV of a sequence for a rectangle of (decoder layer, head group)."""

    rank: str
    context_address: str
    first_layer: int
    last_layer: int
    first_group: int
    last_group: int


class KvSource(Wire, frozen=True, kw_only=True):
    """Where the KV of an interrupted sequence lies: its first `num_tokens` tokens, in pipeline `pipeline`."""

    pipeline: str
    num_tokens: int
    holders: list[KvHolder]
    blocks: list[int] = []
    """Its block table there (the same on every rank of that pipeline)."""
    deadline_s: float | None = None
    """When the first of the holders goes away."""


class GenerateRequest(Message, frozen=True, kw_only=True):
    """`pipeline.<id>.submit`, request/reply (`SubmitReply`); one choice of one client request.

    With `committed_ids` it resumes: the engine goes on after them, and the first index it returns is
    `len(committed_ids)`. With `kv_source` it may pull the KV instead of computing it again.
    """

    request_id: str
    choice: int = 0
    attempt: int = 0
    gateway: str
    prompt_ids: list[int]
    committed_ids: list[int] = []
    sampling: SamplingParams
    kv_source: KvSource | None = None
    deadline_s: float | None = None
    """The client's; the engine drops the sequence when it has passed."""


class RejectReason(StrEnum):
    NOT_LEADER = "not_leader"
    """The pipeline is not running here (any more)."""
    DRAINING = "draining"
    FULL = "full"
    TOO_LONG = "too_long"
    INVALID = "invalid"


class SubmitReply(Message, frozen=True, kw_only=True):
    accepted: bool
    reason: RejectReason | None = None
    detail: str = ""


class CancelRequest(Message, frozen=True, kw_only=True):
    """`pipeline.<id>.cancel`: all choices of a request; no reply."""

    request_id: str
    attempt: int | None = None
    """Only if it runs there as this attempt or an older one; None: whatever runs."""


class ResendRequest(Message, frozen=True, kw_only=True):
    """`pipeline.<id>.resend`, request/reply: the entry of (request, choice) from `from_index` on."""

    request_id: str
    choice: int
    from_index: int


class ResendReply(Message, frozen=True, kw_only=True):
    """`entry` is None if the pipeline does not know the sequence (any more)."""

    entry: TokenEntry | None


class FinishReason(StrEnum):
    STOP = "stop"
    """EOS or a stop token id; that token is the last of `ids`."""
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class Interruption(Wire, frozen=True, kw_only=True):
    """The sequence was stopped at a token boundary and waits to be resumed elsewhere by its gateway."""

    reason: str
    kv_source: KvSource | None = None
    broken: bool = False
    """Its engine died while it ran, without notice: it may be the sequence that kills engines."""


class ResumeStats(Wire, frozen=True, kw_only=True):
    """How a resumed sequence got its KV; in the first entry after a resume."""

    pulled_tokens: int = 0
    recomputed_tokens: int = 0
    """Of the tokens that had been computed before the interruption (prompt and committed)."""
    pull_s: float = 0.0
    waited_s: float = 0.0
    """From submission until the first new token."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """One token's place in the model's distribution: natural logarithms, before any bias, penalty or temperature."""

    logprob: float
    rank: int
    """1: the likeliest."""
    top_ids: list[int] = []
    """The likeliest tokens, best first, as many as were asked for; the token itself may be missing."""
    top_logprobs: list[float] = []


class TokenEntry(Wire, frozen=True, kw_only=True):
    """New tokens of one sequence: `ids[0]` has index `index` (0 = first generated token of the choice)."""

    request_id: str
    choice: int
    attempt: int
    index: int
    ids: list[int]
    finish: FinishReason | None = None
    error: str | None = None
    interruption: Interruption | None = None
    resume: ResumeStats | None = None
    cached_tokens: int = 0
    """Prompt tokens whose KV was there already; in the first entry."""
    logprobs: list[TokenLogprobs] | None = None
    """Of `ids`, one each; None unless they were asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Of the prompt's ids, one each, None for the first; in the entry from index 0, if they were asked for."""


class TokenFrame(Message, frozen=True, kw_only=True):
    """`tokens.<gateway>.<pipeline>`: everything that one step committed for one gateway."""

    pipeline: str
    epoch: int
    entries: list[TokenEntry]


class PipelineState(Message, frozen=True, kw_only=True):
    """`pipeline.<id>.state`: at least once a second while it lives, and on change (at most 20 a second)."""

    pipeline: str
    epoch: int
    ready: bool
    draining: bool
    running: int
    """Sequences with KV."""
    waiting: int
    free_slots: int
    """Sequences it would take now."""
    total_kv_blocks: int
    free_kv_blocks: int
    """Free ones may still hold what the next request that begins alike can use."""
    cached_kv_blocks: int = 0
    """Free or not, whose KV such a request can use. Which these are the gateway guesses from what it sent where."""
    kv_block_tokens: int = 0
    """Whole blocks are shared: of so many tokens. 0: prefixes are not kept."""
    deadline_s: float | None = None
    """When the first of its instances goes away, if one is under notice."""
    parked: int = 0
    """Interrupted sequences whose KV it still holds for others to pull."""


class PullRequest(Message, frozen=True, kw_only=True):
    """`rank.<rank>.pull`, request/reply (`PullReply`): leader -> each rank of its pipeline.

    Pull the KV of a sequence from its holders into `blocks` of the KV pool of `pipeline`.
    """

    pipeline: str
    request_id: str
    choice: int
    source: KvSource
    blocks: list[int]
    deadline_s: float | None = None
    """Nothing may be written after it: the leader gives the pull up then, and the blocks to others."""


class PullReply(Message, frozen=True, kw_only=True):
    ok: bool
    pulled_bytes: int = 0
    local_bytes: int = 0
    detail: str = ""


class ReleaseKv(Message, frozen=True, kw_only=True):
    """`rank.<rank>.release`: the KV of an interrupted sequence was taken over, or is not wanted."""

    pipeline: str
    request_id: str
    choice: int


class RankReport(Message, frozen=True, kw_only=True):
    """`rank.<rank>.report`: rank -> the agent of its instance, on change and every second."""

    inventory: RankInventory
    model: ModelShape
    epoch: int
    profile: StepProfile | None = None


class EngineSubjects:
    """NATS names under one prefix; see `PlannerSubjects` for the prefix."""

    def __init__(self, model: str) -> None:
        self.prefix = f"spotserve.{model}"
        self.all_states = f"{self.prefix}.pipeline.*.state"
        self.all_tokens = f"{self.prefix}.tokens.>"
        self.token_stream = f"spotserve-{model}-tokens"
        """JetStream stream over `all_tokens`: the commit log."""

    def submit(self, pipeline: str) -> str:
        return f"{self.prefix}.pipeline.{pipeline}.submit"

    def cancel(self, pipeline: str) -> str:
        return f"{self.prefix}.pipeline.{pipeline}.cancel"

    def resend(self, pipeline: str) -> str:
        return f"{self.prefix}.pipeline.{pipeline}.resend"

    def state(self, pipeline: str) -> str:
        return f"{self.prefix}.pipeline.{pipeline}.state"

    def tokens(self, gateway: str, pipeline: str) -> str:
        return f"{self.prefix}.tokens.{gateway}.{pipeline}"

    def all_tokens_of(self, gateway: str) -> str:
        return f"{self.prefix}.tokens.{gateway}.*"

    def report(self, rank: str) -> str:
        return f"{self.prefix}.rank.{rank}.report"

    def pull(self, rank: str) -> str:
        return f"{self.prefix}.rank.{rank}.pull"

    def release(self, rank: str) -> str:
        return f"{self.prefix}.rank.{rank}.release"
