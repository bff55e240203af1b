"""What a (data, pipeline, tensor) configuration costs: memory, latency of a typical request, throughput.

Time. A pipeline of P stages runs its sequences in m = min(P, sequences) micro-batches that follow each other round.
A step (one token for each sequence) takes the longer of the slowest micro-batch's way through all stages and of the
turns of all micro-batches at the slowest stage; the bubble is in the difference. Prompt tokens ride in one
micro-batch for each prompt, add to its time at every stage, and are never divided by the number of micro-batches (the
artifact does that). A request is one prefill and its further tokens' steps; how many share a step is a matter of
queueing (`queueing`).

What fits is in `rank_memory`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from typing import Final, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from planner.core.measured_profile import usable_profile
from planner.core.profile import Profile, divisors
from planner.core.queueing import mean_service_and_wait_s, pooled_wait_s
from planner.core.rank_memory import RankMemory
from planner.core.stages import split_layers
from planner.protocol import ModelShape, ParallelConfig, StepProfile

DRAIN_S: Final = 30.0
"""A queue should be served in the time over which arrivals are measured."""
CHUNK_TOKENS: Final = 256
"""Prompt tokens of one micro-batch, at most: the engine's default."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What the gateways see."""

    arrivals_per_s: float = 0.0
    prompt_tokens: float = 512.0
    output_tokens: float = 128.0
    lengths_cv: float = 0.0
    """Standard deviation of the work of a request over its mean."""
    arrivals_cv2: float = 1.0
    """Squared coefficient of variation of the gaps between arrivals."""
    num_waiting: float = 0.0
    """Requests that have arrived and that no pipeline has room for."""

    @property
    def demand_per_s(self) -> float:
        """What must be served: arrivals, and the queue within DRAIN_S."""
        return self.arrivals_per_s + self.num_waiting / DRAIN_S


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    config: ParallelConfig
    latency_s: float
    """Of a typical request, queueing included; infinite where arrivals exceed the throughput."""
    service_s: float
    """The same without queueing; where arrivals exceed the throughput, with full batches."""
    throughput_per_s: float
    """Requests a second with full batches."""


class Factors(Protocol):
    """What measured steps say of the profile (`refine.Corrections`)."""

    def factor(self, pipeline: int, tensor: int) -> float: ...


class _Split(NamedTuple):
    """What the times of a pipeline depend on: its stages differ in layers, and only the last one has the head."""

    num_layers: int
    most_layers: int
    """Of a stage without the head; 0 if there is none."""
    last_layers: int


class CostModel:
    """Costs of configurations of one model on ranks with at least `memory_bytes` each.

    `profile`: None, or a calibration that contradicts itself, is replaced by a guess; a `Profile` that does so, or one
    of a model with another number of layers, raises ProfileError. `buffer_bytes`: what a migration may receive before
    it releases anything; None: without bound. `step_tokens`: rows of the largest step, whose activations
    `memory_bytes` must hold too (0: they are not part of it). Degrees that the profile lacks raise ProfileError.
    """

    def __init__(
        self,
        model: ModelShape,
        profile: Profile | StepProfile | None,
        memory_bytes: int,
        workload: Workload,
        max_batch: int,
        *,
        buffer_bytes: int | None = 0,
        step_tokens: int = 0,
        corrections: Factors | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self.model = model
        self.profile = usable_profile(model, profile)
        self.memory_bytes = memory_bytes
        self.workload = workload
        self.max_batch = max_batch
        self._memory = RankMemory(model, memory_bytes, buffer_bytes, step_tokens)
        self.chunk_tokens = chunk_tokens
        self._corrections = corrections
        self._stages: dict[int, list[tuple[int, int]]] = {}
        self._splits: dict[int, _Split] = {}
        self._kv_blocks: dict[tuple[int, int], int] = {}
        self._completions: dict[tuple[int, int], NDArray[np.float64]] = {}

    @cached_property
    def head_cost_layers(self) -> float:
        """Time of embedding, head and sampling in decoder layers, at batch 1 and the smallest degree."""
        tensor = min(self.profile.degrees)
        return self._head_ms(tensor, 1) / self._decode_layer_ms(tensor, 1)

    def tensor_degrees(self) -> list[int]:
        """Degrees that the profile covers and that divide the head groups, ascending."""
        return [tensor for tensor in divisors(self.model.num_head_groups) if tensor in self.profile.degrees]

    def stages(self, pipeline: int) -> list[tuple[int, int]]:
        """(first, last) decoder layer of each of `pipeline` stages."""
        if pipeline not in self._stages:
            self._stages[pipeline] = split_layers(self.model.num_layers, pipeline, self.head_cost_layers)
        return self._stages[pipeline]

    # --- Memory ---

    @property
    def min_kv_blocks(self) -> int:
        """One sequence of the greatest length must fit."""
        return self._memory.min_kv_blocks

    def weight_bytes(self, pipeline: int, tensor: int) -> int:
        """Weights of the rank that holds most."""
        return self._memory.weight_bytes(self.stages(pipeline), tensor)

    def reserved_bytes(self, pipeline: int, tensor: int) -> int:
        """Of the rank that holds most: weights, activations and migration buffer."""
        return self._memory.reserved_bytes(self.stages(pipeline), tensor)

    def num_kv_blocks(self, pipeline: int, tensor: int) -> int:
        """KV blocks that a pipeline gets; 0 if the model does not fit in this shape."""
        key = (pipeline, tensor)
        if key not in self._kv_blocks:
            self._kv_blocks[key] = self._memory.num_kv_blocks(self.stages(pipeline), tensor, self.max_batch)
        return self._kv_blocks[key]

    def batch(self, pipeline: int, tensor: int) -> int:
        """Sequences that a pipeline decodes at once, limited by the KV of typical requests."""
        typical_blocks = math.ceil(
            (self.workload.prompt_tokens + self.workload.output_tokens) / self.model.kv_block_tokens
        )
        return max(1, min(self.max_batch, self.num_kv_blocks(pipeline, tensor) // max(1, typical_blocks)))

    # --- Time ---

    def step_ms(
        self, pipeline: int, tensor: int, *, num_decoding: float, prefill_tokens: int = 0, context_tokens: float = 0
    ) -> float:
        """One step of one pipeline: each of `num_decoding` sequences gets one token, and `prefill_tokens` prompt
        tokens are processed beside them. `context_tokens` is the mean context of a decoding sequence; 0: the context
        that was measured.
        """
        if num_decoding <= 0 and prefill_tokens <= 0:
            return 0.0
        chunk_tokens = self._chunk_tokens(pipeline, prefill_tokens)
        num_chunks = math.ceil(prefill_tokens / chunk_tokens)
        num_micro_batches = min(pipeline, num_decoding + num_chunks)
        micro_batch = max(1.0, num_decoding / num_micro_batches)
        layer_ms = self._decode_layer_ms(tensor, micro_batch)
        if context_tokens > 0 and num_decoding > 0:
            beyond = (context_tokens - self.profile.measured_context_tokens) * micro_batch / tensor
            layer_ms = max(0.0, layer_ms + beyond * self.profile.context_layer_ms_per_token)
        times_ms = self._through_ms(pipeline, layer_ms, self._head_ms(tensor, micro_batch), self.profile.decode_hop_ms)
        if not num_chunks:
            step_ms = max(times_ms[0], num_micro_batches * times_ms[1])
        else:
            num_others = max(0.0, num_micro_batches - num_chunks)
            shape = (pipeline, tensor, micro_batch, layer_ms)
            through_ms, turn_ms = self._with_prompt_ms(*shape, min(prefill_tokens, chunk_tokens))
            _, last_turn_ms = self._with_prompt_ms(*shape, prefill_tokens - (num_chunks - 1) * chunk_tokens)
            # Chunks follow each other through the stages, and the other micro-batches follow them.
            turns_ms = (num_chunks - 1) * turn_ms + last_turn_ms
            step_ms = max(through_ms - turn_ms + turns_ms, num_others * times_ms[1] + turns_ms)
        return step_ms * self._factor(pipeline, tensor)

    def _chunk_tokens(self, pipeline: int, prefill_tokens: int) -> float:
        """Prompts are put together in one micro-batch only where there are more of them than micro-batches."""
        return min(self.chunk_tokens, max(1.0, self.workload.prompt_tokens, prefill_tokens / pipeline))

    def decode_step_ms(self, pipeline: int, tensor: int, num_sequences: int) -> float:
        """Until every one of `num_sequences` of one pipeline has its next token, halfway through typical requests."""
        context_tokens = self.workload.prompt_tokens + self.workload.output_tokens / 2
        return self.step_ms(pipeline, tensor, num_decoding=num_sequences, context_tokens=context_tokens)

    def prefill_ms(self, pipeline: int, tensor: int) -> float:
        """A typical prompt alone, through all stages and the head."""
        return self.step_ms(pipeline, tensor, num_decoding=0, prefill_tokens=math.ceil(self.workload.prompt_tokens))

    def throughput_per_s(self, pipeline: int, tensor: int) -> float:
        """Requests a second of one pipeline with full batches; 0 if the model does not fit."""
        if self.num_kv_blocks(pipeline, tensor) == 0:
            return 0.0
        return float(self._completions_per_s(pipeline, tensor)[-1])

    def latency_s(self, pipeline: int, tensor: int, arrivals_per_s: float) -> float:
        """Of a typical request at one pipeline that is given `arrivals_per_s` Poisson arrivals: service and queueing
        (`queueing` says which queue). Infinite if they exceed its throughput or the model does not fit.
        """
        if self.num_kv_blocks(pipeline, tensor) == 0:
            return math.inf
        completions = self._completions_per_s(pipeline, tensor)
        return sum(mean_service_and_wait_s(completions, arrivals_per_s, self._variability))

    def service_s(self, pipeline: int, tensor: int, arrivals_per_s: float) -> float:
        """As `latency_s`, without the time in the queue. Where the arrivals exceed the throughput: of full batches."""
        if self.num_kv_blocks(pipeline, tensor) == 0:
            return math.inf
        completions = self._completions_per_s(pipeline, tensor)
        if arrivals_per_s >= completions[-1]:
            return len(completions) / float(completions[-1])
        return mean_service_and_wait_s(completions, arrivals_per_s)[0]

    def estimate(self, data: int, pipeline: int, tensor: int) -> Estimate | None:
        """Of `data` equal pipelines, each request going to one with room; None if the model does not fit."""
        if self.num_kv_blocks(pipeline, tensor) == 0:
            return None
        completions = self._completions_per_s(pipeline, tensor)
        arrivals_per_s = self.workload.arrivals_per_s / data
        service_s, wait_s = mean_service_and_wait_s(completions, arrivals_per_s, self._variability)
        load = arrivals_per_s / float(completions[-1])
        latency_s = service_s + pooled_wait_s(wait_s, load, data) if load < 1 else math.inf
        return Estimate(
            config=ParallelConfig(data=data, pipeline=pipeline, tensor=tensor, max_batch=self.batch(pipeline, tensor)),
            latency_s=latency_s,
            service_s=self.service_s(pipeline, tensor, arrivals_per_s),
            throughput_per_s=data * float(completions[-1]),
        )

    @property
    def _variability(self) -> float:
        return (self.workload.arrivals_cv2 + self.workload.lengths_cv**2) / 2

    def _completions_per_s(self, pipeline: int, tensor: int) -> NDArray[np.float64]:
        """Requests a second of one pipeline with n = 1 .. batch sequences in service."""
        key = (pipeline, tensor)
        if key not in self._completions:
            self._completions[key] = self._compute_completions(pipeline, tensor)
        return self._completions[key]

    def _compute_completions(self, pipeline: int, tensor: int) -> NDArray[np.float64]:
        num = np.arange(1, self.batch(pipeline, tensor) + 1, dtype=np.float64)
        # Steps are piecewise linear in the number of sequences: computed where the slope changes.
        sizes = self.profile.of_degree(tensor).batch_sizes
        knots = sorted({1, pipeline, *(pipeline * size for size in sizes), len(num)})
        knots = [n for n in knots if n <= len(num)]
        step_ms = np.interp(num, knots, [self.decode_step_ms(pipeline, tensor, n) for n in knots])
        decode_ms = max(1.0, self.workload.output_tokens) * step_ms / num
        prompt_ms = max(0.0, self.prefill_ms(pipeline, tensor) - self.step_ms(pipeline, tensor, num_decoding=1))
        # A prompt holds up all micro-batches, as they follow each other round: for its chunks' turns at one stage, and
        # for the way through the others, which prompts of the same round share.
        num_chunks = math.ceil(max(1.0, self.workload.prompt_tokens) / self.chunk_tokens)
        share = (pipeline - 1) / (pipeline - 1 + num_chunks)
        per_round = num / max(1.0, self.workload.output_tokens)
        alone = -np.expm1(-per_round) / per_round
        return 1000 / np.maximum(prompt_ms * (1 - share + share * alone) + decode_ms, 1e-6)

    def _through_ms(self, pipeline: int, layer_ms: float, head_ms: float, hop_ms: float) -> tuple[float, float]:
        """Of one micro-batch: its way through all stages, and its turn at the slowest stage."""
        split = self._split(pipeline)
        if pipeline == 1:
            hop_ms = 0.0
        slowest_ms = max(split.most_layers * layer_ms, split.last_layers * layer_ms + head_ms) + hop_ms
        return split.num_layers * layer_ms + head_ms + hop_ms * (pipeline - 1), slowest_ms

    def _with_prompt_ms(
        self, pipeline: int, tensor: int, micro_batch: float, layer_ms: float, tokens: float
    ) -> tuple[float, float]:
        """As `_through_ms`, of a micro-batch with `tokens` prompt tokens beside its decodes (`layer_ms` a layer)."""
        profile = self.profile
        prompts = tokens / profile.prompt_tokens
        layer_ms += max(0.0, self._prefill_layer_ms(tensor, prompts) - self._decode_layer_ms(tensor, 1))
        hop_ms = profile.decode_hop_ms + max(0.0, profile.prefill_hop_ms - profile.decode_hop_ms) * prompts
        return self._through_ms(pipeline, layer_ms, self._head_ms(tensor, micro_batch), hop_ms)

    def _split(self, pipeline: int) -> _Split:
        if pipeline not in self._splits:
            sizes = [last - first + 1 for first, last in self.stages(pipeline)]
            self._splits[pipeline] = _Split(sum(sizes), max(sizes[:-1], default=0), sizes[-1])
        return self._splits[pipeline]

    def _prefill_layer_ms(self, tensor: int, prompts: float) -> float:
        """From a decode step of one sequence (the weights are read, whatever the tokens) to the measured prompts."""
        times = self.profile.of_degree(tensor)
        if prompts < times.batch_sizes[0]:
            least_ms = self._decode_layer_ms(tensor, 1)
            return least_ms + (times.prefill_layer_ms[0] - least_ms) * prompts / times.batch_sizes[0]
        return interpolate(times.batch_sizes, times.prefill_layer_ms, prompts)

    def _decode_layer_ms(self, tensor: int, batch: float) -> float:
        times = self.profile.of_degree(tensor)
        return interpolate(times.batch_sizes, times.decode_layer_ms, batch)

    def _head_ms(self, tensor: int, batch: float) -> float:
        times = self.profile.of_degree(tensor)
        if times.head_ms is not None:
            return interpolate(times.batch_sizes, times.head_ms, batch)
        return interpolate(self.profile.head_batch_sizes, self.profile.head_ms, batch)

    def _factor(self, pipeline: int, tensor: int) -> float:
        correction = self._corrections.factor(pipeline, tensor) if self._corrections is not None else 1.0
        return self.profile.fix_factor * correction


def interpolate(xs: Sequence[int], ys: Sequence[float], x: float) -> float:
    """Piecewise linear through (xs, ys), ascending xs; flat before the first, and after the last the last slope, if
    it rises.
    """
    if len(xs) == 1 or x <= xs[0]:
        return ys[0]
    right = min(bisect_left(xs, x), len(xs) - 1)
    slope = (ys[right] - ys[right - 1]) / (xs[right] - xs[right - 1])
    if x > xs[-1]:
        return ys[-1] + max(0.0, slope) * (x - xs[-1])
    return ys[right - 1] + slope * (x - xs[right - 1])
